"""Sections `rollout` and `selection`: how responses are generated, and which groups a step trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section
from sdpg_megatron.config.field_values import ExpandedText

Port = Annotated[int, Field(ge=1, le=65535)]


class SGLangConfig(Section):
    """Servers of `rollout.engine` sglang: started by the run's first rank, or running already at `urls`."""

    urls: tuple[str, ...] = ()
    """Servers to use, each by scheme, host and port, such as http://10.0.0.2:30000; empty to start `servers` of them
    beside the first rank."""
    router: str | None = None
    """An sglang-router in front of the servers, for example http://10.0.0.1:30000: responses are asked of it. It must
    have the run's servers and no others; weights go to the servers themselves."""
    servers: int = Field(1, ge=1, le=1024)
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks of each server that is started."""
    data: int = Field(1, ge=1)
    """Data-parallel replicas within each server that is started."""
    first_gpu: int | None = Field(None, ge=0)
    """Device number of the first started server; the others follow. Null for the one after the trainer's ranks on this
    machine, or for 0 where `colocated`."""
    host: str = "127.0.0.1"
    """Address that started servers listen on; other machines can reach them only where it is one of theirs."""
    ports: tuple[Port, ...] = ()
    """One for each started server; empty for free ones."""
    python: ExpandedText | None = None
    """Interpreter that has sglang; null for this one, or for $SDPG_SGLANG_PYTHON where that is set."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Null for `model.dtype`."""
    mem_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the device's memory for weights and keys and values; null for SGLang's choice."""
    arguments: tuple[str, ...] = ()
    """More arguments of sglang.launch_server, as on its command line. Refused are those that another field sets, and
    those that change the sampling."""
    api_key_variable: str | None = None
    """Environment variable that holds the servers' API key; the key itself is never written anywhere."""
    admin_key_variable: str | None = None
    """Likewise, for the calls that change a server."""
    start_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds until a started server answers; until a lost one is back."""
    request_timeout: float = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Seconds for one group of responses."""
    update_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds for one bucket of weights."""
    health_interval: float = Field(10.0, gt=0, le=MAX_SECONDS)
    """Seconds between looks at a server's health."""
    health_timeout: float = Field(30.0, gt=0, le=MAX_SECONDS)
    """Seconds that an answer to such a look may take."""
    health_misses: int = Field(3, ge=1)
    """Looks in a row without an answer after which a server counts as lost: its requests go elsewhere, and it is
    started anew where this run had started it."""
    attempts: int = Field(5, ge=1)
    """Times that a group of responses is asked for before the run ends with an error."""
    restarts: int = Field(3, ge=0)
    """Times that servers are started anew, all together, before the run ends with an error."""
    concurrency: int = Field(256, ge=1)
    """Groups asked of one server at a time."""
    transport: Literal["broadcast", "shared", "disk"] = "broadcast"
    """How weights reach the servers: a process group of the trainer and all servers (NCCL, or Gloo on CPUs); memory
    shared with servers on the same machine; or a folder that the servers can read."""
    bucket_mib: int = Field(256, ge=1, le=1_048_576)
    """Bound of one piece of the weight stream; two of them are held at a time."""
    address: str | None = None
    """This machine's address for the broadcast group; null for the loopback, or for the address that reaches `urls`."""
    folder: Path | None = None
    """Where the disk transport writes; null for a folder in `run_dir`."""
    colocated: bool = False
    """Started servers share the trainer's devices: they give their memory back while training, and the trainer moves
    its optimizer state and gradients to the host while they generate. Needs another transport than broadcast."""
    verify_every: int = Field(0, ge=0)
    """Verify the servers' weights every this many steps by publishing them again over random values; 0 for never."""


class RolloutConfig(Section):
    engine: Literal["hf", "sglang"] = "hf"
    """"hf" embeds Hugging Face transformers in each data-parallel replica's first rank; "sglang" uses servers."""
    sglang: SGLangConfig = SGLangConfig()
    prompts_per_step: int = Field(128, ge=1, le=1_000_000)
    group_size: int = Field(8, ge=2, le=65_536)
    """Responses per prompt; advantages compare them, so one is not a group."""
    max_response_tokens: int = Field(4096, ge=1)
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the student's and the teacher's logits are divided by it in training too."""
    top_p: float = 1.0
    """Only 1: training needs samples of the model's own distribution, untruncated. Evaluations have `eval.top_p`."""
    ahead: int = Field(0, ge=0, le=1)
    """Steps that generation is ahead of training at most. 1 generates a step's responses while the step before it is
    learnt from, with weights that are one step older; needs `objective.correction`."""
    batch_size: int = Field(64, ge=1)
    """Sequences generated at a time by the embedded engine."""
    replay_routing: bool = False
    """In a mixture of experts, have the student's passes send each token to the experts that it was sent to in rollout,
    by the weights that the router then gives them. Costs layers x experts bytes a token on every rank."""
    mismatch_limit: float | None = Field(0.05, gt=0)
    """Largest mean |log-prob in training - log-prob in rollout| of a response token, in nats, in the first step of a
    run or of its continuation; beyond, the run stops. Null for no such gate."""


class SelectionConfig(Section):
    """Which groups a step learns from. Those that it leaves out are replaced by groups of further prompts."""

    drop_dead: bool = False
    """Leave out groups whose rewards are all equal, which teach nothing: DAPO's dynamic sampling."""
    filters: tuple[str, ...] = ()
    """Functions of your own, "module:function", called with a `ScoredGroup`: True keeps it, False leaves it out."""
    max_rounds: int = Field(10, ge=1, le=1_000_000)
    """Times that a step asks for prompts; then it goes on with the groups that it has. 1 replaces nothing."""
    oversample: float = Field(1.0, ge=1, le=1000)
    """Prompts that a round asks for, over groups that are missing. Groups beyond `rollout.prompts_per_step` are left
    out, too."""
