"""The run's configuration: what loads, what is refused, and that a refusal names field, value and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sdpg_megatron.config import RunConfig, Section
from sdpg_megatron.config.field_values import plain_data
from sdpg_megatron.config.load import apply_override, dump, load_config, parse
from sdpg_megatron.config.method_defaults import DEFAULTS
from sdpg_megatron.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2" / "addition.yaml"
MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "steps": 100,
    "model": {"path": "model"},
    "data": {"train": ["train.jsonl"]},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def sections(model: type[Section] = RunConfig) -> list[type[Section]]:
    nested = [a for f in model.model_fields.values() for a in (f.annotation, *get_args(f.annotation))]
    found = [a for a in nested if isinstance(a, type) and issubclass(a, Section)]
    return [model, *(inner for section in found for inner in sections(section))]


def test_defaults_are_the_papers(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.run_dir == Path("runs/x")
    assert (config.objective.name, config.objective.beta, config.objective.alpha) == ("sdpg", 1e-3, 1e-3)
    assert (config.objective.clip_low, config.objective.clip_high, config.objective.gate) == (0.2, 0.28, True)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_grad) == (1e-6, 0.1, 1.0)
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.temperature) == (128, 8, 1.0)


def test_every_field_is_typed_immutable_and_refuses_unknown_keys(minimal: Path) -> None:
    assert len(sections()) == 18
    for section in sections():
        assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="frozen"):
        load_config(minimal).optimizer.lr = 1.0  # type: ignore[misc]


def test_total_optimizer_steps_counts_minibatches(minimal: Path) -> None:
    assert load_config(minimal, ["optimizer.minibatches=4"]).total_optimizer_steps == 400


def test_the_shipped_example_is_valid() -> None:
    config = load_config(EXAMPLE, ["model.path=/models/smollm2"])
    assert config.model.path == Path("/models/smollm2")
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (8, 8)


def test_the_example_asks_for_the_model() -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: found None, expected a path\. Fix: set model\.path"):
        load_config(EXAMPLE)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("steps=70", lambda c: c.steps == 70),
        ("objective.beta=1e-2", lambda c: c.objective.beta == 0.01),
        ("objective.dual_clip=null", lambda c: c.objective.dual_clip is None),
        ("objective.gate=false", lambda c: c.objective.gate is False),
        ("data.train=[a.jsonl, b.parquet]", lambda c: c.data.train == (Path("a.jsonl"), Path("b.parquet"))),
        ("data.context_template='Answer: {answer}'", lambda c: c.data.context_template == "Answer: {answer}"),
        ("data.system=a=b", lambda c: c.data.system == "a=b"),
        ("reward.verifier=my.module:grade", lambda c: c.reward.verifier == "my.module:grade"),
    ],
)
def test_overrides_are_read_as_yaml(minimal: Path, override: str, read: Any) -> None:
    assert read(load_config(minimal, [override]))


def test_the_last_override_wins(minimal: Path) -> None:
    assert load_config(minimal, ["steps=70", "steps=80"]).steps == 80


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # unknown names: the nearest valid one is named
        ("objectiv.beta=1", ["objectiv", "did you mean 'objective'?"]),
        ("objective.betta=1", ["objective.betta", "'betta'", "did you mean 'beta'", "Fix"]),
        ("rollout.groupsize=8", ["rollout.groupsize", "did you mean 'group_size'"]),
        ("optimizer.zzzzzz=1", ["optimizer.zzzzzz", "known here: lr, min_lr"]),
        ("nonsense=1", ["nonsense", "known here: run_dir, steps"]),
        # wrong form
        ("objective.beta", ["command line", "'objective.beta'", "key=value", "for example"]),
        ("=3", ["command line", "'=3'", "key=value"]),
        ("steps.more=3", ["steps.more", "'steps'", "a section"]),
        ("data.train=[a", ["data.train", "'[a'", "a YAML value", "quote it"]),
        # wrong type or range
        ("steps=0", ["steps: found 0", "a whole number, at least 1"]),
        ("steps=many", ["steps: found 'many'", "a whole number"]),
        ("rollout.group_size=1", ["rollout.group_size: found 1", "at least 2"]),
        ("parallel.virtual_pipeline=1", ["parallel.virtual_pipeline: found 1", "at least 2"]),
        ("rollout.temperature=0", ["rollout.temperature: found 0", "over 0"]),
        ("rollout.sglang.ports=[30000, 30001]", ["rollout.sglang.ports", "1 different ones"]),
        ("rollout.sglang={servers: 2, ports: [30000, 30000]}", ["rollout.sglang.ports", "2 different ones"]),
        ("rollout.sglang.router=http://a", ["rollout.sglang.router: found 'http://a'", "rollout.sglang.ports"]),
        ("rollout.ahead=1", ["rollout.ahead: found 1", "Fix: set objective.correction to truncate"]),
        (
            "rollout.ahead=1 with objective.correction=truncate with model.recompute=true with rollout.engine=hf",
            ["rollout.ahead: found 1", "expected 0 for the embedded engine with model.recompute or parallel.sequence"],
        ),
        ("rollout.sglang.colocated=true", ["rollout.sglang.transport: found 'broadcast'", "Fix: use shared"]),
        ("rollout.sglang={colocated: true, urls: [http://a]}", ["rollout.sglang.colocated: found True", "urls"]),
        ("rollout.sglang.data=2", ["rollout.sglang.transport: found 'broadcast'", "expected disk"]),
        ("objective.clip_low=1", ["objective.clip_low: found 1", "below 1"]),
        ("objective.contrast=0.5", ["objective.contrast", "remove it"]),
        ("rollout.sglang.transport=dsk", ["rollout.sglang.transport: found 'dsk'", "did you mean 'disk'"]),
        ("rollout.sglang.sink=disk", ["rollout.sglang.sink", "use rollout.sglang.transport"]),
        ("objective.dual_clip=1", ["objective.dual_clip: found 1", "over 1"]),
        ("objective.reference=kl", ["objective.reference: found 'kl'", "'urkl'", "'rkl'"]),
        ("objective=sdpg", ["objective: found 'sdpg'", "Fix"]),
        ("data.reasoning_gym.held_out=4", ["data.reasoning_gym.held_out: found 4", "use data.eval"]),
        ("data.reasoning_gym.tasks.gcd.weight=2", ["data.train: found", "remove one of the two"]),
        ("data.reasoning_gym.tasks.gcd.wieght=2", ["data.reasoning_gym.tasks.gcd.wieght", "did you mean 'weight'"]),
        ("data.reasoning_gym.tasks.gcd.weight=0", ["data.reasoning_gym.tasks.gcd.weight: found 0"]),
        ("reward.verifier=reasoning_gym", ["reward.verifier", "set data.reasoning_gym.tasks"]),
        ("data.train=train.jsonl", ["data.train", "'train.jsonl'", "Fix"]),
        # combinations
        ("model.spec=te", ["model.spec: found 'te'", "model.dtype float32", "Fix: set model.dtype to bfloat16"]),
        ("optimizer.minibatches=3", ["optimizer.minibatches: found 3", "prompts_per_step (128)", "divides"]),
        ("objective.beta_warmup_steps=101", ["beta_warmup_steps", "found 101", "100 optimizer steps", "shorten"]),
        ("objective.beta_decay_steps=101", ["beta_decay_steps", "found 101", "100 optimizer steps", "null"]),
        ("optimizer.warmup_steps=101", ["optimizer.warmup_steps: found 101", "100 optimizer steps", "shorten"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr: found 1", "at most lr (1e-06)", "lower it"]),
        ("optimizer.bucket_size=9", ["bucket_size: found 9", "null without optimizer.overlap_grad_reduce"]),
        ("optimizer.overlap_param_gather=true", ["overlap_param_gather", "set optimizer.overlap_grad_reduce"]),
        (
            "optimizer={overlap_param_gather: true, overlap_grad_reduce: true, distributed: false}",
            ["optimizer.overlap_param_gather: found True", "false without optimizer.distributed"],
        ),
        ("eval.k=[1, 5]", ["eval.k: found 5", "1 to eval.samples (4)", "draw more"]),
        ("eval.k=[0]", ["eval.k: found 0", "1 to eval.samples (4)"]),
        ("data.duplicates=merge", ["data.duplicates: found 'merge'", "'drop' or 'keep'"]),
        ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline: found 2", "pipeline is 1", "remove it"]),
        ("parallel.sequence=true", ["parallel.sequence: found True", "tensor is 1", "remove it"]),
        ("parallel={tensor: 2, expert: 3, expert_tensor: 1}", ["expert_tensor: found 3", "parallel.tensor (2)"]),
        ("parallel={expert: 2, dispatcher: allgather}", ["parallel.dispatcher: found 'allgather'", "use alltoall"]),
        (
            "parallel={pipeline: 2, dispatcher: allgather}",
            ["parallel.dispatcher: found 'allgather'", "several pipeline"],
        ),
        ("reward.clip=[1, 0]", ["reward.clip: found (1.0, 0.0)", "a lower and a higher bound"]),
        ("reward.overlong_buffer=4097", ["overlong_buffer: found 4097", "rollout.max_response_tokens (4096)"]),
        ("selection.oversample=2", ["selection.oversample: found 2.0", "set selection.drop_dead or"]),
    ],
)
def test_a_refusal_names_field_value_and_fix(minimal: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, override.split(" with "))
    for part in [*parts, "found", "expected", "Fix"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("others", [["model.dtype=bfloat16"], ["model.packed=false"]])
def test_transformer_engine_takes_bfloat16_and_padded_float32(minimal: Path, others: list[str]) -> None:
    assert load_config(minimal, ["model.spec=te", *others]).model.spec == "te"


def test_ramps_count_together(minimal: Path) -> None:
    both = ["objective.beta_warmup_steps=60", "objective.beta_decay_steps=41"]
    with pytest.raises(ConfigError, match="found 101"):
        load_config(minimal, both)
    assert load_config(minimal, [*both, "optimizer.minibatches=2"]).total_optimizer_steps == 200


@pytest.mark.parametrize("name", ["grpo", "dapo", "rpg", "rlsd"])
def test_a_method_without_a_distillation_term_has_no_beta(minimal: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.beta: found 0\.5, expected 0 with {name}"):
        load_config(minimal, [f"objective.name={name}", "objective.beta=0.5"])
    assert load_config(minimal, [f"objective.name={name}"]).objective.beta == 0


@pytest.mark.parametrize(("field", "value"), [("teacher", "ema"), ("context", "peer")])
def test_a_method_without_a_teacher_takes_no_teachers_fields(minimal: Path, field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{field}: found '{value}', expected .* with dapo"):
        load_config(minimal, ["objective.name=dapo", f"objective.{field}={value}"])


def test_peers_make_teacher_prompts_longer(minimal: Path) -> None:
    lengths = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=50"]
    assert load_config(minimal, lengths).max_teacher_tokens == 100
    assert load_config(minimal, [*lengths, "objective.name=sdpo"]).max_teacher_tokens == 150
    assert load_config(minimal, [*lengths, "objective.name=sdpo", "data.max_peer_tokens=120"]).max_teacher_tokens == 120


@pytest.mark.parametrize("name", ["sdpg", "opcd", "sdpo", "rlsd", "grpo"])
def test_the_clipped_ratio_distils_in_opsd_alone(minimal: Path, name: str) -> None:
    expected = rf"objective\.distill_loss: found 'clipped_ratio', expected divergence with {name}"
    with pytest.raises(ConfigError, match=expected):
        load_config(minimal, [f"objective.name={name}", "objective.distill_loss=clipped_ratio"])
    opsd = ["objective.name=opsd", "objective.distill_loss=clipped_ratio"]
    assert load_config(minimal, opsd).objective.distill_loss == "clipped_ratio"
    for field, value in (("top_k", "5"), ("divergence_clip", "0.1"), ("divergence", "reverse_kl")):
        with pytest.raises(
            ConfigError, match=rf"^objective\.{field}: found .*{value}.*with objective\.distill_loss clip"
        ):
            load_config(minimal, [*opsd, f"objective.{field}={value}"])


def test_rlsd_reads_sampled_tokens_alone(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.divergence: found 'jsd', expected sampled_token with rlsd"):
        load_config(minimal, ["objective.name=rlsd", "objective.divergence=jsd"])


METHODS: dict[str, dict[str, Any]] = {
    "sdpg": {"clip_high": 0.28, "dual_clip": 10.0, "alpha": 1e-3, "reference": "urkl", "aggregation": "token-mean"},
    "rpg": {"beta": 0, "clip_high": 0.28, "alpha": 1e-3, "reference": "urkl"},
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "alpha": 0,
        "reference": "ufkl",
        "ratio_weighted_regularizers": False,
        "aggregation": "sequence-mean",
    },
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "alpha": 0, "aggregation": "token-mean"},
    "rlsd": {
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "credit": 0.5,
        "credit_decay_steps": 50,
        "credit_clip": 0.2,
        "credit_ratio": "rollout",
        "alpha": 0,
        "aggregation": "token-mean",
    },
    "opsd": {"teacher": "initial", "divergence": "jsd", "jsd_beta": 0.5, "top_k": None, "gate": False, "beta": 1},
    "opcd": {"teacher": "current", "divergence": "reverse_kl", "top_k": None, "gate": False, "beta": 1, "alpha": 0},
    "sdpo": {
        "teacher": "ema",
        "teacher_ema": 0.05,
        "context": "peer",
        "peer_reward": 0.5,
        "strip_peer_thinking": True,
        "divergence": "jsd",
        "top_k": 100,
        "beta": 1,
        "regularizer_ratio_bound": 2.0,
        "correction": "truncate",
        "correction_level": "token",
        "correction_bound": 2.0,
        "advantage_deviation": "none",
        "aggregation": "token-mean",
    },
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sdpg", {"advantage_deviation": "sample", "ratio_weighted_regularizers": False, "gate": False}),
        ("sdpg", {"policy": "clipped_reinforce"}),
        ("rlsd", {"credit_ratio": "current", "dual_clip": None, "aggregation": "group-token-mean", "alpha": 1e-3}),
        ("opsd", {"distill_loss": "clipped_ratio", "gate": True, "clip_high": 0.2, "distill_average": "gated"}),
        ("opcd", {"teacher": "initial", "top_k": 256, "aggregation": "token-mean"}),
    ],
)
def test_published_variants_are_settings(minimal: Path, name: str, fields: dict[str, Any]) -> None:
    """docs/methods.md has them."""
    overrides = [f"objective.{field}={yaml.safe_dump(value).split()[0]}" for field, value in fields.items()]
    objective = load_config(minimal, [f"objective.name={name}", "optimizer.minibatches=8", *overrides]).objective
    assert {field: getattr(objective, field) for field in fields} == fields


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_defaults_are_its_papers_and_show(minimal: Path, tmp_path: Path, name: str) -> None:
    config = load_config(minimal, [f"objective.name={name}"])
    shown = yaml.safe_load(dump(config))["objective"]
    assert {field: shown[field] for field in METHODS[name]} == METHODS[name]
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config


def test_dapo_fills_its_steps_and_has_a_penalty_for_length(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["objective.name=dapo", "rollout.max_response_tokens=20480"])
    assert (config.selection.drop_dead, config.reward.overlong_buffer) == (True, 4096)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config
    without = load_config(minimal, ["objective.name=dapo", "selection.drop_dead=false", "reward.overlong_buffer=null"])
    assert (without.selection.drop_dead, without.reward.overlong_buffer) == (False, None)
    with pytest.raises(ConfigError, match="selection: found 3"):
        load_config(minimal, ["objective.name=dapo", "selection=3"])
    other = load_config(minimal, ["objective.name=grpo"])
    assert (other.selection.drop_dead, other.reward.overlong_buffer) == (False, None)


def test_every_method_is_one_of_these() -> None:
    assert set(METHODS) == set(DEFAULTS)


def test_what_is_set_wins_over_a_methods_default(minimal: Path) -> None:
    fields = ["name=sdpo", "top_k=null", "alpha=0.5", "gate=true", "beta_decay_steps=null"]
    objective = load_config(minimal, [f"objective.{field}" for field in fields]).objective
    assert (objective.top_k, objective.alpha, objective.gate, objective.beta_decay_steps) == (None, 0.5, True, None)
    assert objective.divergence == "jsd"


def test_an_unknown_method_is_refused_by_name(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.name: found 'ppo'.*'sdpg'"):
        load_config(minimal, ["objective.name=ppo"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "found 'No such file or directory', expected a readable YAML file"),
        ("steps: [1", "expected valid YAML"),
        ("- steps", "found 'list', expected a mapping"),
        ("", "found 'NoneType', expected a mapping"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, text: str | None, match: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("section", ["objective", "head", "rollout", "data"])
def test_a_section_without_fields_is_an_empty_one(minimal: Path, section: str) -> None:
    """As when all its lines are commented out."""
    tree = {name: value for name, value in MINIMAL.items() if name != section}
    minimal.write_text(yaml.safe_dump(tree) + f"{section}:\n  # beta: 0.5\n")
    assert load_config(minimal) == parse({**tree, section: {}})
    assert load_config(minimal, ["objective.beta=0.5"]).objective.beta == 0.5


@pytest.mark.parametrize(
    ("lines", "read"),
    [
        ("data: {train: [a.jsonl], eval:}", lambda c: c.data.eval == ()),
        ("data: {reasoning_gym: {tasks: {gcd:}}}", lambda c: c.data.reasoning_gym.tasks["gcd"].weight == 1),
        ("data: {train: [a.jsonl], reasoning_gym: {tasks:}}", lambda c: c.data.reasoning_gym.tasks == {}),
        ("data: {train: [a.jsonl], template_options:}", lambda c: c.data.template_options == {}),
    ],
)
def test_so_are_lists_and_mappings(minimal: Path, lines: str, read: Any) -> None:
    minimal.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "data"}) + lines)
    assert read(load_config(minimal))


@given(
    beta=st.floats(0, 10),
    lr=st.floats(1e-9, 1),
    template=st.text(min_size=1),
    warmup=st.none() | st.integers(0, 100),
    kind=st.sampled_from(["urkl", "ufkl", "fkl", "rkl"]),
)
def test_dump_and_parse_are_inverse(beta: float, lr: float, template: str, warmup: int | None, kind: str) -> None:
    tree = {
        **MINIMAL,
        "data": {"train": ["a.jsonl"], "context_template": template},
        "objective": {"beta": beta, "beta_warmup_steps": warmup, "reference": kind},
        "optimizer": {"lr": lr},
    }
    config = parse(tree)
    assert parse(yaml.safe_load(dump(config))) == config


def test_apply_override_makes_missing_sections() -> None:
    tree: dict[str, Any] = {"b": None}
    for override in ("a.b.c=[1, 2]", "a.d=x", "b.c=0"):
        apply_override(tree, override)
    assert plain_data(tree) == {"a": {"b": {"c": [1, 2]}, "d": "x"}, "b": {"c": 0}}
