"""Instructions around the questions of published data sets: patterns, and their removal."""

from __future__ import annotations

import re

INSTRUCTIONS = {
    "boxed": "\n\nReason step by step and put the final answer in \\boxed{}.",
    "answer": '\n\nReason step by step. The last line of the reply must be "Answer: " and the final answer.',
    "paper": (
        "Solve the following math problem step by step. Present your final answer inside \\boxed{}, for example "
        "\\boxed{42}.\n\n{question}\n\nRemember to put your final answer inside \\boxed{}."
    ),
    "none": "",
}
"""Text appended to every question or, with {question}, put around it. `boxed` is for the verifier math, `answer` for
the verifier answer, `paper` is the prompt of the SDPG paper (arXiv 2606.04036, figure 4) for the verifier math."""
LONGEST = 1000
"""Maximum length in characters of a question that is checked by `is_bare_instruction`."""
_SPELLINGS = {":": ":?", '"': '["\u201c\u201d]?', "'": "['\u2019]"}


def either(*texts: str) -> str:
    """Pattern that matches any of the texts, with any whitespace between words.

    Colons, the type of quotes and a final full stop may differ.
    """
    return "|".join(r"\s+".join(map(_word, text.strip().removesuffix(".").split())) + r"\.?" for text in texts)


def _word(word: str) -> str:
    return "".join(_SPELLINGS.get(character) or re.escape(character) for character in word)


OPENING = re.compile(
    rf"\s*(?:{either('Solve the following math problem step by step.')})(?:\s+(?:"
    + either(
        "The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is the "
        "answer to the problem.",
        "Present your final answer inside \\boxed{}, for example \\boxed{42}.",
    )
    + r"))?",
    re.IGNORECASE,
)
"""Opening of the questions of DAPO-Math-17k, and of its copies that ask for a box (SDPG paper, figure 4)."""
CLOSING = re.compile(
    "(?:"
    + either(
        'Remember to put your answer on its own line after "Answer:".',
        "Remember to put your final answer inside \\boxed{}.",
        "Let's think step by step and output the final answer within \\boxed{}.",
        'Let\'s think step by step and output the final answer after "####".',
        "Please reason step by step, and put your final answer within \\boxed{}.",
        *(text for text in INSTRUCTIONS.values() if text and "{question}" not in text),
    )
    + r")\s*$",
    re.IGNORECASE,
)
"""End of the questions in the same data sets, in verl's copies of GSM8K and MATH, in Qwen's evaluations, and in files
written by tools/prepare_data.py."""


def bare(question: str) -> str:
    """Remove the instructions of published data sets; empty if nothing else is left."""
    if found := OPENING.match(question):
        question = question[found.end() :]
    return without_closing(question)


def without_closing(text: str) -> str:
    text = text.strip()
    while found := CLOSING.search(text):
        text = text[: found.start()].rstrip()
    return text


def is_bare_instruction(text: str) -> bool:
    """True if a question consists of instructions only."""
    return len(text) <= LONGEST and not bare(text)
