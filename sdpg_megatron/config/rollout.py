"""Sections `rollout` and `selection`: generation of responses, and the groups that a step trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section
from sdpg_megatron.config.field_values import ExpandedText

Port = Annotated[int, Field(ge=1, le=65535)]


class SGLangConfig(Section):
    """SGLang servers (`rollout.engine: sglang`): started by the first rank, or existing ones at `urls`."""

    urls: tuple[str, ...] = ()
    """Base URLs of existing servers, for example `http://10.0.0.2:30000`. Empty: the first rank starts `servers` of
    them on its machine."""
    router: str | None = None
    """Base URL of an sglang-router that generation requests are sent to. It must route to the servers of the run and
    no others; weights are sent to the servers directly. Null: no router."""
    servers: int = Field(1, ge=1, le=1024)
    """Number of servers to start."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel size of each started server."""
    data: int = Field(1, ge=1)
    """Number of data-parallel replicas within each started server."""
    first_gpu: int | None = Field(None, ge=0)
    """Device index of the first started server; further servers use the following devices. Null: the first device after
    the trainer's ranks on this machine, or 0 if `colocated`."""
    host: str = "127.0.0.1"
    """Address that started servers listen on. Other machines can connect only if it is an address of their network."""
    ports: tuple[Port, ...] = ()
    """Port of each started server. Empty: free ports are chosen."""
    python: ExpandedText | None = None
    """Python interpreter with sglang installed. Null: `$SDPG_SGLANG_PYTHON` if set, else the current interpreter."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the servers' weights. Null: `model.dtype`."""
    mem_fraction: float | None = Field(None, gt=0, lt=1)
    """Fraction of device memory for weights and KV cache (`--mem-fraction-static`). Null: SGLang's default."""
    arguments: tuple[str, ...] = ()
    """Additional command line arguments of `sglang.launch_server`. Arguments that another field sets, or that change
    sampling, are refused."""
    api_key_variable: str | None = None
    """Name of the environment variable with the servers' API key. The key is never written to disk or logs. Null: no
    key."""
    admin_key_variable: str | None = None
    """Name of the environment variable with the servers' admin API key, for requests that change a server. Null: no
    admin key."""
    start_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, for a server to become ready after its start or restart."""
    request_timeout: float = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, of a generation request (one group of responses)."""
    update_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, of the transfer of one weight bucket."""
    health_interval: float = Field(10.0, gt=0, le=MAX_SECONDS)
    """Interval, in seconds, between health checks of a server."""
    health_timeout: float = Field(30.0, gt=0, le=MAX_SECONDS)
    """Timeout, in seconds, of a health check."""
    health_misses: int = Field(3, ge=1)
    """Number of consecutive failed health checks after which a server counts as lost. Its requests are sent to other
    servers, and a server that this run started is restarted."""
    attempts: int = Field(5, ge=1)
    """Number of attempts to generate a group, or to publish weights, before the run ends with an error."""
    restarts: int = Field(3, ge=0)
    """Total number of server restarts before the run ends with an error."""
    concurrency: int = Field(256, ge=1)
    """Maximum number of groups in flight per server."""
    transport: str = "broadcast"
    """Transfer of weights to the servers: a process group of trainer and servers (`broadcast`; NCCL, or Gloo on CPUs),
    memory shared with servers on the same machine (`shared`), files in a folder that the servers can read (`disk`), or
    a class of your own, package.module:Class."""
    bucket_mib: int = Field(256, ge=1, le=1_048_576)
    """Maximum size of a weight bucket in MiB. Two buckets are allocated at a time."""
    address: str | None = None
    """Address of this machine for the `broadcast` process group. Null: the loopback address, or the address on the
    route to `urls`."""
    folder: Path | None = None
    """Folder of the `disk` transport. Null: a folder in `run_dir`."""
    colocated: bool = False
    """Started servers share the trainer's devices. Servers release their memory during training; the trainer moves
    optimizer state and gradients to host memory during generation. Not supported by the `broadcast` transport."""
    verify_every: int = Field(0, ge=0)
    """Interval, in rollout steps, between verifications of the servers' weights: the weights are published again over
    random values, and the checksums must not change. 0: never."""


class RolloutConfig(Section):
    """Generation of training responses."""

    engine: Literal["hf", "sglang"] = "hf"
    """Rollout engine: Hugging Face transformers in the first rank of each data-parallel replica (`hf`), or SGLang
    servers (`sglang`)."""
    sglang: SGLangConfig = SGLangConfig()
    prompts_per_step: int = Field(128, ge=1, le=1_000_000)
    """Number of prompts (groups) per rollout step."""
    group_size: int = Field(8, ge=2, le=65_536)
    """Number of responses per prompt. Advantages compare the responses of a group."""
    max_response_tokens: int = Field(4096, ge=1)
    """Maximum response length in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature. In training the logits of student and teacher are divided by it, too."""
    top_p: float = 1.0
    """Must be 1: training needs samples of the untruncated distribution. Evaluations use `eval.top_p`."""
    ahead: int = Field(0, ge=0, le=1)
    """Number of steps that generation may be ahead of training. 1: the responses of the next step are generated during
    training, with weights that are one step older; needs `objective.correction`."""
    batch_size: int = Field(64, ge=1)
    """Number of sequences that the `hf` engine generates at a time."""
    replay_routing: bool = False
    """Mixture of experts: route each token of the student's forward passes to the experts that it was routed to in
    rollout, with the router's current weights. Costs layers x experts per token bytes per token on every rank."""
    mismatch_limit: float | None = Field(0.05, gt=0)
    """Maximum mean |log-prob in training - log-prob in rollout| per response token, in nats, in the first step after
    the start or continuation of a run. The run ends with an error if it is exceeded. Null: no check."""


class SelectionConfig(Section):
    """Filtering of groups. Dropped groups are replaced by groups of further prompts."""

    drop_dead: bool = False
    """Drop groups with equal rewards, which have zero advantages (DAPO's dynamic sampling). Default of `dapo`:
    true."""
    filters: tuple[str, ...] = ()
    """Custom filters, each as `module:function`. A filter is called with a `ScoredGroup` and returns True to keep it.
    """
    max_rounds: int = Field(10, ge=1, le=1_000_000)
    """Maximum number of generation rounds per step. Training continues with the groups found by then. 1: dropped groups
    are not replaced."""
    oversample: float = Field(1.0, ge=1, le=1000)
    """Ratio of prompts per round to missing groups. Groups beyond `rollout.prompts_per_step` are dropped."""
