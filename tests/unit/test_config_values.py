"""How a configuration's values are read: by the type of their field, from a file and from the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sdpg_megatron.config import MAX_SECONDS, RunConfig
from sdpg_megatron.config.aliases import FIELD_OF
from sdpg_megatron.config.field_values import without_none
from sdpg_megatron.config.load import dump, load_config, parse
from sdpg_megatron.config.yaml_reader import read_yaml
from sdpg_megatron.errors import ConfigError

TREE: dict[str, Any] = {"run_dir": "runs/x", "steps": 100, "model": {"path": "model"}, "data": {"train": ["a.jsonl"]}}
Written = Callable[[Path, str, str], RunConfig]


def in_file(folder: Path, field: str, text: str) -> RunConfig:
    """`field` set to `text`, exactly so, in a YAML file."""
    tree = {name: value for name, value in TREE.items() if name != field}
    *sections, name = field.split(".")
    lines = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    if sections:
        tree.pop(sections[0], None)
        others = {"data": "  train: [a.jsonl]\n", "model": "  path: model\n"}.get(sections[0], "")
        lines += others if name not in others else ""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree) + f"{lines}{'  ' * len(sections)}{name}: {text}\n")
    return load_config(path)


def on_command_line(folder: Path, field: str, text: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return load_config(path, [f"{field}={text}"])


BOTH = pytest.mark.parametrize("written", [in_file, on_command_line], ids=["file", "command_line"])
SURPRISES = ("20261127", "2026-11-27", "on", "no", "true", "1e5", "017", "0x10", "1:30", "1_000", ".5", ".inf", "1.0")
"""What YAML 1.1 reads as number, date or bool."""


@BOTH
@pytest.mark.parametrize("text", SURPRISES)
def test_text_and_paths_are_what_is_written(tmp_path: Path, written: Written, text: str) -> None:
    assert written(tmp_path, "run_dir", text).run_dir == Path(text)
    assert written(tmp_path, "model.path", text).model.path == Path(text)
    assert written(tmp_path, "data.train", f"[{text}]").data.train == (Path(text),)
    assert written(tmp_path, "data.system", text).data.system == text
    assert written(tmp_path, "reward.verifier", text).reward.verifier == text


@BOTH
def test_what_is_written_survives_the_record_of_a_run(tmp_path: Path, written: Written) -> None:
    for text in (*SURPRISES, '"null"', '"~"', '" a "'):
        config = written(tmp_path, "data.system", text)
        (tmp_path / "config.yaml").write_text(dump(config))
        assert load_config(tmp_path / "config.yaml") == config
        assert config.data.system == text.strip('"')


@BOTH
@pytest.mark.parametrize("text", ["null", "~", "Null", ""])
def test_null_is_no_text_and_no_path(tmp_path: Path, written: Written, text: str) -> None:
    assert written(tmp_path, "data.system", text).data.system is None
    with pytest.raises(ConfigError, match=r"^run_dir: found None, expected a path\. Fix: write one"):
        written(tmp_path, "run_dir", text)
    with pytest.raises(ConfigError, match=r"^reward\.verifier: found None, expected text\. Fix: write it"):
        written(tmp_path, "reward.verifier", text)


@pytest.mark.parametrize(
    "text", ["a #b", "# b", "a: b", "- a", "&a b", "*a", "!a", "%a", "@a", "{question} a", "[a", "a 'b'", "a=b", "a, b"]
)
def test_text_on_the_command_line_needs_no_quotes(tmp_path: Path, text: str) -> None:
    assert on_command_line(tmp_path, "data.system", text).data.system == text
    assert on_command_line(tmp_path, "run_dir", text).run_dir == Path(text)


@pytest.mark.parametrize("text", ["'a #b'", '"a #b"'])
def test_quotes_around_it_are_removed(tmp_path: Path, text: str) -> None:
    assert on_command_line(tmp_path, "data.system", text).data.system == "a #b"


@pytest.mark.parametrize(
    ("field", "text"), [("steps", "4 # four"), ("data.train", "[a] # b"), ("steps", "# 4"), ("run_dir", "'a' #b")]
)
def test_a_comment_on_the_command_line_is_refused(tmp_path: Path, field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: found .*expected a YAML value without a comment"):
        on_command_line(tmp_path, field, text)


@BOTH
def test_home_and_environment_are_expanded_in_paths(
    tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert written(tmp_path, "run_dir", "~/runs").run_dir == Path("/home/me/runs")
    assert written(tmp_path, "run_dir", "$SCRATCH/x").run_dir == Path("/scratch/x")
    assert written(tmp_path, "data.train", '["${SCRATCH}/a", "~/b"]').data.train == (
        Path("/scratch/a"),
        Path("/home/me/b"),
    )
    assert written(tmp_path, "rollout.sglang.python", "~/bin/python").rollout.sglang.python == "/home/me/bin/python"
    assert written(tmp_path, "data.system", "~/x costs $5 in $SCRATCH").data.system == "~/x costs $5 in $SCRATCH"
    with pytest.raises(ConfigError, match=r"^run_dir: found '\$NOWHERE/x', expected NOWHERE in the environment"):
        written(tmp_path, "run_dir", "$NOWHERE/x")
    with pytest.raises(ConfigError, match=r"^run_dir: found '~nobody-here/x', expected a user"):
        written(tmp_path, "run_dir", "~nobody-here/x")


@BOTH
@pytest.mark.parametrize("text", ["''", "' '", '"\\0"'])
def test_an_empty_path_is_refused(tmp_path: Path, written: Written, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: found .*, expected a path"):
        written(tmp_path, "run_dir", text)


@BOTH
@pytest.mark.parametrize(
    ("field", "text", "found"),
    [
        ("steps", "true", "True"),
        ("steps", "017", "'017'.*leading zeros"),
        ("steps", "0o17", "'0o17'.*decimal"),
        ("steps", "0x1F", "'0x1F'.*decimal"),
        ("steps", "1:30", "'1:30'.*seconds"),
        ("steps", "2.5", "2.5.*round it"),
        ("steps", "2026-11-27", "'2026-11-27'"),
        ("reward.timeout", "1:30", "'1:30'.*seconds"),
        ("reward.timeout", "true", "True"),
        ("optimizer.lr", "fast", "'fast'.*write digits"),
        ("objective.gate", "maybe", "'maybe'.*true or false"),
        ("objective.gate", "2", "2.*true or false"),
        ("model.dtype", "1", "'1'.*'float32' or 'bfloat16'"),
        ("rollout.sglang.ports", "[0]", "0"),
        ("rollout.sglang.ports", "[65536]", "65536"),
        ("seed", str(2**63), f"{2**63}.*below 2\\^63"),
        ("seed", "9" * 5000, "'9999"),
        ("steps", "2000000000", "2000000000"),
        ("reward.workers", "1000000", "1000000"),
        ("rollout.prompts_per_step", "1000000000000", "1000000000000"),
        ("rollout.group_size", "1000000", "1000000"),
        ("selection.oversample", "1e300", r"1e\+300"),
        ("rollout.sglang.bucket_mib", "1000000000", "1000000000"),
        ("reward.timeout", "1e9", "1000000000.0"),
        ("optimizer.lr", "1e39", r"1e\+39"),
        ("optimizer.clip_grad", "1e39", r"1e\+39"),
        ("objective.top_k", "1000000000", "1000000000"),
        ("data.train", "a.jsonl", r"'a.jsonl', expected a list, each item a path. Fix: write \[a.jsonl\]"),
        ("reward.clip", "[1]", r"\[1\], expected a list of 2"),
        ("objective", "sdpg", "'sdpg', expected a section of fields"),
        ("data.template_options", "x", "'x', expected a mapping"),
    ],
)
def test_other_values_are_refused_by_type(tmp_path: Path, written: Written, field: str, text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}(\[0\])?: found {found}") as caught:
        written(tmp_path, field, text)
    assert "expected" in str(caught.value) and "Fix: " in str(caught.value)


@BOTH
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "1_000", 1000),
        ("steps", "1e3", 1000),
        ("steps", "'70'", 70),
        ("optimizer.lr", "1e-5", 1e-5),
        ("optimizer.lr", "1.0e-05", 1e-5),
        ("optimizer.lr", ".5", 0.5),
        ("objective.gate", "no", False),
        ("objective.gate", "on", True),
        ("objective.gate", "0", False),
        ("objective.dual_clip", "null", None),
        ("reward.clip", "[0, 1]", (0.0, 1.0)),
        ("seed", str(2**63 - 1), 2**63 - 1),
        (
            "data.template_options",
            "{a: 1, b: on, c: true, d: [017, null]}",
            {"a": 1, "b": "on", "c": True, "d": ["017", None]},
        ),
    ],
)
def test_numbers_and_switches_are_read(tmp_path: Path, written: Written, field: str, text: str, value: object) -> None:
    found: Any = written(tmp_path, field, text)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        kind = without_none(info.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def nested(field: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = {name: dict(part) if isinstance(part, dict) else part for name, part in TREE.items()}
    place = tree
    *sections, name = field.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    return tree


FLOATS = [(field, kind) for field, kind in leaves(RunConfig) if kind is float or float in get_args(kind)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("field", "kind"), FLOATS, ids=[field for field, _ in FLOATS])
def test_no_number_is_infinite_or_nan(field: str, kind: Any, value: float) -> None:
    assert len(FLOATS) > 50
    given = value if kind is float else [0.0] * (len(get_args(kind)) - 1) + [value]
    with pytest.raises(ConfigError, match=rf"^{field}(\[1\])?: found -?(inf|nan), expected a finite number"):
        parse(nested(field, given))


@pytest.mark.parametrize(
    "field", [field for field, kind in FLOATS if "timeout" in field or field.startswith("watchdog")]
)
def test_times_have_a_bound(field: str) -> None:
    parse(nested(field, MAX_SECONDS))
    with pytest.raises(ConfigError, match=rf"^{field}: found .* at most 2000000\.0"):
        parse(nested(field, 2 * MAX_SECONDS))


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_a_failure_reward_has_the_bound_of_rewards(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.failure_reward: found .*1e\+300, expected .*1e\+100"):
        parse(nested("reward.failure_reward", value))


@pytest.mark.parametrize("field", [field for field, kind in leaves(RunConfig) if kind is int])
def test_no_whole_number_takes_a_bool(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: found True, expected a whole number"):
        parse(nested(field, True))


def test_repeated_keys_are_all_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: x\nsteps: 2\nrollout:\n  group_size: 2\n  group_size: 4\nsteps: 3\nrollout: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [
        "3 errors",
        f"  {path}:5: found 'group_size' again, after line 4, expected each key once. "
        "Fix: merge it with the 'group_size' of line 4, or remove one",
        f"  {path}:6: found 'steps' again, after line 2, expected each key once. "
        "Fix: merge it with the 'steps' of line 2, or remove one",
        f"  {path}:7: found 'rollout' again, after line 3, expected each key once. "
        "Fix: merge it with the 'rollout' of line 3, or remove one",
    ]


BOMB = "a: &a [x, x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in pairwise("abcdefghijk"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("steps: [1", "run.yaml:1: found .*expected valid YAML"),
        ("steps:\n\t- 1", r"run.yaml:2: found .*\\t.*Fix: .*indent with spaces"),
        ("a: &a\n  b: *a\n", "run.yaml:1: found 'a recursive alias"),
        (BOMB, "a recursive alias, or one that expands to very many values"),
        ("steps: !!set {1}", "run.yaml:1: found the tag .*Fix: remove the tag"),
        ("[a]: 1", "run.yaml:1: found a list or mapping as a key"),
        ("<<: 3", r"run.yaml:1: found a merge key \(<<\) with another value"),
        ("a: \x07", "expected valid YAML. Fix: remove that character"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(tmp_path / "run.yaml")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(TREE)
        + "optimizer: &o {lr: 1e-5, eps: 1e-7}\nalarms:\n  <<: [{window: 3}, {window: 4, gate: off}]\n"
    )
    alarms = load_config(tmp_path / "run.yaml").alarms
    assert (alarms.window, alarms.gate) == (3, False)


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("lr", "did you mean 'optimizer.lr'"),
        ("learning_rate", "use optimizer.lr"),
        ("optimizer.learning-rate", "use optimizer.lr"),
        ("group_size", "did you mean 'rollout.group_size'"),
        ("rollout.n", "use rollout.group_size"),
        ("objective.group_size", "did you mean 'rollout.group_size'"),
        ("tensor_model_parallel_size", "use parallel.tensor"),
        ("tp", "use parallel.tensor"),
        ("bf16", r"use model.dtype \(bfloat16\)"),
        ("wandb", "remove it: metrics are always written"),
        ("objective.top_p", "did you mean 'rollout.top_p' or 'eval.top_p'"),
        ("rollout.top_k", "remove it: responses are sampled from the whole vocabulary"),
        ("eval.n", "use eval.samples"),
        ("batch_size", "use rollout.prompts_per_step"),
        ("rollout.groupsize", "did you mean 'group_size'"),
        ("trainer", "known here: run_dir"),
        ("xy", "known here: run_dir"),
    ],
)
def test_a_key_is_explained_by_what_it_means(key: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: found .*, expected a known key\. Fix: {fix}"):
        parse(nested(key, 1))


def test_keys_of_another_framework_are_explained_one_by_one() -> None:
    foreign = {"rollout": {"n": 8, "name": "vllm"}, "actor": {"optim": {"lr": 1e-6}}}
    with pytest.raises(ConfigError) as caught:
        parse({**TREE, "actor_rollout_ref": foreign, "trainer": {"total_epochs": 2}})
    message = str(caught.value)
    assert "actor_rollout_ref.rollout.n: found 'n', expected a known key. Fix: use rollout.group_size" in message
    assert "actor_rollout_ref.actor.optim.lr: found 'lr'" in message and "'optimizer.lr'" in message
    assert "trainer.total_epochs: found 'total_epochs', expected a known key. Fix: set steps" in message


@settings(max_examples=60)
@given(
    st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(str.strip),
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(SURPRISES), st.floats(allow_nan=False)
    ),
)
def test_a_dumped_configuration_is_read_back_the_same(path: str, value: Any) -> None:
    config = parse({**TREE, "data": {"train": [Path(path)], "template_options": {"x": value}}})
    for found in (Path(path), Path("~none/$HOME"), Path("$$x")):
        moved = config.model_copy(update={"run_dir": found})
        assert parse(read_yaml(dump(moved), "x")) == moved


@pytest.mark.parametrize(
    ("text", "path"), [("a$$b", "a$b"), ("./~a", "~a"), ("$$HOME", "$HOME"), ("a#b", "a#b"), ("a # b", "a")]
)
def test_paths_can_have_every_character(tmp_path: Path, text: str, path: str) -> None:
    assert in_file(tmp_path, "run_dir", text).run_dir == Path(path)


@pytest.mark.parametrize("field", ["run_dir", "data.context_template", "rollout.sglang.python"])
def test_a_name_that_yaml_would_cut_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: found 'a #2', .*Fix: put quotes around text that has a #"):
        in_file(tmp_path, field, "a #2")
    assert in_file(tmp_path, "steps", "70 #2").steps == 70


def test_every_counterpart_is_a_field() -> None:
    fields = {field for field, _ in leaves(RunConfig)}
    named = {word for target in FIELD_OF.values() for word in target.split() if "." in word or word in fields}
    assert named <= fields
    assert all(target.split()[0] in fields for target in FIELD_OF.values())


def test_all_that_is_wrong_is_shown_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError) as fields:
        load_config(path, ["steps=0", "tp=2", "optimizer.lr=fast", "rollout.group_size=1"])
    assert [line.split(":")[0].strip() for line in str(fields.value).splitlines()] == [
        "4 errors", "steps", "rollout.group_size", "optimizer.lr", "tp"
    ]  # fmt: skip
    with pytest.raises(ConfigError) as combined:
        load_config(path, ["optimizer.warmup_steps=101", "optimizer.min_lr=1", "eval.k=[9]", "parallel.sequence=true"])
    assert [line.split(":")[0].strip() for line in str(combined.value).splitlines()] == [
        "4 errors", "optimizer.warmup_steps", "optimizer.min_lr", "parallel.sequence", "eval.k"
    ]  # fmt: skip
    with pytest.raises(ConfigError) as overrides:
        load_config(path, ["data.train=[a", "nothing", "steps=4 # x"])
    assert str(overrides.value).startswith("3 errors")


@pytest.mark.parametrize("override", ["=3", ".=3", "a..b=3", "objective.=3", "steps"])
def test_an_override_without_a_key_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: found .*expected key=value"):
        on_command_line(tmp_path, *override.split("=", 1)) if override != "steps" else parse_override(tmp_path)


def parse_override(folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return load_config(path, ["steps"])
