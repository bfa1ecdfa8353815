r"""Answers as text: where a response or a solution states one, and when two are the same.

Everything here takes time linear in the text's length, whatever the text is.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

MAX_LENGTH = 2000
"""Longest answer in characters; what is longer is not taken for one."""

_BARE_BOX = r"(?=[-+\u2212]?\.?[0-9]|\\(?:[dt]?frac|sqrt|pi|text|math|\$)|[A-Za-z]\s*(?:\$|\\\)))"
_BOX_PARTS = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{|{_BARE_BOX})|\\.|[{{}}]", re.DOTALL)
_END_OF_MATHEMATICS = re.compile(r"(?<!\\)\$|\\\)|\\\]|\n")
_LINE = re.compile(r"^[\s#>*_`-]*(?:the\s+)?(?:final\s+)?answer[*_`]*\s*(?:is\b\s*:?|:)(.*)$", re.IGNORECASE)
_STATEMENT = re.compile(r"\bfinal\s+answer[*_`]*\s*(?:is\b\s*:?|:)(.*)", re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?",
)
_MATHEMATICS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_MARKUP = "*_` \t\r\n"
_LAYERS = 4
_NEXT_SENTENCE = re.compile(r"\.\s+(?=[A-Z])")
_DISPLAY = re.compile(
    r"(?P<fence>```)[^\n`]*\n|(?P<dollars>\$\$)|(?P<bracket>\\\[)"
    r"|\\begin\s*\{(?P<name>(?:equation|align|gather|displaymath)\*?)\}"
)
"""The beginning of a value that is set off on lines of its own."""
_SUPERSCRIPTS = str.maketrans(
    {digit: f"^{value}" for value, digit in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")}
)
_BLANKS = str.maketrans(dict.fromkeys("\u00a0\u2007\u2009\u202f~", " "))
_GROUPED = re.compile(r"([-+]?[0-9]{1,3}(?: [0-9]{3})+)((?:\.[0-9]*)?)")
_VULGAR = re.compile("([0-9]?)([\u00bc-\u00be\u2150-\u215e\u2189])")


class WrittenFloat(float):
    """A float that keeps the decimal text that it was read from, such as JSON's 7.30 or 1e-05."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[WrittenFloat], tuple[str]]:
        return WrittenFloat, (self.text,)


def decimal_text(value: int | float | Decimal) -> str:
    """Write a number in decimal digits, without an exponent.

    Digits are kept as they were read (`WrittenFloat`, Decimal). Other floats get the shortest text that reads back as
    the same float, whole ones no decimal point: 42.0 is "42", 1e-05 is "0.00001".

    Raises:
        ValueError: NaN, infinity, or a number of more than `MAX_LENGTH` digits.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(value.text if isinstance(value, WrittenFloat) else str(value))
    if isinstance(value, WrittenFloat):
        number = Decimal(value.text)
    elif isinstance(value, float):
        number = Decimal(int(value)) if value.is_integer() else Decimal(repr(float(value)))
    else:
        number = Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > MAX_LENGTH:
        raise ValueError(str(number))
    return f"{number:f}"


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` or ``\fbox{...}`` holds, the inner one where boxes nest; None for no box.

    A box that is not closed, as in a response that was cut off, is none. ``\boxed 42`` without braces holds what
    follows up to the end of the formula, or outside of one to the next blank.
    """
    open_at: list[int | None] = []  # where the content of each open brace starts; None where it is no box
    last: tuple[int, int] | None = None
    for part in _BOX_PARTS.finditer(text):
        match part.group():
            case "{":
                open_at.append(None)
            case "}":
                start = open_at.pop() if open_at else None
                if start is not None and (last is None or start > last[0]):
                    last = start, part.start()
            case opening if opening.endswith("{") and len(opening) > 2:
                open_at.append(part.end())
            case bare if bare.startswith((r"\boxed", r"\fbox")):
                last = part.end(), -1
    if last is None:
        return None
    return _bounded(_bare_box(text, last[0]) if last[1] < 0 else text[slice(*last)])


