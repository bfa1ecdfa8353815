"""What a run is. Every field documents itself here and nowhere else; defaults live here only.

How a run's settings are read and checked is in `sdpg_megatron.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdpg_megatron.field_values import ExpandedText
from sdpg_megatron.methods import Method, dapo_sections, defaults

MAX_SECONDS = 2_000_000.0
"""Bound on a time, 23 days: poll(2) takes milliseconds in 32 bits."""
MAX_REWARD = 1e100
"""Bound of a reward's magnitude: sums of rewards stay finite."""
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """A part of the configuration: immutable; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # in mappings of any values, such as options of a chat template
    )


class ModelConfig(Section):
    path: Path
    """Hugging Face folder: config.json, safetensors, tokenizer with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type. The head's sums, the buffers that gradients are added up in over micro-batches and
    ranks, and the optimizer with its own copy of the weights are float32 either way."""
    spec: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Transformer Engine's or this package's. "auto" takes the former where it is installed, a
    GPU is present and `dtype` is bfloat16: its attention has no float32 for packed sequences."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""
    packed: bool = True
    """Sequences of a micro-batch lie one after the other, without padding; otherwise padded to the longest of them, for
    attention kernels that want it."""
    gradient_accumulation_fusion: bool = False
    """Linear layers add to the float32 gradient buffers within their matrix products: needs apex's CUDA extension."""
    activation_fusion: bool = True
    """Compute the gated activation as one compiled kernel on a GPU. No effect without a GPU or without Triton."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Coefficient of a mixture of experts' load-balancing loss, for each layer; 0 for none. It balances each sequence's
    tokens; docs/experts.md has the formula."""
    router_z_loss: float = Field(0.0, ge=0)
    """Coefficient of the router's z-loss, the squared log-sum-exp of its logits, for each layer; 0 for none."""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null for the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: shard activations outside attention and MLP over the tensor-parallel ranks. A mixture of
    experts needs it where `tensor` is over 1."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each holds a share of every sequence's tokens. Needs `model.packed`."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks of a mixture of experts: each holds its share of every layer's experts. They are taken from
    the tensor-, context- and data-parallel ones."""
    expert_tensor: int | None = Field(None, ge=1)
    """Tensor-parallel ranks of each expert; null for `tensor`."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens come to the ranks of their experts: each to those alone, or all to all of them and only the results
    summed. The latter where experts are spread over the tensor-parallel ranks alone, in a single pipeline stage."""
    timeout: float = Field(4 * 3600.0, gt=0, le=MAX_SECONDS)
    """Seconds that a rank waits for the others in a collective. Ranks that do not generate wait for those that do."""
    rendezvous_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds until all ranks have joined the run, each after it has read the model's description."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel ranks of each expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_ranks(self) -> int:
        """Ranks of a pipeline stage that hold one copy of its experts between them."""
        return self.expert * self.expert_tensor_size


class GymTask(Section):
    weight: float = Field(1.0, gt=0)
    """Its share of the prompts, relative to the other tasks' weights."""
    parameters: dict[str, Any] = {}
    """The task's own settings, as reasoning_gym.create_dataset takes them."""


class GymConfig(Section):
    """Endless prompts from reasoning-gym, in the place of `data.train`."""

    tasks: dict[str, GymTask] = {}
    """By reasoning-gym's name, for example {gcd: {weight: 2}, basic_arithmetic: {parameters: {max_terms: 3}}}."""
    held_out: int = Field(0, ge=0)
    """Problems for evaluation, in the place of `data.eval`; training never shows them."""


