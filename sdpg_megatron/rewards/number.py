"""Verifier `number`, for answers that are one number."""

from __future__ import annotations

import re
from decimal import Decimal

from sdpg_megatron.records import Prompt

MINUS = "\u2212"
"""Typographic minus sign."""

NUMBER = re.compile(
    rf"""
    (?: (?<! [\w)\]] ) [-+{MINUS}] )?               # a sign, unless it joins two operands as in 10-5
    (?:
        (?: [0-9]{{1,3}} (?: ,[0-9]{{3}} )+ (?![0-9])   # 1,234,567
          | [0-9]+ )
        (?: \.[0-9]+ )?                             # a full stop at the end of a sentence stays outside
      | (?<! [0-9] ) \.[0-9]+
    )
    (?: [eE] [-+]? [0-9]{{1,3}} (?! [\w.]* \w ) )?   # 1e-05, but not 2e5a
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Decimal | None:
    """Last integer or decimal in `text`, exactly; None without one. Thousands separators (commas) are accepted."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace(MINUS, "-")) if found else None


def number(prompt: Prompt, response: str) -> float:
    """1.0 if the last number of `response` equals the prompt's answer as a number (12 equals 12.0), else 0.0.

    Raises:
        ValueError: the answer has no number, or several, such as 1/2.
    """
    found = NUMBER.findall(prompt.answer_text)
    if len(found) != 1:
        raise ValueError(f"the answer {prompt.answer!r} of {prompt.uid} has {len(found) or 'no'} numbers, not one")
    return float(last_number(response) == last_number(found[0]))


def extract_number(response: str) -> str | None:
    """Last number of `response`, with the same text for 12, 12.0 and +12; None without one."""
    found = last_number(response)
    if found is None:
        return None
    text = format(found.copy_abs(), "f")  # arithmetic would round to the precision of the decimal context
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"-{text}" if found < 0 else text