def _bare_box(text: str, start: int) -> str:
    """The content of a box without braces that starts at `start`."""
    rest = text[start : start + MAX_LENGTH]
    end = _END_OF_MATHEMATICS.search(rest)
    if end is None or end.group() == "\n":
        return rest.split(maxsplit=1)[0].rstrip(".,;:")
    return rest[: end.start()].strip()


def last_line(text: str) -> str | None:
    """The value of the last line of the form ``Answer: value``; where the line ends there, that of the lines below it.

    Markdown around it, and "The final answer is value", are understood. Below, the value is a line, displayed
    mathematics or fenced code.
    """
    lines = text.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if found := _LINE.match(lines[number]):
            value = found.group(1).strip(_MARKUP)
            if value in ("$$", r"\[") or not stripped(value):
                below = "\n".join([value if value in ("$$", r"\[") else "", *lines[number + 1 :]])
                return _bounded(stripped(_first_value(below)))
            return _bounded(stripped(value))
    return None


def _first_value(text: str) -> str:
    """The displayed formula or fenced code that `text` begins with, else its first line that is not blank."""
    text = text.lstrip()
    opening = _DISPLAY.match(text)
    if opening is None:
        return text.partition("\n")[0]
    parts = opening.groupdict()
    closing = parts["fence"] or parts["dollars"] or (r"\]" if parts["bracket"] else rf"\end{{{parts['name']}}}")
    end = text.find(closing, opening.end())
    return text[opening.end() : end] if end >= 0 else ""


def last_statement(text: str) -> str | None:
    """What follows the last "final answer is" or "final answer:" in its line and sentence."""
    statements = _STATEMENT.findall(text)
    return _bounded(stripped(_NEXT_SENTENCE.split(statements[-1], maxsplit=1)[0])) if statements else None


def stripped(text: str) -> str:
    r"""`text` without what is only around the answer: Markdown, dollar signs, ``\( \)``, a box, a full stop."""
    text = text.strip(_MARKUP)
    if (box := last_boxed(text)) is not None:
        return stripped(box)
    for _ in range(_LAYERS):
        text = text.strip(_MARKUP)
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opening, closing in _MATHEMATICS:
            inner = text[len(opening) : -len(closing)]
            if text == opening + inner + closing and opening not in inner and closing not in inner:
                text = inner
    return text


def as_number(text: str) -> Decimal | None:
    """`text` as a number, exactly, if it is one and nothing else.

    Thousands may carry commas or blanks, dollars their sign, and ``1e-05`` is understood.
    """
    text = stripped(text).replace("\u2212", "-").replace("{,}", ",").replace(r"\!", "").replace(r"\,", "")
    text = re.sub(r"^([-+]?)\\?\$", r"\1", text).replace("\\ ", " ").translate(_BLANKS).strip()
    if grouped := _GROUPED.fullmatch(text):
        text = grouped[1].replace(" ", "") + grouped[2]
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def normalised(text: str) -> str:
    """`text` for an exact comparison: one Unicode form and case, single blanks, nothing around it."""
    return " ".join(stripped(unicodedata.normalize("NFKC", plain_digits(text))).casefold().split())


def plain_digits(text: str) -> str:
    """`text` with superscripts as ``^2`` and vulgar fractions as ``1/2``: Unicode's compatibility form makes x2 of the
    one and 11/2 of 1 and a half."""
    if text.isascii():
        return text
    return _VULGAR.sub(_as_quotient, text.translate(_SUPERSCRIPTS))


def _as_quotient(found: re.Match[str]) -> str:
    quotient = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {quotient}" if found[1] else quotient


def canonical(answer: str) -> str:
    """One spelling for each answer: plain digits for a number ("1,234.50" is "1234.5"), else without what is around it.

    LaTeX within an answer stays as it is.
    """
    number = as_number(answer)
    if number is None:
        return stripped(answer)
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits in ("-0", "") else digits


def same(answer: str, stated: str) -> bool:
    """Whether two answers are equal as numbers or, where they are none, as normalised text."""
    return normalised(canonical(answer)) == normalised(canonical(stated))


def _bounded(answer: str) -> str | None:
    return answer if answer.strip() and len(answer) <= MAX_LENGTH else None
