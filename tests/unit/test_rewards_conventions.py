"""Verifiers as people have them for this trainer, verl and slime: what is accepted, and what is refused at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sdpg_megatron.config import MAX_REWARD, RewardConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.conventions import RewardTypeError, as_reward
from sdpg_megatron.rewards.load import find_verifier, load_verifier
from sdpg_megatron.rewards.pool import VerifierPool, check_verifier
from tests.e2e.runs import environment
from tests.unit.test_rewards_pool import group

VERIFIERS = """
import asyncio, multiprocessing, subprocess, sys, time
import numpy

def own(prompt, response): return float(response == prompt.answer)
def swapped(response, prompt): return float(response == prompt.answer)
def renamed(question, completion): return float(completion == question.answer)
def positional_only(prompt, response, /): return 1.0
def defaulted(prompt, response, strict=True, *, scale=1.0): return scale
def swapped_positional_only(response, prompt, /): return float(response == prompt.answer)
def plain(response, ground_truth): return float(response == ground_truth)
def answer_first(answer, response): return float(response == answer)
def labelled(response, label): return float(response == label)
def truth_first(ground_truth, prediction, strict=True): return float(prediction == ground_truth)
def outputs(model_output, ground_truth, /): return float(model_output == ground_truth)
def completed(completion, answer): return float(completion == answer)
def optional(response, reference_answer=None): return float(response == reference_answer)
def by_keyword(*, prediction, gold): return float(prediction == gold)
def scorer(solution_str, answer=None): return float(solution_str == answer)
def informed(response, target, extra_info=None): return float(response == target and extra_info == {"index": 3})
def anything(*args, **kwargs): return float(args[1] == args[0].answer)
async def coroutine(prompt, response):
    await asyncio.sleep(0)
    return float(response == prompt.answer)

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str}
def verl_seen(data_source, solution_str, ground_truth, extra_info=None):
    return float((data_source, solution_str, ground_truth, extra_info) == ("gsm8k", "7", "7", {"index": 3}))
def verl_scorer(solution_str, ground_truth, method="strict"): return float(solution_str == ground_truth)
def verl_keywords(solution_str, **kwargs): return float(kwargs["ground_truth"] == solution_str)
async def verl_async(data_source, solution_str, ground_truth, extra_info, **kwargs):
    return {"reward_extra_info": 1, "reward": numpy.float32(solution_str == ground_truth)}

def slime(args, sample, **kwargs): return int(sample.response == sample.label)
async def slime_async(args, sample): return {"score": int(sample.response == sample.label), "pred": sample.response}
def slime_seen(args, sample, **kwargs): return float((sample.prompt, sample.metadata["level"]) == ("3 + 4?", 3))

class Class:
    def __call__(self, prompt, response): return float(response == prompt.answer)
    def extract(self, response): return response
class Async:
    async def __call__(self, prompt, response): return float(response == prompt.answer)
instance = Class()

def a_child(queue): queue.put(1.0)
def own_process(prompt, response):
    queue = multiprocessing.Queue()
    child = multiprocessing.Process(target=a_child, args=(queue,))
    child.start()
    return queue.get(timeout=60)
def leaves_child(prompt, response):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(prompt.answer, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000 if response == "hang" else 0)
    return 1.0

def response_first(response, strict): return 0.0
def response_then_option(response, strict=True): return 0.0
def prompt_second(text, prompt): return 0.0
def two_answers(solution, answer): return 0.0
def no_response(text, ground_truth): return 0.0
def question_text(prompt, response, ground_truth): return 0.0
def unheard(prompt, response, ground_truth=None): return 0.0
def unclear(prompt, reference_response): return 0.0
def half_slime(sample, response): return 0.0
def never_right(question, response): return 0.0
def wants_a_box(prompt, response): return float(response == "\\\\boxed{" + prompt.answer + "}")
def three(prompt, response, extra): return 1.0
def one(response): return 1.0
def verl_more(data_source, solution_str, ground_truth, extra_info, reward_router_address): return 1.0
def verl_batch(data_sources, solution_strs, ground_truths, extra_infos): return [1.0]
def slime_batch(args, samples): return [1.0]
def trl(prompts, completions, **kwargs): return [1.0]
def needs_more(sample, args, queue): return 1.0
class Built:
    def __init__(self, model): ...
    def __call__(self, prompt, response): return 1.0