class DataConfig(Section):
    train: tuple[Path, ...] = ()
    """Files of prompts, or glob patterns: JSONL, JSON, CSV (each also gzipped) or Parquet."""
    eval: tuple[Path, ...] = ()
    """Held-out prompts; empty for no evaluation."""
    reasoning_gym: GymConfig = GymConfig()
    question_key: str = "question"
    """Column of the question, text or a list of chat messages. Where a row has none, the list in its column `prompt`,
    `messages` or `conversations`. The public SDPG format ([TEACHER_CONTEXT_TOKEN] in the content of a `prompt` list) is
    recognised by itself."""
    answer_key: str = "answer"
    """Column of the verifier's answer: text, a number, or a dict or list for a verifier of your own."""
    context_key: str = "context"
    """Column of the privileged context. Where a row has none: the assistant's message that ends its chat, else the
    answer."""
    context_template: str = "answer"
    """How the teacher's prompt carries the context: "answer", "verify", "solution", "feedback", or a template with
    {question}, {context} and, if wanted, {answer}."""
    context_of: Literal["own", "other"] = "own"
    """Whose context and answer the teacher is given: the problem's own or, as a control, those of another problem with
    another answer, drawn by `seed`."""
    peer_template: str = "peer"
    """How the teacher's prompt carries another response to the same question: "peer", or a template of your own with
    {question}, {context} (the response) and, if wanted, {answer}."""
    max_peer_tokens: int | None = Field(None, ge=1)
    """Longest teacher prompt with another response; one that is longer counts as none. Null for `max_prompt_tokens` and
    `rollout.max_response_tokens` together."""
    system: str | None = None
    """System message for student and teacher; null leaves the chat template's own default."""
    template_options: dict[str, Any] = {}
    """Variables of the model's chat template, for example {enable_thinking: false} for Qwen3."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longest student or teacher prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a longer one: left out, or cut on its left. Both are counted and reported."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to training rows with the question, answer and context of an earlier row, and the same other columns
    where the verifier is a module:function: left out and counted, or kept. An evaluation takes a problem once either
    way."""
    shuffle: bool = True
    """Shuffle every epoch, seeded by `seed`."""


class RewardConfig(Section):
    verifier: str = "number"
    """How a response is scored: "number" (its last number equals the answer), "math" (its last boxed answer, by
    math-verify), "answer" (its last line "Answer: value"), "exact" (all of it), "reasoning_gym" (the task's own
    scorer), or "module:function" of your own. docs/data.md says what each accepts."""
    timeout: float = Field(10.0, gt=0, le=MAX_SECONDS)
    """Seconds for one call; a call that takes longer, or raises, gives `failure_reward` and is counted."""
    failure_reward: float = Field(0.0, ge=-MAX_REWARD, le=MAX_REWARD)
    failure_limit: float | None = Field(0.5, gt=0, le=1)
    """Largest share of a step's or an evaluation's verifier calls that may fail; beyond, or where all fail, the run
    ends. Null for no limit."""
    workers: int = Field(1, ge=1, le=1024)
    """Processes that run verifiers."""
    clip: tuple[float, float] | None = None
    """Bounds of a verifier's reward in the advantages, for example [0, 1]; null for none."""
    overlong_buffer: int | None = Field(None, ge=1)
    """DAPO's penalty: over the last so many tokens below `rollout.max_response_tokens`, what is added to a reward falls
    linearly from 0 to -`overlong_penalty`; null for none."""
    overlong_penalty: float = Field(1.0, gt=0)


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
    sink: Literal["broadcast", "shared", "disk"] = "broadcast"
    """How weights reach the servers: a process group of the trainer and all servers (NCCL, or Gloo on CPUs); memory
    shared with servers on the same machine; or a folder that the servers can read."""
    bucket_mib: int = Field(256, ge=1, le=1_048_576)
    """Bound of one piece of the weight stream; two of them are held at a time."""
    address: str | None = None
    """This machine's address for the broadcast group; null for the loopback, or for the address that reaches `urls`."""
    folder: Path | None = None
    """Where the disk sink writes; null for a folder in `run_dir`."""
    colocated: bool = False
    """Started servers share the trainer's devices: they give their memory back while training, and the trainer moves
    its optimizer state and gradients to the host while they generate. Needs another sink than broadcast."""
    verify_every: int = Field(0, ge=0)
    """Compare the servers' weights with the trainer's by checksum every so many steps; 0 for never, as has to be for
    mixtures of experts."""


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


Deviation = Literal["population", "sample", "none"]


