"""The number verifier, and how a verifier is found by name."""

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.base import ExtractingVerifier
from sdpg_megatron.rewards.load import load_verifier
from sdpg_megatron.rewards.number import extract_number, last_number, number


def prompt(answer: str) -> Prompt:
    return Prompt(uid="a.jsonl:1", student_tokens=(1,), teacher_tokens=(1,), answer=answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 + 34 is 46.", "46"),
        ("12.", "12"),
        ("It is 1,234", "1234"),
        ("1,234,567.50 dollars", "1234567.5"),
        ("pick 1,2", "2"),
        ("1,2345", "2345"),
        ("from -5", "-5"),
        ("x=-5", "-5"),
        ("x = \u22125", "-5"),
        ("+7", "7"),
        ("10-5", "5"),
        ("(3)-5", "5"),
        ("10 - 5", "5"),
        ("0.50", "0.5"),
        ("about .5", "0.5"),
        ("-.5", "-0.5"),
        (r"$\boxed{-46}$", "-46"),
        ("007", "7"),
        ("about 1e-05", "0.00001"),
        ("it is 2.5E+3.", "2500"),
        ("1e16", "10000000000000000"),
        ("9" * 40, "9" * 40),
    ],
)
def test_last_number(text: str, value: str) -> None:
    assert last_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "no idea", "-", ",", "."])
def test_no_number(text: str) -> None:
    assert last_number(text) is None
    assert number(prompt("1"), text) == 0.0


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_any_decimal_is_read_back_with_and_without_commas(value: Decimal) -> None:
    assert last_number(f"first 3, then {value:f}.") == value
    assert last_number(f"= {value:,f}, they say") == value


def test_comparison_is_exact() -> None:
    assert number(prompt("12"), "12.000") == 1.0
    assert number(prompt("1,234."), "so 1234") == 1.0
    assert number(prompt("0.1"), "0.1000000000000000000001") == 0.0
    assert number(prompt("46"), "46 or 47") == 0.0
    assert number(prompt("-46"), "46") == 0.0


@pytest.mark.parametrize("answer", ["Paris", "1/2", "(3, 4)", "46 or 47"])
def test_an_answer_that_is_not_one_number_is_not_simply_wrong(answer: str) -> None:
    with pytest.raises(ValueError, match=r"of a\.jsonl:1 has (no|2) numbers, not one"):
        number(prompt(answer), "2")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("0.00001", ["0.00001", "1e-05", "It is 1e-5."], ["5", "-5", "05", "1"]),
        ("1e16", ["10000000000000000", "1E16"], ["16", "1"]),
        ("7.3", ["7.3", "7.30"], ["7.300000190734863", "7"]),
        ("$18", ["18", "$18.00", "18 dollars"], ["1", "8"]),
    ],
)
def test_right_and_wrong_numbers(answer: str, right: list[str], wrong: list[str]) -> None:
    assert [number(prompt(answer), text) for text in right] == [1.0] * len(right)
    assert [number(prompt(answer), text) for text in wrong] == [0.0] * len(wrong)


def test_load_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifier.py").write_text("def always(prompt, response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_verifier("number") == ExtractingVerifier(number, extract_number)
    assert load_verifier("own_verifier:always")(prompt("1"), "") == 1.0


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("nubmer", "did you mean 'number'"),
        ("own_verifier:", "module:function"),
        ("own_verifier:alwys", "did you mean 'always'"),
        ("own_verifier:elsewhere", "define elsewhere in"),
        ("absent_module:always", "No module named 'absent_module'"),
        ("broken_verifier:always", "ZeroDivisionError"),
    ],
)
def test_an_unusable_name_is_refused(spec: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifier.py").write_text("def always(prompt, response):\n    return 1.0\n")
    (tmp_path / "broken_verifier.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"reward\.verifier: .*{names}"):
        load_verifier(spec)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is 12.", "12"),
        ("12.0", "12"),
        ("+12.50", "12.5"),
        (".5", "0.5"),
        ("-0.50", "-0.5"),
        ("-0", "0"),
        ("0.000", "0"),
        ("1,234,000", "1234000"),
        ("\u22127", "-7"),
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_extracted_number_has_one_spelling(response: str, answer: str | None) -> None:
    assert extract_number(response) == answer


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(-99, 99, places=2))
def test_equal_numbers_are_extracted_alike(one: Decimal, other: Decimal) -> None:
    spelled = format(one, "f")
    assert extract_number(spelled) == extract_number(spelled + "0")
    assert (extract_number(spelled) == extract_number(format(other, "f"))) == (one == other)