class Uncallable: ...
class Broken:
    def __init__(self): raise RuntimeError("no such model")
    def __call__(self, prompt, response): return 1.0

def nothing(prompt, response): pass
def a_list(prompt, response): return [1.0]
def text(prompt, response): return "1.0"
def keyless(prompt, response): return {"accuracy": 1.0}
def boom(prompt, response): raise ValueError("bad\\nthing")
"""
METADATA = {"data_source": "gsm8k", "extra_info": {"index": 3}, "level": 3}
PROMPT = Prompt("train.jsonl:7", (1,), (1,), "7", question="3 + 4?", metadata=METADATA)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "theirs.py").write_text(VERIFIERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.mark.parametrize(
    "name",
    [
        "own", "swapped", "renamed", "positional_only", "defaulted", "anything", "coroutine", "verl", "verl_seen",
        "swapped_positional_only", "plain", "answer_first", "labelled", "truth_first", "outputs", "completed",
        "optional", "by_keyword", "scorer", "informed",
        "verl_scorer", "verl_keywords", "verl_async", "slime", "slime_async", "slime_seen", "Class", "Async",
        "instance",
    ],
)  # fmt: skip
def test_what_can_be_meant_is_called_so(name: str) -> None:
    assert as_reward(load_verifier(f"theirs:{name}")(PROMPT, "7")) == 1.0
    if name not in ("positional_only", "defaulted", "slime_seen"):
        assert as_reward(load_verifier(f"theirs:{name}")(PROMPT, "8")) == 0.0


def test_without_the_columns_verl_is_given_the_data_file_and_all_the_others() -> None:
    from theirs import verl_seen  # type: ignore[import-not-found]

    seen: list[object] = []
    find = find_verifier("theirs:verl_seen").convention
    seen = list(find(Prompt("a.jsonl:3", (), (), "7", metadata={"level": 3}), "8")[1].values())
    assert seen == ["a.jsonl", "8", "7", {"level": 3}]
    assert verl_seen(*seen) == 0.0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("three", r"theirs:three\(prompt, response, extra\)"),
        ("one", r"theirs:one\(response\)"),
        ("response_first", r"\(response, strict\)"),
        ("response_then_option", r"\(response, strict=True\)"),
        ("prompt_second", r"\(text, prompt\)"),
        ("two_answers", r"\(solution, answer\)"),
        ("no_response", r"\(text, ground_truth\)"),
        ("question_text", r"\(prompt, response, ground_truth\)"),
        ("unheard", r"\(prompt, response, ground_truth=None\)"),
        ("unclear", r"\(prompt, reference_response\)"),
        ("half_slime", r"\(sample, response\)"),
        ("verl_more", "reward_router_address"),
        ("verl_batch", "solution_strs"),
        ("slime_batch", "samples"),
        ("trl", "completions"),
        ("needs_more", "queue"),
        ("Built", "a class without __call__, or with constructor arguments"),
        ("Uncallable", "a class without __call__"),
    ],
)
def test_another_signature_is_refused_before_any_process_starts(name: str, found: str) -> None:
    expected = r"expected f\(prompt, response\), f\(response, ground_truth\), verl's f\(data_source, .*slime's"
    with pytest.raises(ConfigError, match=rf"^reward\.verifier: found 'theirs:{name}.*{found}|{found}.*{expected}"):
        VerifierPool(RewardConfig(verifier=f"theirs:{name}"))


def scalars() -> list[tuple[object, float]]:
    import numpy
    import torch

    return [
        (1, 1.0), (True, 1.0), (0.25, 0.25), (numpy.float32(0.5), 0.5), (numpy.int64(2), 2.0), (numpy.True_, 1.0),
        (numpy.array(0.5), 0.5), (numpy.array([0.5]), 0.5), (torch.tensor(0.5), 0.5), (torch.tensor([True]), 1.0),
        ({"score": 0.5, "acc": True}, 0.5), ({"reward": numpy.False_}, 0.0), ({"score": 0, "reward": 1}, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "reward"), scalars())
def test_what_is_a_number_is_a_reward(value: object, reward: float) -> None:
    found = as_reward(value)
    assert found == reward
    assert type(found) is float


@pytest.mark.parametrize("value", [None, "1.0", [1.0], (1.0, "right"), {}, {"acc": 1.0}, {"score": None}, object])
def test_what_is_no_number_is_none(value: object) -> None:
    with pytest.raises(RewardTypeError, match=r"returned .*, not a number, a bool, a scalar"):
        as_reward(value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e101, 10**400, {"score": float("inf")}])
def test_what_is_not_finite_is_another_error(value: object) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        as_reward(value)


def test_a_group_of_the_largest_rewards_has_advantages() -> None:
    assert group_advantages([MAX_REWARD, MAX_REWARD, -MAX_REWARD]) == pytest.approx((0.5**0.5, 0.5**0.5, -(2**0.5)))


@pytest.mark.parametrize("name", ["own_process", "coroutine", "Class"])
def test_a_check_goes_through_a_process(name: str) -> None:
    check = check_verifier(RewardConfig(verifier=f"theirs:{name}", timeout=60.0), PROMPT)
    assert (check.reward, check.error) == (1.0, None)
    assert str(check) == f"reward.verifier theirs:{name} gave 1 to the response '7' to train.jsonl:7"


def test_a_check_tells_of_a_verifier_that_never_rewards_the_own_answer() -> None:
    check = check_verifier(RewardConfig(verifier="theirs:never_right"), PROMPT)
    assert (check.reward, check.error, check.unrewarded) == (0.0, None, True)
    assert "gave 0 to the response '7' to train.jsonl:7, which is the reference answer" in str(check)
    check = check_verifier(RewardConfig(verifier="theirs:wants_a_box"), PROMPT)
    assert (check.response, check.reward, check.unrewarded) == ("\\boxed{7}", 1.0, False)


def test_a_check_tells_an_error_with_its_place(folder: Path) -> None:
    check = check_verifier(RewardConfig(verifier="theirs:boom"), PROMPT)
    line = VERIFIERS[: VERIFIERS.index("def boom")].count("\n") + 1
    assert check.reward is None
    assert str(check).endswith(f"to train.jsonl:7: ValueError: bad thing ({folder}/theirs.py:{line})")


@pytest.mark.parametrize("name", ["nothing", "a_list", "text", "keyless", "Broken"])
def test_a_check_refuses_what_never_gives_a_reward(name: str) -> None:
    said = (
        "no such model" if name == "Broken" else rf"theirs:{name}, which returned .*expected a verifier that returns a"
    )
    with pytest.raises(ConfigError, match=rf"reward\.verifier: .*{said}"):
        check_verifier(RewardConfig(verifier=f"theirs:{name}"), PROMPT)


@pytest.mark.parametrize("response", ["hang", "leave"])
def test_no_process_of_a_verifier_outlives_the_pool(tmp_path: Path, response: str) -> None:
    pool = VerifierPool(RewardConfig(verifier="theirs:leaves_child", timeout=2.0))
    (scored,) = pool.score([group("a", response, answer=str(tmp_path / "pid"))])
    assert scored.failures == (response == "hang")
    pool.close()
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


FORGOTTEN = """
if __name__ == "__main__":
    from sdpg_megatron.config import RewardConfig
    from sdpg_megatron.rewards.pool import VerifierPool
    VerifierPool(RewardConfig(verifier="beside:verify"))
"""


def test_a_program_ends_that_forgot_its_pool_and_finds_a_module_of_its_working_directory(tmp_path: Path) -> None:
    """As from an installed script, whose own folder is on the search path and not the working directory."""
    (tmp_path / "beside.py").write_text("def verify(prompt, response): return 1.0\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "script.py"
    script.write_text(FORGOTTEN)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment(), timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
