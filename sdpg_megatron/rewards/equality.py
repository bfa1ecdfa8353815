r"""Compare a stated answer with the reference answer by text rules, before any computer algebra.

Computer algebra reads words as products of letters: "listen" equals "silent", and "False" is accepted in every spelling
while "True" is not. The rules cover words, booleans, option letters, percentages, units and plain numbers, and leave
everything else undecided.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from sdpg_megatron.answers import as_number, canonical, normalized, plain_digits, stripped

BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
UNITS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "mL": "ml milliliter milliliters millilitre millilitres",
    "L": "liter liters litre litres",
    "s": "sec second seconds",
    "min": "minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years",
    "mph": "",
    "degree": "degrees deg",
    "radian": "radians rad",
    "celsius": "degrees celsius;degree celsius;degree C;degrees C",
    "fahrenheit": "degrees fahrenheit;degree fahrenheit;degree F;degrees F",
    "dollar": "dollars USD",
    "cent": "cents",
    "euro": "euros EUR",
}
"""Unit -> other names. Names of less than three characters are case-sensitive."""

_MACRO = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(r"\\(?:displaystyle|left|right)(?![A-Za-z])|\\!")
_BLANK = re.compile(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])")
_DEGREE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])|\u00b0")
_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])(?:[.):]|$))\s*(.*)", re.IGNORECASE | re.DOTALL)
_SEVERAL = re.compile(r"\b(?:or|and)\b|\(?\b[A-J][).:]")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-]+[^\W\d_]+)*")
_PERCENT = re.compile(r"(.+?)\s*(?:\\?%|percent)", re.IGNORECASE | re.DOTALL)
_QUOTIENT = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<whole>[0-9]+)\s*(?=[\\ ])\s*)?"
    r"(?:(?P<n1>[0-9]+)\s*/\s*(?P<d1>[0-9]+)|\\[dt]?frac\s*"
    r"(?:\{\s*(?P<n2>[-+]?[0-9]+)\s*\}|(?P<n3>[0-9]))\s*(?:\{\s*(?P<d2>[0-9]+)\s*\}|(?P<d3>[0-9])))"
)
_MEASURE = re.compile(r"(?P<value>[^A-Za-z]*?[0-9.)}])(?P<blank>\s*)(?P<unit>[A-Za-z][A-Za-z0-9^{}/. ]*)", re.DOTALL)
_UNIT = re.compile(
    r"(?:(?P<power>square|sq\.?|cubic|cu\.?)\s+)?(?P<name>[A-Za-z ]+?)\s*(?:\^?\s*\{?\s*(?P<exponent>[23])\s*\}?)?"
)
_POWERS = {"sq": "2", "square": "2", "cu": "3", "cubic": "3"}

Unit = tuple[tuple[str, str], ...]
"""Name and exponent of each factor; factors after the first are divisors: m/s is (("m", "1"), ("s", "1"))."""


def _names() -> dict[str, str]:
    found: dict[str, str] = {}
    for unit, others in UNITS.items():
        aliases = others.split(";") if ";" in others else others.split()
        found |= {alias if len(alias) < 3 else alias.casefold(): unit for alias in (unit, *aliases)}
    return found


_NAMES = _names()


def decide(answer: str, stated: str) -> bool | None:
    """True if `stated` equals `answer`, False if not, None if text rules cannot decide.

    Plain numbers are compared exactly. Units are compared if both have one. 50% equals 50 and 0.5; for the answer 0.5,
    50% is right and 0.5% is wrong. An option letter may be followed by its text: "C. 12" states C and 12.
    """
    expected, found = plain(answer), plain(stated)
    if not found:
        return False
    if normalized(expected) == normalized(found):
        return True
    booleans = _boolean(expected), _boolean(found)
    if booleans != (None, None):
        return booleans[0] == booleans[1]
    for rule in (_same_choice, _same_percentage, _same_measure):
        if (verdict := rule(expected, found)) is not None:
            return verdict
    return False if _is_words(expected) and _is_words(found) else None


def spelling(stated: str) -> str:
    """Canonical spelling of an answer, for majority votes."""
    text = plain(stated)
    if (boolean := _boolean(text)) is not None:
        return str(boolean).lower()
    if choice := _choice(text):
        return choice[0]
    value, unit = _measure(text)
    number = canonical(value)
    if unit is None or unit == (("degree", "1"),):
        return number
    return " ".join([number, *("".join(part).removesuffix("1") for part in unit)])


def plain(text: str) -> str:
    r"""Remove markup and macros such as ``\text{}``; normalize spaces and degrees."""
    text = plain_digits(stripped(text))
    for _ in range(3):
        text = _MACRO.sub(r"\1", text)
    text = _DEGREE.sub(" degree ", _BLANK.sub(" ", _LAYOUT.sub("", text)))
    return stripped(text.replace("\u2212", "-"))


def _boolean(text: str) -> bool | None:
    return BOOLEANS.get(text.casefold())


def _is_words(text: str) -> bool:
    """True if `text` consists of words. Letters in alphabetical order are a product of variables."""
    if not _WORDS.fullmatch(text):
        return False
    letters = text.casefold()
    return len(letters) > 2 and (not letters.isalpha() or sorted(letters) != list(letters))


def _choice(text: str) -> tuple[str, str] | None:
    """Option letter and the text after it; None if `text` is not one option."""
    found = _CHOICE.fullmatch(text)
    if found is None or _SEVERAL.search(found[3]):
        return None
    return (found[1] or found[2]).upper(), found[3].strip()


def _same_choice(expected: str, found: str) -> bool | None:
    wanted, chosen = _choice(expected), _choice(found)
    if wanted and chosen:
        if wanted[0] != chosen[0]:
            return False
        return not (wanted[1] and chosen[1]) or decide(wanted[1], chosen[1]) is True
    if chosen and chosen[1]:
        return decide(expected, chosen[1])
    return decide(wanted[1], found) if wanted and wanted[1] else None


def _same_percentage(expected: str, found: str) -> bool | None:
    percentages = _PERCENT.fullmatch(expected), _PERCENT.fullmatch(found)
    values = [
        _quotient(match[1] if match else text) for match, text in zip(percentages, (expected, found), strict=True)
    ]
    if not any(percentages) or values[0] is None or values[1] is None:
        return None
    if all(percentages):
        return values[0] == values[1]
    if percentages[0]:
        return values[1] in (values[0], values[0] / 100)
    return values[0] == values[1] / 100 or (values[0] == values[1] and abs(values[0]) >= 1)


def _same_measure(expected: str, found: str) -> bool | None:
    """Compare numbers and quotients, with their units if both have one."""
    (value, unit), (other, other_unit) = _measure(expected), _measure(found)
    if unit and other_unit and unit != other_unit:
        return False
    numbers = as_number(value), as_number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    quotient = _quotient(value)
    return True if quotient is not None and quotient == _quotient(other) else None


def _measure(text: str) -> tuple[str, Unit | None]:
    """Value and unit; the whole text and None if it is not a number with a unit of `UNITS`."""
    if re.fullmatch(r"[-+]?\\?\$\s*[0-9.,]+", text):
        return text, (("dollar", "1"),)
    if found := _MEASURE.fullmatch(text):
        unit = _unit(found["unit"].strip())
        # "3m" may be a product, "3 m" is a length
        if unit and (found["blank"] or len(found["unit"]) > 1) and _quotient(found["value"]) is not None:
            return found["value"], unit
    return text, None


def _unit(text: str) -> Unit | None:
    parts = []
    for part in re.split(r"\s*/\s*|\s+per\s+", text):
        found = _UNIT.fullmatch(part.strip())
        name = found and _NAMES.get(found["name"] if len(found["name"]) < 3 else found["name"].casefold())
        if not found or not name:
            return None
        power = _POWERS.get((found["power"] or "").rstrip("."))
        parts.append((name, power or found["exponent"] or "1"))
    return tuple(parts)


def _quotient(text: str) -> Fraction | None:
    """Exact value of a number, a fraction of integers or a mixed number; None for other text."""
    number: Decimal | None = as_number(text)
    if number is not None:
        return Fraction(number)
    found = _QUOTIENT.fullmatch(text.strip())
    if found is None or not (denominator := int(found["d1"] or found["d2"] or found["d3"])):
        return None
    value = Fraction(int(found["n1"] or found["n2"] or found["n3"]), denominator) + int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value
