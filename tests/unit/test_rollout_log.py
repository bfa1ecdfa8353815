"""The responses that a run keeps for reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import RolloutLogConfig
from sdpg_megatron.errors import WriteError
from sdpg_megatron.observe.files import json_line
from sdpg_megatron.observe.rollout_log import RolloutLog
from sdpg_megatron.observe.writers import truncate_records
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from tests.completions import make_completion
from tests.disk import files_end_at


def scored(number: int, *texts: str, history: tuple[dict[str, str], ...] = ()) -> ScoredGroup:
    prompt = Prompt(f"a.jsonl:{number}", (1,), (1,), "7", question="3 + 4?", history=history)
    completions = tuple(make_completion((5, 6), (-1.0, -1.0), "stop", 2, text) for text in texts)
    rewards = tuple(float(n) for n in range(len(texts)))
    return ScoredGroup(Group(prompt, completions), rewards, tuple(r - 0.5 for r in rewards))


def rows(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"step_{step:08d}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_line_has_what_is_wanted_to_read_a_response(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts", RolloutLogConfig(groups=2))
    failed = ScoredGroup(scored(2, "x", "y").group, (0.0, 0.0), (0.0, 0.0), 1, errors=(None, "KeyError: 'k' (v.py:3)"))
    groups = [scored(1, "six\n", "seven"), failed, scored(3, "not kept", "here")]
    log.write(3, groups, [groups[0], groups[2]])
    found = rows(tmp_path / "rollouts", 3)
    common = {"step": 3, "question": "3 + 4?", "answer": "7", "tokens": 2, "finish_reason": "stop", "weight_version": 2}
    common |= {"prompt": "a.jsonl:1", "kept": True}
    assert found[:2] == [
        {**common, "sample": 0, "response": "six\n", "reward": 0.0, "advantage": -0.5},
        {**common, "sample": 1, "response": "seven", "reward": 1.0, "advantage": 0.5},
    ]
    assert [(row["prompt"], row["kept"], row.get("error")) for row in found[2:]] == [
        ("a.jsonl:2", False, None),
        ("a.jsonl:2", False, "KeyError: 'k' (v.py:3)"),
    ]


def test_messages_before_the_question_are_there_too(tmp_path: Path) -> None:
    history = ({"role": "system", "content": "Be brief."},)
    group = scored(1, "x", "y", history=history)
    RolloutLog(tmp_path, RolloutLogConfig()).write(1, [group], [group])
    assert rows(tmp_path, 1)[0]["history"] == list(history)


@pytest.mark.parametrize("text", ['π ≈ 3, "x"\n\u2028中', "\ud83d alone", "\udc80\U0001f600", "\x00\x85\\u0041"])
def test_characters_stay_readable_and_come_back(text: str) -> None:
    line = json_line({"response": text})
    assert line.count(b"\n") == 1
    assert json.loads(line.decode("utf-8")) == {"response": text}
    if "π" in text:
        assert "π ≈ 3".encode() in line


def test_without_groups_nothing_is_made(tmp_path: Path) -> None:
    RolloutLog(tmp_path / "rollouts", RolloutLogConfig(groups=0)).write(1, [scored(1, "x")], [])
    assert list(tmp_path.iterdir()) == []


def test_steps_between_are_passed_over(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, RolloutLogConfig(every=3))
    for step in range(1, 8):
        log.write(step, [scored(1, "x")], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003.jsonl", "step_00000006.jsonl"]


def test_the_folder_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    """400 KiB a step, of 1 MiB. A link that leads nowhere is as old as its name says."""
    log = RolloutLog(tmp_path, RolloutLogConfig(max_mib=1))
    (tmp_path / "step_00000000.jsonl").symlink_to("nothing")
    for step in range(1, 5):
        log.write(step, [scored(1, "x" * (200 << 10), "y" * (200 << 10))], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003.jsonl", "step_00000004.jsonl"]
    log.write(5, [scored(n, "z" * (600 << 10)) for n in (1, 2)], [])  # the second group alone is too much
    assert [row["prompt"] for row in rows(tmp_path, 5)] == ["a.jsonl:1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20


def test_a_run_that_goes_on_has_no_responses_of_lost_steps(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts", RolloutLogConfig())
    for step in (1, 2, 3):
        log.write(step, [scored(step, "x")], [])
    (tmp_path / "rollouts" / ".step_00000004.jsonl.77").write_text('{"half')
    (tmp_path / "rollouts" / "notes.jsonl").write_text("a user's")
    truncate_records(tmp_path, 2, evaluated=True)
    found = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert found == ["notes.jsonl", "step_00000001.jsonl", "step_00000002.jsonl"]
    log.write(2, [scored(9, "again")], [])
    assert [row["response"] for row in rows(tmp_path / "rollouts", 2)] == ["again"]


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts", RolloutLogConfig())
    with pytest.raises(WriteError, match=r"rollouts/step_00000001\.jsonl: could not be written"), files_end_at(40):
        log.write(1, [scored(1, "x")], [])
    assert list((tmp_path / "rollouts").iterdir()) == []
