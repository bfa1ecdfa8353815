r"""Extract answers from text and compare them as text.

All functions take linear time in the length of any text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal

MAX_LENGTH = 2000
"""Maximum length of an answer in characters; longer text is not an answer."""

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
"""Opening of displayed mathematics or fenced code."""
_SUPERSCRIPTS = str.maketrans(
    {digit: f"^{value}" for value, digit in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")}
)
_BLANKS = str.maketrans(dict.fromkeys("\u00a0\u2007\u2009\u202f~", " "))
_GROUPED = re.compile(r"([-+]?[0-9]{1,3}(?: [0-9]{3})+)((?:\.[0-9]*)?)")
_VULGAR = re.compile("([0-9]?)([\u00bc-\u00be\u2150-\u215e\u2189])")


class WrittenFloat(float):
    """Float that keeps its source text, such as 7.30 or 1e-05 in JSON."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[WrittenFloat], tuple[str]]:
        return WrittenFloat, (self.text,)


def decimal_text(value: int | float | Decimal) -> str:
    """Format a number in decimal digits, without an exponent.

    `WrittenFloat` and Decimal keep their digits. Other floats get the shortest text that parses to the same float;
    integral floats have no decimal point: 42.0 is "42", 1e-05 is "0.00001".

    Raises:
        ValueError: NaN, infinity, or a number with more than `MAX_LENGTH` digits.
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
    r"""Content of the last complete ``\boxed{...}`` or ``\fbox{...}``; None without one.

    The inner one of nested boxes counts. An unclosed box, as in a truncated response, does not. The content of
    ``\boxed 42`` without braces ends at the end of the formula, or outside a formula at the next whitespace.
    """
    open_starts: list[int | None] = []  # content start of each open brace; None if not a box
    last: tuple[int, int] | None = None
    for part in _BOX_PARTS.finditer(text):
        match part.group():
            case "{":
                open_starts.append(None)
            case "}":
                start = open_starts.pop() if open_starts else None
                if start is not None and (last is None or start > last[0]):
                    last = start, part.start()
            case opening if opening.endswith("{") and len(opening) > 2:
                open_starts.append(part.end())
            case bare if bare.startswith((r"\boxed", r"\fbox")):
                last = part.end(), -1
    if last is None:
        return None
    return _bounded(_bare_box(text, last[0]) if last[1] < 0 else text[slice(*last)])


def _bare_box(text: str, start: int) -> str:
    """Content of a box without braces, from `start`."""
    rest = text[start : start + MAX_LENGTH]
    end = _END_OF_MATHEMATICS.search(rest)
    if end is None or end.group() == "\n":
        return rest.split(maxsplit=1)[0].rstrip(".,;:")
    return rest[: end.start()].strip()


def last_line(text: str) -> str | None:
    """Value of the last line ``Answer: value``; if the line has no value, the value below it.

    Surrounding Markdown and the form "The final answer is value" are accepted. The value below is one line, displayed
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
    """Displayed formula or fenced code at the start of `text`, else its first nonblank line."""
    text = text.lstrip()
    opening = _DISPLAY.match(text)
    if opening is None:
        return text.partition("\n")[0]
    parts = opening.groupdict()
    closing = parts["fence"] or parts["dollars"] or (r"\]" if parts["bracket"] else rf"\end{{{parts['name']}}}")
    end = text.find(closing, opening.end())
    return text[opening.end() : end] if end >= 0 else ""


def last_statement(text: str) -> str | None:
    """Text after the last "final answer is" or "final answer:", up to the end of its line or sentence."""
    statements = _STATEMENT.findall(text)
    return _bounded(stripped(_NEXT_SENTENCE.split(statements[-1], maxsplit=1)[0])) if statements else None


def stripped(text: str) -> str:
    r"""Remove markup around an answer: Markdown, dollar signs, ``\( \)``, a box, a final full stop."""
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
    """Exact number if `text` is nothing but a number, else None.

    Thousands separators (commas or spaces), dollar signs and exponents (``1e-05``) are accepted.
    """
    text = stripped(text).replace("\u2212", "-").replace("{,}", ",").replace(r"\!", "").replace(r"\,", "")
    text = re.sub(r"^([-+]?)\\?\$", r"\1", text).replace("\\ ", " ").translate(_BLANKS).strip()
    if grouped := _GROUPED.fullmatch(text):
        text = grouped[1].replace(" ", "") + grouped[2]
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def normalized(text: str) -> str:
    """Normalize text for comparison: Unicode form, case, whitespace and surrounding markup."""
    return " ".join(stripped(unicodedata.normalize("NFKC", plain_digits(text))).casefold().split())


def plain_digits(text: str) -> str:
    """Replace superscripts by ``^2`` and vulgar fractions by ``1/2``.

    Unicode compatibility normalization would make x2 of the former and 11/2 of one and a half.
    """
    if text.isascii():
        return text
    return _VULGAR.sub(_as_quotient, text.translate(_SUPERSCRIPTS))


def _as_quotient(found: re.Match[str]) -> str:
    quotient = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {quotient}" if found[1] else quotient


def canonical(answer: str) -> str:
    """Canonical spelling of an answer: plain digits for a number ("1,234.50" is "1234.5"), else `stripped` text.

    LaTeX within an answer is unchanged.
    """
    number = as_number(answer)
    if number is None:
        return stripped(answer)
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits in ("-0", "") else digits


def same(answer: str, stated: str) -> bool:
    """True if two answers are equal as numbers, or else as normalized text."""
    return normalized(canonical(answer)) == normalized(canonical(stated))


def _bounded(answer: str) -> str | None:
    return answer if answer.strip() and len(answer) <= MAX_LENGTH else None
