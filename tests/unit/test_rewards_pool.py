"""The pool: whatever a verifier does costs its own sample and nothing else."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpg_megatron.config import RewardConfig
from sdpg_megatron.errors import ConfigError, VerifierError
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.failures import check_failures
from sdpg_megatron.rewards.pool import GroupRewards, VerifierPool
from tests.completions import make_completion

FAILURE_REWARD = -0.5
TIMEOUT = 1.0

VERIFIER = """
import os, sys, time
from pathlib import Path

def meet():
    "Returns when two processes are here."
    here = Path(__file__).parent
    (here / f"here-{os.getpid()}").touch()
    while len(list(here.glob("here-*"))) < 2:
        time.sleep(0.001)

def verify(prompt, response):
    match response:
        case "raise": raise RuntimeError("refused")
        case "hang": time.sleep(1000)
        case "die": os._exit(3)
        case "exit": sys.exit(0)
        case "nan": return float("nan")
        case "text": return "1.0"
        case "none": return None
        case "lambda": return lambda: 1.0
        case "slow": time.sleep(0.3)
        case "meet": meet()
        case "bool": return True
    return float(prompt.answer)

def extract(response):
    match response:
        case "extract nothing": return None
        case "extract badly": return 7
        case "extract never": time.sleep(1000)
    return response.upper()

def extracting(prompt, response):
    return verify(prompt, response)

extracting.extract = extract
"""


def group(uid: str, *texts: str, answer: str = "1") -> Group:
    prompt = Prompt(uid=uid, student_tokens=(1,), teacher_tokens=(1,), answer=answer, metadata={"level": 3})
    return Group(prompt, tuple(make_completion((5,), (-1.0,), "stop", 0, text) for text in texts))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
    folder = tmp_path_factory.mktemp("verifier")
    (folder / "faulty_verifier.py").write_text(VERIFIER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = RewardConfig(
            verifier="faulty_verifier:verify", timeout=TIMEOUT, failure_reward=FAILURE_REWARD, workers=2
        )
        pool = VerifierPool(config)
        yield pool
        pool.close()


def test_rewards_come_in_order_and_processes_share_the_groups(pool: VerifierPool) -> None:
    groups = [group(f"a:{i}", "x", "bool", answer=str(i)) for i in range(20)]
    assert pool.score(groups) == [GroupRewards((float(i), 1.0), 0) for i in range(20)]
    assert pool.score([]) == []


def test_a_failure_costs_its_own_sample(pool: VerifierPool, caplog: pytest.LogCaptureFixture) -> None:
    faults = ("raise", "nan", "text", "none", "lambda", "exit", "hang", "die")
    texts = [text for fault in faults for text in (fault, "x")]
    with caplog.at_level(logging.WARNING):
        scored = pool.score([group("bad", *texts), group("good", "x", "x")])
    assert scored == [GroupRewards((FAILURE_REWARD, 1.0) * len(faults), len(faults)), GroupRewards((1.0, 1.0), 0)]
    assert "8 of 18 verifier calls failed; the first, on bad: RuntimeError: refused" in caplog.text
    assert pool.score([group("after", "x")]) == [GroupRewards((1.0,), 0)]


def test_errors_are_told_completion_by_completion(pool: VerifierPool) -> None:
    (scored,) = pool.score([group("a", "x", "raise", "nan")])
    assert scored.errors[0] is None
    assert re.fullmatch(r"RuntimeError: refused \(.*/faulty_verifier\.py:\d+\)", str(scored.errors[1]))
    assert str(scored.errors[2]).startswith("ValueError: returned nan, not a finite number")
    assert pool.score([group("a", "x")])[0].errors == ()


def scored(uid: str, *errors: str | None) -> ScoredGroup:
    zeros = (0.0,) * len(errors)
    failures = sum(error is not None for error in errors)
    return ScoredGroup(group(uid, *["x"] * len(errors)), zeros, zeros, failures, errors=errors if failures else ())


@pytest.mark.parametrize(
    ("errors", "limit", "refused"),
    [
        ([("a", "b"), ("c", "d")], 0.5, True),
        ([("a", "b"), ("c", "d")], 1.0, True),
        ([("a", "b"), ("c", "d")], None, False),
        ([(None, "b"), ("c", "d")], 0.5, True),
        ([(None, "b"), ("c", "d")], 0.75, False),
        ([(None, None), (None, None)], 0.1, False),
        ([(None, "b"), (None, None)], 0.2, True),
    ],
)
def test_too_many_failures_are_an_error(
    errors: list[tuple[str | None, ...]], limit: float | None, refused: bool
) -> None:
    groups = [scored(f"f:{number}", *found) for number, found in enumerate(errors)]
    if not refused:
        check_failures("step 3", groups, limit)
        return
    first = next(f"the first on f:{n}: {error};" for n, found in enumerate(errors) for error in found if error)
    with pytest.raises(VerifierError, match=rf"reward\.verifier: step 3: found \d of 4 calls that failed, {first}"):
        check_failures("step 3", groups, limit)


def test_answers_are_extracted_where_asked_for(pool: VerifierPool) -> None:
    assert pool.score([group("a", "x")], extract=True) == [GroupRewards((1.0,), 0, None)], "it has no extract"
    texts = ("x", "extract nothing", "raise", "extract badly", "extract never", "y")
    own = VerifierPool(RewardConfig(verifier="faulty_verifier:extracting", timeout=TIMEOUT))
    try:
        assert own.score([group("a", *texts)], extract=True) == [
            GroupRewards((1.0, 1.0, 0.0, 0.0, 0.0, 1.0), 3, ("X", None, None, None, None, "Y"))
        ]
        assert own.score([group("a", "extract badly")]) == [GroupRewards((1.0,), 0)]
    finally:
        own.close()


def test_the_time_limit_is_for_one_call_and_not_for_the_group(pool: VerifierPool) -> None:
    assert pool.score([group("slow", *["slow"] * 4)]) == [GroupRewards((1.0,) * 4, 0)]


def test_groups_are_scored_at_the_same_time(pool: VerifierPool) -> None:
    assert pool.score([group("a", "meet"), group("b", "meet")]) == [GroupRewards((1.0,), 0)] * 2


def test_a_process_that_died_between_steps_is_replaced(pool: VerifierPool) -> None:
    for worker in pool._workers:
        assert worker._process is not None
        worker._process.kill()
        worker._process.join()  # until every thread of it is gone
    assert pool.score([group("a", "x"), group("b", "x")]) == [GroupRewards((1.0,), 0)] * 2


def test_a_verifier_that_only_the_parent_can_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent_only.py").write_text(
        "import multiprocessing\n"
        "assert multiprocessing.parent_process() is None\n"
        "def verify(prompt, response):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = VerifierPool(RewardConfig(verifier="parent_only:verify"))
    with pytest.raises(ConfigError, match=r"reward\.verifier"):
        pool.score([group("a", "x")])
    pool.close()
    pool.close()


def test_what_a_process_imports_is_little() -> None:
    """torch alone takes seconds and 200 MB, in each of them."""
    code = "import sys, sdpg_megatron.rewards.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_verifier_is_refused_before_any_process_starts() -> None:
    with pytest.raises(ConfigError, match="did you mean 'number'"):
        VerifierPool(RewardConfig(verifier="numbr"))