class ObjectiveConfig(Section):
    """The defaults written here are SDPG's; `methods.DEFAULTS` has what other methods have instead."""

    name: Method = "sdpg"
    """Training method; docs/methods.md has them all."""
    advantage_deviation: Deviation = "population"
    """Divides a group's rewards less their mean: the standard deviation with the divisor G, with G - 1, or nothing."""
    policy: Literal["ratio", "reinforce", "clipped_reinforce"] = "ratio"
    """Outcome term: clipped importance ratio; advantage-weighted log-prob; or log-prob weighted by the clipped ratio's
    loss, which leaves clipped tokens a gradient (the paper's appendix A.3). Equal gradients with one mini-batch."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    dual_clip: float | None = Field(10.0, gt=1)
    """Bound c of the ratio where the advantage is negative; null for none."""
    distill_loss: Literal["divergence", "clipped_ratio"] = "divergence"
    """Distillation term: the divergence; or, for opsd, PPO's clipped ratio with the token advantage
    max(log q - log p_old, 0), as in the public SDPG code's opsd."""
    beta: float = Field(1e-3, ge=0)
    """Weight of the distillation term; 0 for methods that have none."""
    beta_warmup_steps: int | None = Field(None, ge=0)
    """Optimizer steps over which beta rises from 0; null for the paper's 50 of 400, scaled to the run; 0 for none."""
    beta_decay_steps: int | None = Field(None, ge=0)
    """Last optimizer steps, over which beta falls to 0; null for the paper's 350 of 400, scaled so; 0 for none."""
    gate: bool = True
    """Distil only responses with a positive advantage."""
    distill_average: Literal["all", "gated"] = "all"
    """Tokens that the distillation term is averaged over."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token"] = "reverse_kl"
    """Of the student from the teacher, exact over the vocabulary; or log p - log q of the sampled token alone."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in jsd's mixture: beta KL(q || M) + (1 - beta) KL(p || M), M = (1 - beta) p + beta q."""
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    """Tell apart the student's top k tokens alone, all others being one outcome; null for the whole vocabulary."""
    divergence_clip: float | None = Field(None, gt=0)
    """Largest divergence of a token. Beyond, its gradient is scaled down and keeps its direction. Null for none."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Experimental: so many times the divergence from the same teacher with a wrong hint is taken from that with the
    right one. The hint is that of another problem with another answer, drawn by `seed`. Costs a second teacher pass,
    and the head once more for the taught tokens; 0 for none."""
    distill_stop_tokens: bool = True
    """Distil where the sampled token is a stop token, too. The privileged teacher keeps mass on going on."""
    context: Literal["data", "peer"] = "data"
    """What the teacher reads beside the question: what the data has, or, of the responses to the same question, the
    first successful one that is not the response at hand. Where there is none, nothing is distilled."""
    peer_reward: float = 1.0
    """Least reward of a response that is successful."""
    strip_peer_thinking: bool = False
    """Remove <think>...</think> from a successful response before the teacher reads it (sdpo's default). Models that
    treat these tags as special tokens leave none in the text."""
    teacher: Literal["current", "rollout", "every", "initial", "ema"] = "current"
    """Whose weights read the privileged context: the student's at each mini-batch; the student's before a rollout's
    first update; those at every `teacher_every`-th rollout step; those that the run started from; or their exponential
    moving average over optimizer steps. The last three cost a copy of the weights in host memory, which `initial`
    shares with the reference."""
    teacher_every: int = Field(10, ge=1)
    """Rollout steps."""
    teacher_ema: float = Field(0.05, gt=0, le=1)
    """Share of the way to the student's weights that the average goes at each optimizer step."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Divides the teacher's logits; null for the rollout's temperature, as the student's."""
    credit: float = Field(0.5, ge=0, le=1)
    """rlsd: share lambda of a token's advantage that the teacher scales, before its decay."""
    credit_decay_steps: int = Field(50, ge=0)
    """Optimizer steps over which that share falls to 0; 0 to keep it."""
    credit_clip: float = Field(0.2, gt=0, lt=1)
    """The teacher's scale is clipped to [1 - credit_clip, 1 + credit_clip]."""
    credit_ratio: Literal["current", "rollout"] = "current"
    """rlsd: when that scale, q / p of the sampled token, is computed. "rollout": once per rollout, by the teacher's and
    the student's weights before its first update (rlsd's default); "current": at each mini-batch."""
    alpha: float = Field(1e-3, ge=0)
    """Weight of the reference term."""
    reference: Literal["urkl", "ufkl", "fkl", "rkl"] = "urkl"
    """Reference term as a function of log(pi / pi_ref) of the sampled token."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus: so many times each response token's entropy is taken from the loss."""
    ratio_weighted_regularizers: bool = True
    """Near on-policy, weight the distillation and reference terms by the detached ratio pi / pi_old."""
    regularizer_ratio_bound: float | None = Field(None, gt=1)
    """Largest such ratio; null for none."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """What is done about the difference of trainer and rollout engine. The importance weight of a token is the ratio of
    its probability in training, before the step's first update, to that in rollout. "truncate": its loss is
    multiplied by min(weight, `correction_bound`); "mask": by the weight where that lies between the bound and
    its inverse, and left out elsewhere. Costs one forward pass where a step has one mini-batch."""
    correction_level: Literal["token", "sequence"] = "token"
    """Weight of each token, or one of a whole response: the geometric mean of its tokens' weights."""
    correction_bound: float = Field(2.0, gt=1)
    aggregation: Literal["token-mean", "group-token-mean", "sequence-mean"] = "token-mean"
    """How per-token losses become one number; denominators are global."""

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, tree: Any) -> Any:
        return {**defaults(tree.get("name")), **tree} if isinstance(tree, dict) else tree


