"""Where a call of `train` begins: what may change between the calls of a run, and where a branch starts."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdpg_megatron.checkpoint.branch import BranchRequest, BranchStart
from sdpg_megatron.checkpoint.changes import Change
from sdpg_megatron.checkpoint.state import MANIFEST, BranchPoint, RecordedChange, RunState, checkpoint_name
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import dump, load_config
from sdpg_megatron.errors import CheckpointError, ConfigError
from sdpg_megatron.observe.summary import Summary, write_summary
from sdpg_megatron.train.start import Start, find_start

TREE: Mapping[str, Any] = {
    "steps": 8,
    "model": {"path": "model"},
    "data": {"train": ["a.jsonl"]},
    "objective": {"beta_warmup_steps": 0, "beta_decay_steps": 0},
    "optimizer": {"warmup_steps": 0},
}


def config_in(run_dir: Path, *overrides: str) -> RunConfig:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / "run.yaml"
    path.write_text(yaml.safe_dump({**TREE, "run_dir": str(run_dir)}))
    return load_config(path, overrides)


def run_in(run_dir: Path, *steps: int, **fields: Any) -> RunConfig:
    """A run with manifests of these steps, and nothing else."""
    config = config_in(run_dir)
    for step in steps or (3,):
        folder = run_dir / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        state = RunState(
            step=step, cursor={}, seconds=1.0, baseline={}, evaluated=True,
            config=config.model_dump(mode="json"), model="m", data="d",
        )  # fmt: skip
        dataclasses.replace(state, **fields).write(folder / MANIFEST)
    (run_dir / "config.yaml").write_text(dump(config))
    return config


def finish(run_dir: Path, steps: int) -> None:
    scores: Any = dict.fromkeys(("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"))
    write_summary(run_dir, Summary(**scores, steps=steps, seconds=1.0))


def start(config: RunConfig, branch: str | None = None, *, model: str = "m", data: str = "d", **options: Any) -> Start:
    request = None if branch is None else BranchRequest.parse(branch, **options)
    return find_start(config, request, lambda: model, data)


# --- a run that goes on


def test_a_new_run_begins_at_its_first_step(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    assert find_start(config, None, lambda: pytest.fail("the model was read for nothing"), "d") == Start()


def test_a_run_goes_on_where_nothing_has_changed(tmp_path: Path) -> None:
    found = start(run_in(tmp_path / "run", 2, 3))
    assert found.state is not None and found.state.step == 3
    assert (found.changes, found.recorded, found.same_data, found.done) == ((), (), True, False)


@pytest.mark.parametrize(
    "override",
    [
        "steps=9", "steps=3", "optimizer.lr=1e-3", "optimizer.schedule=cosine", "optimizer.beta2=0.9",
        "optimizer.minibatches=2", "objective.beta=0.5", "objective.name=opcd", "objective.teacher=ema",
        "objective.alpha=0", "rollout.group_size=4", "rollout.temperature=0.5", "rollout.prompts_per_step=4",
        "reward.verifier=math", "selection.drop_dead=true", "model.dtype=bfloat16", "model.router_z_loss=0.1",
        "parallel.tensor=2", "head.chunk_rows=4", "eval.samples=2", "alarms.window=3", "checkpoint.keep=3",
        "watchdog.silence=9", "rollout.engine=sglang", "rollout.sglang.servers=2", "model.path=elsewhere",
        "data.train=[b.jsonl]", "data.eval=[c.jsonl]", "data.max_prompt_tokens=9", "data.question_key=q",
    ],
)  # fmt: skip
def test_what_does_not_define_the_past_may_change_and_is_recorded(tmp_path: Path, override: str) -> None:
    run_in(tmp_path / "run", changes=(RecordedChange(1, "optimizer.lr", 1.0, 2.0),))
    found = start(config_in(tmp_path / "run", override))
    fields = [change.field for change in found.changes]
    assert override.split("=")[0] in fields
    assert [change.field for change in found.recorded] == ["optimizer.lr", *fields]
    assert all(change.step == 3 for change in found.recorded[1:])


@pytest.mark.parametrize("override", ["seed=1", "data.shuffle=false", "data.reasoning_gym.held_out=1"])
def test_the_order_of_the_data_may_not(tmp_path: Path, override: str) -> None:
    run_in(tmp_path / "run")
    config = config_in(tmp_path / "run")
    section, _, value = override.rpartition("=")
    changed = config.model_dump(mode="json")
    *path, name = section.split(".")
    place: Any = changed
    for part in path:
        place = place[part]
    place[name] = yaml.safe_load(value)
    with pytest.raises(
        ConfigError, match=rf"^{section}: found .*, as the run was started\n.*branch with --branch-from"
    ):
        start(RunConfig.model_validate(changed))


def test_nor_may_the_form_of_the_optimizers_state(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^optimizer.distributed: found False, expected True.*\n.*exported model"):
        start(config_in(tmp_path / "run", "optimizer.distributed=false"))
    with pytest.raises(ConfigError, match=r"^optimizer.distributed"):
        start(config_in(tmp_path / "branch", "optimizer.distributed=false"), str(tmp_path / "run"))
    whole = config_in(tmp_path / "run", "optimizer.distributed=false").model_dump(mode="json")
    run_in(tmp_path / "other", config=whole)
    with pytest.raises(ConfigError, match=r"^model.dtype: found 'bfloat16', expected 'float32'"):
        start(config_in(tmp_path / "other", "optimizer.distributed=false", "model.dtype=bfloat16"))


def test_all_that_differs_is_shown_at_once(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        start(config_in(tmp_path / "run", "seed=1", "data.shuffle=false", "steps=9", "parallel.tensor=2"))
    assert str(caught.value).splitlines() == [
        "data.shuffle: found False, expected True, as the run was started",
        "  seed: found 1, expected 0, as the run was started",
        "  may change: parallel.tensor: 1 -> 2; steps: 8 -> 9",
        f"  Fix: restore these settings, or branch with --branch-from {tmp_path / 'run'}@3 and a new run_dir",
    ]
    assert caught.value.field == "data.shuffle"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_another_model_and_other_prompts_are_refused(tmp_path: Path) -> None:
    config = run_in(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"^model\.path: found 'n', expected the model .* \(m\).* folder, which was model"
    ):
        start(config, model="n")
    with pytest.raises(
        ConfigError, match=r"^data: found 'e', expected the prompts that the run was started with \(d\)\."
    ):
        start(config, data="e")
    changed = config_in(tmp_path / "run", "data.context_template=solution", "steps=9")
    with pytest.raises(ConfigError, match=r"with \(d\); changed: data\.context_template: 'answer' -> 'solution'\. Fix"):
        start(changed, data="e")


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^steps: found 2, expected at least 3, which are done\. Fix: .*run@STEP"):
        start(config_in(tmp_path / "run", "steps=2"))


def test_a_finished_run_goes_on_with_more_steps_alone(tmp_path: Path) -> None:
    run_in(tmp_path / "run", 8)
    finish(tmp_path / "run", 8)
    assert start(config_in(tmp_path / "run", "parallel.tensor=2")).done
    assert not start(config_in(tmp_path / "run", "steps=9", "optimizer.lr=1e-3")).done
    with pytest.raises(ConfigError, match=r"^optimizer.lr: found 0.001, expected 1e-06.*\n.*raise steps, now 8"):
        start(config_in(tmp_path / "run", "optimizer.lr=1e-3"))


def test_a_field_that_is_new_to_the_package_had_its_default(tmp_path: Path) -> None:
    tree = config_in(tmp_path / "run").model_dump(mode="json")
    del tree["selection"], tree["objective"]["beta"]
    run_in(tmp_path / "run", config={**tree, "removed": 1})
    found = start(config_in(tmp_path / "run", "selection.drop_dead=true"))
    assert found.changes == (Change("removed", 1, None), Change("selection.drop_dead", False, True))


@pytest.mark.parametrize(
    ("override", "anew"),
    [
        ("steps=9", False), ("rollout.engine=sglang", False), ("reward.workers=2", False), ("optimizer.lr=1", False),
        ("rollout.group_size=4", True), ("rollout.temperature=0.5", True), ("reward.verifier=math", True),
    ],
)  # fmt: skip
def test_responses_of_other_settings_are_generated_anew(tmp_path: Path, override: str, anew: bool) -> None:
    run_in(tmp_path / "run")
    assert start(config_in(tmp_path / "run", override)).generates_anew == anew


@pytest.mark.parametrize(
    ("overrides", "moved"),
    [
        ([], None),
        (["optimizer.schedule=linear"], "optimizer.schedule"),
        (["objective.beta_decay_steps=4"], "objective.beta_decay_steps"),
        (["objective.beta_warmup_steps=null"], "objective.beta_warmup_steps"),
        (["objective.beta_decay_steps=null", "objective.beta=0"], None),
    ],
)
def test_schedules_that_move_with_the_end_are_named(tmp_path: Path, overrides: list[str], moved: str | None) -> None:
    run_in(tmp_path / "run", config=config_in(tmp_path / "run", *overrides).model_dump(mode="json"))
    config = config_in(tmp_path / "run", "steps=9", *overrides)
    lines = start(config).describe(config)
    assert lines[:2] == ["continuing after step 3", "changed since the checkpoint: steps: 8 -> 9"]
    assert lines[2:] == ([f"schedules that depend on the run's end, now optimizer step 9: {moved}"] if moved else [])


# --- a branch


def test_a_branch_starts_from_the_newest_checkpoint_or_the_one_that_is_named(tmp_path: Path) -> None:
    run_in(tmp_path / "run", 2, 3, changes=(RecordedChange(1, "optimizer.lr", 1.0, 2.0),))
    for name, step in (("run", 3), ("run@2", 2), ("run@00000002", 2)):
        config = config_in(tmp_path / "branch", "objective.beta=0.5")
        found = start(config, str(tmp_path / name))
        point = BranchPoint(str(tmp_path / "run"), step)
        assert found.checkpoint == tmp_path / "run" / "checkpoints" / checkpoint_name(step)
        assert (found.branch, found.branches) == (BranchStart(point, False), (point,))
        assert [str(change) for change in found.recorded] == [
            "step 1: optimizer.lr: 1.0 -> 2.0", f"step {step}: objective.beta: 0.001 -> 0.5"
        ]  # fmt: skip
        assert found.describe(config)[0] == f"a branch of {point}, with its data cursor and its reference"


def test_a_branch_of_a_branch_has_both_ancestors(tmp_path: Path) -> None:
    first = BranchPoint("/runs/first", 1)
    run_in(tmp_path / "run", branches=(first,))
    found = start(config_in(tmp_path / "branch"), str(tmp_path / "run"))
    assert found.branches == (first, BranchPoint(str(tmp_path / "run"), 3))


@pytest.mark.parametrize(
    ("overrides", "data", "same"),
    [([], "d", True), (["rollout.group_size=4"], "d", True), ([], "e", False), (["seed=1"], "d", False)],
)
def test_a_branch_keeps_the_cursor_of_the_same_data(
    tmp_path: Path, overrides: list[str], data: str, same: bool
) -> None:
    run_in(tmp_path / "run")
    found = start(config_in(tmp_path / "branch", *overrides), str(tmp_path / "run"), data=data)
    assert found.same_data == same
    assert ("prompts" in [change.field for change in found.recorded]) == (data != "d")


def test_another_reference_has_to_be_asked_for(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    config = config_in(tmp_path / "branch")
    with pytest.raises(
        ConfigError, match=r"^model\.path: found 'n', expected .* which is the reference\. .*--new-reference"
    ):
        start(config, str(tmp_path / "run"), model="n")
    found = start(config, str(tmp_path / "run"), model="n", new_reference=True)
    assert found.recorded == (RecordedChange(3, "reference", "m", "n"),)
    assert found.describe(config)[0].endswith("a new reference")


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    run_in(tmp_path / "run", 2, 3)
    with pytest.raises(
        ConfigError, match=r"^--branch-from: found '.*run@7', expected one of its checkpoints: @2, @3\."
    ):
        start(config_in(tmp_path / "branch"), f"{tmp_path / 'run'}@7")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^--branch-from: found '.*empty', expected a run that has a complete check"):
        start(config_in(tmp_path / "branch"), str(tmp_path / "empty"))
    with pytest.raises(
        ConfigError, match=r"^--branch-from: found '.*', expected the folder of a run.*no folder nowhere"
    ):
        start(config_in(tmp_path / "branch"), str(tmp_path / "nowhere" / "run@3"))


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path: Path) -> None:
    run_in(tmp_path / "run@2", 3)
    assert BranchRequest.parse(str(tmp_path / "run@2")) == BranchRequest(tmp_path / "run@2", None)
    assert BranchRequest.parse(f"{tmp_path / 'run@2'}@3") == BranchRequest(tmp_path / "run@2", 3)


def test_a_branch_does_not_write_into_the_other_run(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in ("run", "run/inside/deeper", "link", "link/inside", "x/../run"):
        config = config_in(tmp_path / "new").model_copy(update={"run_dir": tmp_path / folder})
        with pytest.raises(ConfigError, match=r"^run_dir: found .*, expected a folder outside of"):
            start(config, str(tmp_path / "run"))


def test_a_branch_has_steps_left(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^steps: found 3, expected more than the 3 steps"):
        start(config_in(tmp_path / "branch", "steps=3"), str(tmp_path / "run"))


def test_a_branch_that_has_no_checkpoint_yet_starts_where_it_did(tmp_path: Path) -> None:
    """Also when the other run has gone on, and without the option."""
    run_in(tmp_path / "run", 2)
    config = config_in(tmp_path / "branch")
    first = start(config, str(tmp_path / "run")).branch
    assert first is not None
    config.run_dir.mkdir()
    first.write(config.run_dir)
    (config.run_dir / "config.yaml").write_text(dump(config))
    run_in(tmp_path / "later", 5)
    (tmp_path / "later" / "checkpoints" / checkpoint_name(5)).rename(
        tmp_path / "run" / "checkpoints" / checkpoint_name(5)
    )
    for name in (None, str(tmp_path / "run"), f"{tmp_path / 'run'}@2"):
        assert start(config, name).branch == first
    with pytest.raises(ConfigError, match=r"^--branch-from: found '.*run@5', expected .*run@2, which the run in"):
        start(config, f"{tmp_path / 'run'}@5")
    with pytest.raises(ConfigError, match=r"^--branch-from: found '.*with a new reference', expected .*run@2, which"):
        start(config, str(tmp_path / "run"), new_reference=True)


def test_a_branch_that_has_a_checkpoint_goes_on_from_it(tmp_path: Path) -> None:
    run_in(tmp_path / "run", 2)
    point = BranchPoint(str(tmp_path / "run"), 2)
    config = run_in(tmp_path / "branch", 4, branches=(point,))
    BranchStart(point, False).write(config.run_dir)
    for name in (None, str(tmp_path / "run")):
        found = start(config, name)
        assert found.branch is None and found.state is not None
        assert (found.state.step, found.branches) == (4, (point,))


def test_another_run_is_not_taken_for_the_branch(tmp_path: Path) -> None:
    run_in(tmp_path / "run")
    for steps in ((4,), ()):
        folder = tmp_path / f"other{len(steps)}"
        if steps:
            config = run_in(folder, *steps)
        else:  # it has begun, and has saved nothing
            config = config_in(folder)
            folder.mkdir()
            (folder / "config.yaml").write_text(dump(config))
        with pytest.raises(ConfigError, match=r"^run_dir: found .* \(another run\)', expected a new folder"):
            start(config, str(tmp_path / "run"))


def test_damage_of_the_other_run_is_named_with_what_else_there_is(tmp_path: Path) -> None:
    run_in(tmp_path / "run", 2, 3)
    (tmp_path / "run" / "checkpoints" / checkpoint_name(3) / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json: found .*branch from another of its checkpoints \(@2\)"):
        start(config_in(tmp_path / "branch"), str(tmp_path / "run"))
    config = config_in(tmp_path / "branch")
    config.run_dir.mkdir()
    (config.run_dir / "branch.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"branch\.json: found .*expected a branch point"):
        start(config, str(tmp_path / "run"))
