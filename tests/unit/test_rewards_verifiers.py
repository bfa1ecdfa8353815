r"""The shipped verifiers on tricky answers, in the pool's processes; the pathological ones against its time limit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdpg_megatron.config import RewardConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rewards import answer_line
from sdpg_megatron.rewards.base import Extracting
from sdpg_megatron.rewards.load import load_verifier
from sdpg_megatron.rewards.pool import GroupRewards, VerifierPool
from tests.completions import make_completion

pytest.importorskip("math_verify", reason="needs math-verify: pip install -e '.[math]'")

PATIENCE = 120.0
"""Longer than any of these calls takes on a busy machine."""
LONG = "x" * 10**6

BOXED = [
    # fractions and decimals
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{3}{4}", r"\dfrac34", True),
    (r"\frac{3}{4}", "3/4", True),
    (r"1\frac{1}{2}", r"\frac32", True),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    (r"\frac{1}{3}", "0.33", False),
    ("0.1", "0.1000001", False),
    ("1,000", "1000", True),
    ("1000", "1{,}000", True),
    ("-7", "\u22127", True),
    ("42", "42.", True),
    ("2", "1+1", True),
    ("12", "12 or 13", False),
    # units, money, degrees
    ("12", r"12\text{ cm}", True),
    ("12", r"12 \mathrm{~m}^2", True),
    (r"\$5", "5", True),
    (r"90^\circ", "90", True),
    # percent
    (r"50\%", "0.5", True),
    (r"50\%", "50", True),
    (r"50\%", "0.05", False),
    # sets, tuples, intervals
    (r"\{1,2,3\}", r"\{3,2,1\}", True),
    (r"\{1,2\}", r"\{1,2,3\}", False),
    ("6", "1, 2, 3, 6", False),
    ("(1,2)", "(2,1)", False),
    ("[0,1)", "[0, 1)", True),
    ("[0,1)", "(0,1)", False),
    (r"(-\infty,0)\cup(1,2)", r"(1,2)\cup(-\infty,0)", True),
    ("x>3", r"(3,\infty)", True),
    # expressions and equations
    ("x^2-1", "(x-1)(x+1)", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("1", r"\sin^2 x+\cos^2 x", True),
    ("3", "x=3", True),
    ("y=2x+1", "y=1+2x", True),
    ("y=2x+1", "x=2y+1", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
    # names
    ("A", r"\text{(A)}", True),
    ("B", "A", False),
    (r"\text{even}", "even", True),
    ("even", "odd", False),
    # LaTeX around it
    ("42", r"\boxed{42}", True),
    ("42", r"\left(42\right)", True),
    ("17", r"\displaystyle \textbf{17}\,", True),
    # nothing, nonsense, too much
    ("2", "", False),
    ("2", r"\frac{1}{", False),
    ("2", "1/0", False),
    ("2", "9^9^9^9", False),
    ("2", "9" * 1999, False),
    ("2", "2" * 10**6, False),
    ("2", LONG, False),
]
"""Answer, content of the box or of the answer line, verdict."""
BOMBS = (r"9^{9^{9^{9}}}", "((10!)!)!", r"\frac{" * 20 + "1" + r"}{2}" * 20)
"""An integer power and a factorial that nothing can hold, and LaTeX that the parser does not come back from."""


def group(answer: str, responses: Sequence[str], uid: str = "a:1") -> Group:
    prompt = Prompt(uid=uid, student_tokens=(1,), teacher_tokens=(1,), answer=answer)
    return Group(prompt, tuple(make_completion((5,), (-1.0,), "stop", 0, text) for text in responses))


def wrong(pool: VerifierPool, cases: Sequence[tuple[str, str, bool]]) -> list[tuple[str, str, GroupRewards]]:
    """The cases, answer, response and verdict, on which the pool says something else."""
    scored = pool.score([group(answer, [response]) for answer, response, _ in cases])
    return [
        (answer, response[:60], rewards)
        for (answer, response, verdict), rewards in zip(cases, scored, strict=True)
        if rewards != GroupRewards((float(verdict),), 0)
    ]


@pytest.fixture(scope="module")
def math_pool() -> Iterator[VerifierPool]:
    pool = VerifierPool(RewardConfig(verifier="math", timeout=PATIENCE))
    yield pool
    pool.close()


def test_math_on_boxed_answers(math_pool: VerifierPool) -> None:
    assert wrong(math_pool, [(answer, f"So \\boxed{{{stated}}}.", verdict) for answer, stated, verdict in BOXED]) == []


def test_math_counts_the_last_box_or_the_final_answer_and_nothing_else(math_pool: VerifierPool) -> None:
    cases = [
        (r"\boxed{4} or \boxed{5}", True),
        (r"\boxed{5} or \boxed{4}", False),
        (r"\boxed{4}, the final answer is 5", False),
        (r"The final answer is $5$. I hope that helps.", True),
        ("Final answer: **5**", True),
        ("It is 5", False),
        ("5", False),
        (r"\boxed 5", True),
        (r"So $\boxed 4$.", False),
        ("", False),
        (LONG, False),
        (r"\boxed{" * 10**5, False),
        (LONG + r"\boxed{5}", True),
    ]
    assert wrong(math_pool, [("5", response, verdict) for response, verdict in cases]) == []


def test_math_verify_sets_no_alarm() -> None:
    """Its limits are alarms, which only a main thread may set; the pool's limit is the only one."""
    with ThreadPoolExecutor(1) as threads:
        assert (
            threads.submit(load_verifier("math"), Prompt("a:1", (1,), (1,), r"\frac12"), r"\boxed{0.5}").result() == 1.0
        )


