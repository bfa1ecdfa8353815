r"""Kinds of answers with right and with wrong responses, through the verifiers math and answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.equality import decide, plain, spelling

symbolic = pytest.importorskip("sdpg_megatron.rewards.symbolic", reason="needs math-verify: pip install -e '.[math]'")
line = pytest.importorskip("sdpg_megatron.rewards.answer_line")

TRUE = ["True", "true", "TRUE", r"\text{True}", r"\textbf{true}", r"\mathrm{True}", "True.", "**True**", "$True$"]
FALSE = [text.replace("rue", "alse").replace("T", "F").replace("t", "f", 1) for text in ("True", "true")]
FALSE += ["FALSE", r"\text{False}", r"\textbf{false}", r"\mathrm{False}", "False.", "**False**"]
YES, NO = ["Yes", "yes", r"\text{yes}", "YES."], ["No", "no", r"\text{No}", "NO"]
NEITHER = ["1", "0", "maybe", "True or False", "x", r"\text{unknown}", "12"]

KINDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "true": (["True", "true", r"\text{True}"], [*TRUE, "yes"], [*FALSE, *NO, *NEITHER]),
    "false": (["False", "false", r"\text{False}"], [*FALSE, "no"], [*TRUE, *YES, *NEITHER]),
    "yes": (["Yes", "yes"], [*YES, "True"], [*NO, *FALSE, *NEITHER]),
    "no": (["No", "no", r"\text{no}"], [*NO, "False"], [*YES, *TRUE, *NEITHER, "on"]),
    "option": (
        ["C", "(C)", r"\text{C}", r"\textbf{(C)}"],
        ["C", "(C)", "c", r"\text{(C)}", r"\textbf{(C)}\ 12", r"\textbf{(C) } 12", "C. 12", "C) 12", "C: twelve",
         "Option C", r"\text{Option (C)}", "C."],
        ["D", "(D)", "D. 12", "D. C", "CD", "C, D", "C or D", "C) 12 or D) 13", "12", "A", "x"],
    ),
    "option with its text": (["C. 12", "(C) 12"], ["C", "(C)", "C. 12", "12"], ["D", "C. 13", "D. 12", "13"]),
    "number, stated with an option": (["12"], ["C. 12", "(C) 12", r"\textbf{(C)}\ 12"], ["C. 13", "C", "12. C"]),
    "degrees": (
        ["90°", r"90^\circ", r"90^{\circ}", "90 degrees"],
        ["90", "90°", r"90^\circ", r"90^{\circ}", r"90\degree", "90 degrees", r"90\text{ degrees}", "90.0°"],
        ["9", "91°", r"9^\circ", "90 radians", r"\frac{\pi}{2}", "°"],
    ),
    "degrees without their unit": (["90"], ["90", "90°", r"90^\circ", "90 degrees"], ["9", "91°", r"9^\circ"]),
    "percent": (
        [r"50\%", "50%", "50 percent"],
        [r"50\%", "50%", "50 percent", "50", "0.5", r"\frac{1}{2}", r"50\text{ percent}"],
        ["5%", "0.05", r"0.5\%", "500%", "51", "%"],
    ),
    "ratio": (["0.5", r"\frac12"], ["50%", r"50\%", "0.5", "1/2", "½"], ["0.5%", "5%", "50", "2"]),
    "count that may be a percentage": (["50"], ["50%", "50"], ["0.5%", "5%", "0.5"]),
    "thousands": (
        ["1234567", "1,234,567"],
        ["1234567", "1,234,567", "1{,}234{,}567", r"1\,234\,567", "1 234 567", r"1\ 234\ 567", "1\u202f234\u202f567",
         r"1~234~567", "1,234,567.0", r"1.234567 \times 10^6", "1.234567e6"],
        ["1,234,568", "1,234", "567", "1.234567", "12,34,567"],
    ),
    "small numbers": (
        ["0.00001", "1e-05", "1E-5", r"10^{-5}"],
        ["0.00001", "1e-5", "1e-05", "1E-05", r"10^{-5}", r"1 \times 10^{-5}", r"1\cdot10^{-5}"],
        ["5", "-5", "05", "1", "0.0001", "1e5", "1e-6", "0"],
    ),
    "large numbers": (["10000000000000000"], ["1e16", "1E+16", r"10^{16}"], ["16", "1", "1e15", "10"]),
    "fractions": (
        [r"\frac{3}{4}", "3/4", r"\dfrac34", "¾"],
        [r"\frac{3}{4}", r"\frac34", r"\tfrac{3}{4}", "3/4", "0.75", "¾", r"\frac{6}{8}", "75%"],
        [r"\frac{4}{3}", "3", "4", "4/3", "0.7", "34", "3/4/1/2"],
    ),
    "mixed numbers": (
        ["1.5", r"1\frac{1}{2}", "1 1/2"],
        ["3/2", r"1\frac12", r"1\ \frac{1}{2}", "1½", "1 1/2", "1.5"],
        ["11/2", "1/2", "5.5", "½", "12"],
    ),
    "negative fractions": (["-1/2"], [r"-\frac12", r"\frac{-1}{2}", "-½", "-0.5", "\u22121/2"], ["1/2", "½", "0.5"]),
    "text": (
        ["even", r"\text{even}"],
        ["even", "Even", r"\text{even}", r"\textbf{Even}", r"\mathrm{even}", "even."],
        ["odd", "never", "neve", "evens", "not even", r"\text{odd}", "2"],
    ),
    "words": (
        ["no solution"],
        ["no solution", "No Solution", r"\text{no solution}"],
        ["solution", "solution no", "no solutions", "0"],
    ),
    "anagrams": (["listen"], ["Listen", r"\text{listen}"], ["silent", "enlist", r"\text{tinsel}"]),
    "products": (["abc", "xy"], [], ["a", "ab", "12"]),
    "lengths": (
        ["12 cm", r"12\text{ cm}", "12 centimeters"],
        ["12", "12 cm", "12cm", r"12\,\mathrm{cm}", "12 centimetres", r"12\text{ cm}"],
        ["12 m", "12 mm", "12 cm^2", "13 cm", "12 inches", "cm", "1.2", "0.12 m"],
    ),
    "areas": (
        [r"12\text{ cm}^2"],
        ["12 cm^2", r"12 \mathrm{~cm}^2", r"12\text{ cm}^{2}", "12 cm²", "12 square cm", "12"],
        ["12 cm", "12 cm^3", r"12 \text{ m}^2", "122"],
    ),
    "speeds": (
        ["5 m/s"],
        ["5 m/s", r"5\text{ m/s}", "5 meters per second", "5"],
        ["5 km/h", "5 m", "5 m/s^2", "6 m/s"],
    ),
    "money": (
        [r"\$5", "$5", "5 dollars"],
        ["$5", r"\$5", r"\$5.00", "5", "5 dollars", r"5\text{ dollars}"],
        ["5 cents", "$6", "50", "5 euros"],
    ),
    "powers": (["x^2", "x²"], ["x^2", "x²", "x^{2}", r"x\cdot x"], ["x2", "2x", "x", "x^3"]),
}  # fmt: skip
"""By kind: spellings of the answer, right responses, wrong responses."""


def prompt(answer: str) -> Prompt:
    return Prompt("a:1", (1,), (1,), answer)


@pytest.mark.parametrize("kind", KINDS)
def test_right_and_wrong_responses_to_each_kind_of_answer(kind: str) -> None:
    answers, right, wrong = KINDS[kind]
    found = [
        (answer, stated, verdict)
        for answer in answers
        for verdict, responses in ((1.0, [*right, answer]), (0.0, wrong))
        for stated in responses
        if symbolic.math(prompt(answer), f"So \\boxed{{{stated}}}.") != verdict
        or line.answer(prompt(answer), f"So.\n\nAnswer: {stated}") != verdict
    ]
    assert found == []


@pytest.mark.parametrize("kind", ["true", "false", "yes", "no", "option", "degrees", "text", "anagrams", "lengths"])
def test_these_kinds_are_decided_without_algebra(kind: str) -> None:
    answers, right, wrong = KINDS[kind]
    for answer in answers:
        assert all(decide(answer, stated) is True for stated in right)
        assert not any(decide(answer, stated) for stated in wrong)


@pytest.mark.parametrize(
    ("stated", "spelled"),
    [
        (r"\text{True}", "true"), ("yes", "true"), ("NO", "false"), (r"\textbf{(C)}\ 12", "C"), ("c", "C"),
        ("90°", "90"), (r"90^\circ", "90"), ("1 234.50", "1234.5"), ("1e-05", "0.00001"), ("12 centimeters", "12 cm"),
        (r"12\text{ m}^2", "12 m2"), ("5 meters per second", "5 m s"), (r"\frac12", r"\frac12"), ("-½", "-1/2"),
    ],
)  # fmt: skip
def test_majorities_count_one_spelling(stated: str, spelled: str) -> None:
    assert spelling(stated) == spelled


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_compared(answer: str, stated: str) -> None:
    assert decide(answer, stated) in (True, False, None)
    assert decide(answer, answer) is bool(plain(answer))
    assert isinstance(spelling(stated), str)


@pytest.mark.parametrize(
    "text",
    ["1" + " " * 2000, "(" * 2000, r"\text{" * 300, "1" + ".1" * 999, "A " * 999, "1/" * 999, "a-" * 999, "½" * 999],
)
def test_long_texts_are_compared_in_little_time(text: str) -> None:
    """Exponential backtracking would never end; a stated answer has at most 2,000 characters."""
    assert decide(text, "12") in (False, None)
    assert decide("12", text) in (False, None)
    spelling(text)
