"""Reading answers out of text."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.answers import (
    MAX_LENGTH,
    WrittenFloat,
    as_number,
    canonical,
    decimal_text,
    last_boxed,
    last_line,
    last_statement,
    normalized,
    same,
    stripped,
)

LONG = 10**6


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {3} \fbox{4}", "4"),
        (r"{ } } \boxed{5}", "5"),
        (r"{{ \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed 5", "5"),
        (r"So $\boxed 42$.", "42"),
        (r"\(\boxed -3.5 \) and more", "-3.5"),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed\text{even}$", r"\text{even}"),
        (r"$\boxed C$", "C"),
        (r"\boxed 42, as was asked", "42"),
        (r"\boxed{4}, or \boxed 5", "5"),
        (r"\boxed 4, or \boxed{5}", "5"),
        (r"It is \boxed{5}. I used \boxed as asked, not \fbox or \boxedx.", "5"),
        (r"\boxed", None),
        (r"\boxed{" + "1" * (MAX_LENGTH + 1) + "}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: 34", "34"),
        ("thus 3\nanswer: 34.\n", "34"),
        ("**Answer:** $34$", "34"),
        ("**Final Answer:**\n\n34", "34"),
        ("### The final answer is: \\(\\frac12\\)", r"\frac12"),
        ("Answer: \\boxed{34}", "34"),
        ("Answer: 1\nAnswer: 2\nthat is all", "2"),
        ("Answer:\n\\[\n34\n\\]", "34"),
        ("Answer:\n\n$$\n34\n$$\nDone.", "34"),
        ("Answer: $$\n34\n$$", "34"),
        ("Answer: \\[\n34\n\\]", "34"),
        ("**Answer:**\n\\[ 34 \\]", "34"),
        ("Answer:\n$$ \\boxed{34} $$", "34"),
        ("Answer:\n```\n34\n```", "34"),
        ("Answer:\n```text\n34\n```\n", "34"),
        ("Answer:\n\\begin{equation*}\n34\n\\end{equation*}", "34"),
        ("Answer:\n\n34\n\n35", "34"),
        ("Answer:\n```\n34", None),
        ("Answer:\n\\[\n34", None),
        ("My answer: 34", None),
        ("the answer: 34 is wrong\nno", "34 is wrong"),
        ("answer 34", None),
        ("Answer:", None),
        ("Answer: " + "1" * LONG, None),
        ("Answer: 3\nAnswer: " + "1" * LONG, None),
        ("", None),
    ],
)
def test_last_line(text: str, value: str | None) -> None:
    assert last_line(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So the final answer is $5$. I hope it is right.", "5"),
        ("Final answer: 1.5 cm", "1.5 cm"),
        ("the final answer is 1\nno, the final answer is 2", "2"),
        ("the answer is 1", None),
    ],
)
def test_last_statement(text: str, value: str | None) -> None:
    assert last_statement(text) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", "1234.50"),
        ("1{,}234", "1234"),
        ("-0", "0"),
        (".5", "0.5"),
        ("5.", "5"),
        (r"\$5", "5"),
        ("-$5", "-5"),
        ("\u22127", "-7"),
        ("$ 12 $", "12"),
        ("007", "7"),
        ("1 234 567.5", "1234567.5"),
        ("1\u202f234", "1234"),
        (r"1\ 234", "1234"),
        ("1e-05", "0.00001"),
        ("-2.5E+3", "-2500"),
        ("1e9999", None),
        ("1 23", None),
        ("e5", None),
        ("1,23", None),
        ("12 cm", None),
        ("50%", None),
        ("1/2", None),
        ("12 or 13", None),
        ("-", None),
        (".", None),
        ("", None),
    ],
)
def test_as_number(text: str, number: str | None) -> None:
    assert as_number(text) == (None if number is None else Decimal(number))


def test_canonical_spellings() -> None:
    assert [canonical(text) for text in ("027", "27.0", "1,234", "-0.0", "100", "0.10", r"$\frac{1}{2}$.")] == [
        "27", "27", "1234", "0", "100", "0.1", r"\frac{1}{2}"
    ]  # fmt: skip


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_a_canonical_number_keeps_its_value_and_stays_as_it_is(value: Decimal) -> None:
    text = canonical(f"{value:,f}")
    assert Decimal(text) == value
    assert canonical(text) == text


@pytest.mark.parametrize(("one", "other"), [("x\u00b2", "x2"), ("1\u00bd", "11/2"), ("1\u00bd", "11\u20442")])
def test_compatibility_forms_that_mean_something_else_are_not_the_same(one: str, other: str) -> None:
    assert normalized(one) != normalized(other) and not same(one, other)
    assert same("x\u00b2", "x^2") and same("\u00bd", "1/2")


@pytest.mark.parametrize(
    "value",
    [*map(WrittenFloat, ("1e400", "nan", "-inf", "1e-99999")), *map(Decimal, ("NaN", "-Infinity", "1e99999"))],
)
def test_a_number_without_decimal_digits_is_an_error(value: float | Decimal) -> None:
    with pytest.raises(ValueError, match=r"(?i)nan|inf|1e"):
        decimal_text(value)


def test_same() -> None:
    assert same("12", "12.0") and same("Paris.", " paris") and same("1,000", "$1000$")
    assert not same("12", "12.01") and not same("AB", "A B")
    assert normalized("\uff21  b\n") == "a b"


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * (LONG // 7), "{" * LONG, "}" * LONG, "$" * LONG, "*." * (LONG // 2), "Answer:\n" * (LONG // 8),
     "final answer is " * (LONG // 16), "9" * LONG, "1," * (LONG // 2), "final" + " " * LONG, "the " * (LONG // 4),
     " " * LONG + "x", "answer" + " " * LONG],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_long_texts_are_read_in_linear_time(text: str) -> None:
    """A quadratic reader would take minutes for each."""
    assert last_boxed(text) is None
    assert last_line(text) is None
    last_statement(text), stripped(text), as_number(text), normalized(text)