def test_answer_line() -> None:
    pool = VerifierPool(RewardConfig(verifier="answer", timeout=PATIENCE))
    cases = [(answer, f"So it is.\n**Answer:** {stated}", verdict) for answer, stated, verdict in BOXED]
    cases += [
        ("34", "Answer: 34\nAnswer: 35", False),
        ("34", "Answer: $34", True),
        ("34", "34", False),
        ("34", r"\boxed{34}", False),
        ("34", f"{LONG}\nAnswer: 34", True),
        ("34", "", False),
    ]
    assert wrong(pool, cases) == []
    pool.close()


def test_answer_line_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "sdpg_megatron.rewards.symbolic", raising=False)
    plain = importlib.reload(answer_line)
    try:
        verdicts = [
            plain.answer(Prompt("a:1", (1,), (1,), answer), f"Answer: {stated}")
            for answer, stated in (("1,000", "1000.0"), ("Paris", "paris."), (r"\sqrt4", "2"))
        ]
    finally:
        monkeypatch.undo()
        importlib.reload(answer_line)
    assert verdicts == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "response", "verdict"),
    [
        ("Paris", " paris.\n", 1.0),
        ("Paris", "It is Paris", 0.0),
        ("New York", "new  york", 1.0),
        ("12", "12.0", 0.0),
        ("12", "$12$", 1.0),
        ("12", "", 0.0),
        ("12", LONG, 0.0),
    ],
)
def test_exact(answer: str, response: str, verdict: float) -> None:
    assert load_verifier("exact")(Prompt("a:1", (1,), (1,), answer), response) == verdict


def test_an_expression_that_never_ends_costs_its_own_sample() -> None:
    pool = VerifierPool(RewardConfig(verifier="math", timeout=3.0, failure_reward=-1.0, workers=len(BOMBS)))
    rest = (r"\boxed{2}", r"\boxed{3}")
    scored = pool.score([group("2", [f"\\boxed{{{bomb}}}", *rest], uid=bomb[:9]) for bomb in BOMBS])
    assert scored == [GroupRewards((-1.0, 1.0, 0.0), failures=1)] * len(BOMBS)
    pool.close()


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("math", "math_verify", "math"), ("reasoning_gym", "reasoning_gym", "gym")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("symbolic", "gym"):
        monkeypatch.delitem(sys.modules, f"sdpg_megatron.rewards.{module}", raising=False)
    with pytest.raises(ConfigError, match=rf"reward\.verifier: .*{package}.*pip install -e '\.\[{extra}\]'"):
        load_verifier(name)


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("number", "so 12.0", "12"),
        ("math", r"thus \boxed{1,234.50}", "1234.5"),
        ("math", "The final answer is 7.", "7"),
        ("math", "no idea", None),
        ("answer", "Answer: 3.0", "3"),
        ("answer", "3", None),
        ("exact", " PARIS. ", "paris"),
        ("exact", " ", None),
    ],
)
def test_answers_are_read_in_one_spelling(name: str, response: str, answer: str | None) -> None:
    verifier = load_verifier(name)
    assert isinstance(verifier, Extracting)
    assert verifier.extract(response) == answer