class HeadConfig(Section):
    """How the output head is computed. None of this changes what is computed, beyond rounding."""

    schedule: Literal["auto", "grad_in_forward", "recompute"] = "auto"
    """grad_in_forward makes the logits once and keeps the gradients of hidden rows and vocabulary matrix until the
    backward pass. recompute keeps next to nothing and makes the logits again in it. auto is grad_in_forward, which is
    faster, unless its memory does not fit what is free when the model is built."""
    chunk_rows: int | None = Field(None, ge=1)
    """Rows whose logits are held at a time where they have a teacher, twice as many where they have none; null for what
    fits the free memory."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Elementwise work; auto is Triton where there is a GPU and Triton, else plain torch."""
    main_grad: bool = True
    """Add the vocabulary matrix's gradient to Megatron's float32 buffer, never rounding it to the weight's type."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, le=1e3)
    min_lr: float = Field(0.0, ge=0, le=1e3)
    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; "linear" and "cosine" reach `min_lr` when the run ends."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, le=1e3)
    weight_decay: float = Field(0.1, ge=0, le=1e36)
    clip_grad: float = Field(1.0, ge=0, le=1e30)
    """Global gradient-norm bound; 0 for none."""
    skip_limit: int = Field(5, ge=1)
    """An optimizer step whose loss or gradient is not finite is skipped; so many in a row end the run. 1 ends it at the
    first."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per rollout; prompts are split evenly over them."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences per forward and backward pass."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """In the place of `micro_batch_size`: tokens per forward and backward pass, those that the teacher reads included,
    and of all context-parallel ranks together. A response that has more with its prompts is alone. Needs
    `model.packed`."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the backward pass of the last micro-batch goes on."""
    overlap_param_gather: bool = False
    """Gather sharded updates as the next mini-batch's layers need them, where nothing else reads the weights first."""
    bucket_size: int | None = Field(None, ge=1)
    """Parameters that travel together where communication overlaps; null for Megatron's choice, 40 million or more."""


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Evaluate every so many steps; 0 for before and after training only."""
    samples: int = Field(4, ge=1, le=65_536)
    """Sampled responses per held-out prompt, besides the greedy one."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_response_tokens: int | None = Field(None, ge=1)
    """Null for the rollout's."""
    k: tuple[int, ...] = ()
    """pass@k and majority@k are reported for these; empty for the powers of two up to `samples`, and `samples`."""
    responses: bool = True
    """Keep the responses' text in the file of each problem's results."""


class RolloutLogConfig(Section):
    """Responses that a run keeps for reading, in `run_dir/rollouts`: a JSONL file a step, a response a line."""

    groups: int = Field(8, ge=0)
    """Groups of a step that are kept: the first of its prompts. 0 for none."""
    every: int = Field(1, ge=1)
    """Steps between two files."""
    max_mib: int = Field(256, ge=1)
    """Bound of the folder: the oldest files are removed. Also of `run_dir/eval`: the oldest evaluations lose their
    responses."""


class AlarmConfig(Section):
    """When a run is warned about. Each threshold may be null, for no such alarm. docs/training.md has the formulas."""

    window: int = Field(5, ge=1)
    """Steps that "now" is the mean of; the run's first so many are its start."""
    entropy: float | None = Field(0.1, gt=0)
    """Least entropy, over that of the run's start."""
    length_low: float | None = Field(0.25, gt=0)
    """Least response length, over that of the run's start."""
    length_high: float | None = Field(4.0, gt=1)
    """Largest response length, likewise."""
    truncated: float | None = Field(0.5, gt=0, le=1)
    """Largest share of responses that are cut at their length limit. Where all of a step are, one step is enough."""
    stop_probability: float | None = Field(0.5, gt=0)
    """Least probability of the stop tokens that end responses, over that of the run's start."""
    gate: bool = True
    """Whether to warn where no gate was open for `window` steps."""
    kl_spike: float | None = Field(5.0, gt=1)
    """Largest KL (to teacher, reference or rollout engine), over the median of the `window` steps before."""
    kl_floor: float = Field(0.05, ge=0)
    """Nats a token below which no KL is a spike."""
    entropy_floor: float | None = Field(0.01, ge=0)
    """Least entropy of a step, in nats a token, from the first step on."""
    kl_limit: float | None = Field(5.0, gt=0)
    """Largest KL (to teacher, reference or rollout engine) of a step, in nats a token, from the first step on."""
    failures: float | None = Field(0.1, ge=0, le=1)
    """Largest share of a step's verifier calls that fail, from the first step on. `reward.failure_limit` ends the run.
    """
    gradient_every: int = Field(10, ge=0)
    """Optimizer steps between measurements of `gradient_ratio`, each at the price of some forward passes of the head; 0
    for never."""
    gradient_ratio: float | None = Field(10.0, gt=0)
    """Largest norm of the distillation term's gradient in the logits, over that of the outcome and reference terms."""
    dead_groups: float | None = Field(0.9, gt=0, le=1)
    """Largest share of groups whose rewards are all equal."""
    reward_gain: float | None = Field(0.05, gt=0)
    """Rise of the training reward, from one span of evaluations to the next, that held-out accuracy has to follow."""
    evaluations: int = Field(3, ge=2)
    """Evaluations of such a span."""


class CheckpointConfig(Section):
    every: int = Field(10, ge=0)
    """Save every so many steps, and at the end; 0 for the end only."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep those whose step is a multiple of this; 0 for none."""
    asynchronous: bool = True
    """Write behind the steps that follow, from a copy of the state in host memory. A checkpoint then is complete a
    step or more later; a run that is stopped or ends waits for it."""
    verify: Literal["digests", "sizes"] = "digests"
    """What of a checkpoint's files is compared with its manifest before they are read: "digests" reads them whole,
    each rank its share."""
    export: bool = True
    """Write the trained model as a Hugging Face folder when the run ends."""


class WatchdogConfig(Section):
    """Seconds that the phases of a run may take on a rank; beyond, the job ends with every rank's place and stack. Null
    for no bound."""

    enabled: bool = True
    silence: float = Field(300.0, gt=0, le=MAX_SECONDS)
    """Seconds without a word from a rank, as its process is dead, stopped or cut off, after which the job ends."""
    start: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Reading the model or a checkpoint, starting servers."""
    rollout: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    """Generating and scoring, all rounds of a step."""
    prepare: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """The passes before the weights change."""
    update: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """All optimizer steps of a rollout."""
    publish: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    switch: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """Taking the devices from colocated servers."""
    eval: float | None = Field(3 * 3600.0, gt=0, le=MAX_SECONDS)
    checkpoint: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    finish: float | None = Field(2 * 3600.0, gt=0, le=MAX_SECONDS)
    """Waiting for the last checkpoint, exporting the model."""
    between: float | None = Field(3600.0, gt=0, le=MAX_SECONDS)
    """What is in no phase: planning, the records."""


class RunConfig(Section):
    """A whole run."""

    run_dir: Path
    """Everything that the run writes goes here."""
    steps: int = Field(ge=1, le=1_000_000_000)
    """Rollout steps."""
    seed: int = Field(0, ge=0)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    selection: SelectionConfig = SelectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    head: HeadConfig = HeadConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    rollout_log: RolloutLogConfig = RolloutLogConfig()
    alarms: AlarmConfig = AlarmConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, tree: Any) -> Any:
        """What DAPO has by default in other sections. Sections of a wrong kind are left for the checks that follow."""
        if not isinstance(tree, dict) or _section(tree, "objective").get("name") != "dapo":
            return tree
        longest = _section(tree, "rollout").get("max_response_tokens", RolloutConfig().max_response_tokens)
        wanted = dapo_sections(longest) if isinstance(longest, int) else {}
        sound = {name: fields for name, fields in wanted.items() if isinstance(tree.get(name, {}), dict)}
        return {**tree, **{name: {**fields, **_section(tree, name)} for name, fields in sound.items()}}

    @property
    def total_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run: the T of the beta schedule and the learning-rate schedule."""
        return self.steps * self.optimizer.minibatches

    @property
    def max_teacher_tokens(self) -> int:
        """Longest teacher prompt."""
        if self.objective.context == "data":
            return self.data.max_prompt_tokens
        return self.data.max_peer_tokens or self.data.max_prompt_tokens + self.rollout.max_response_tokens


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}
