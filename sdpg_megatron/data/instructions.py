"""Instructions that published files put around a question: how they begin and end it, and a question without them."""

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
"""What is appended to every question or, with {question}, put around it: for the verifiers math and answer, for math as
in the SDPG paper (arXiv 2606.04036, figure 4), and for others."""
LONGEST = 1000
"""Characters of a question that may be instructions alone."""
_SPELLINGS = {":": ":?", '"': '["\u201c\u201d]?', "'": "['\u2019]"}


def either(*texts: str) -> str:
    """A pattern that matches any of the texts, whatever blanks and line ends they are broken with.

    Case, colons, the kind of quotes and a final full stop may differ.
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
"""How the questions of DAPO-Math-17k begin, and of its copies that ask for a box (SDPG's paper, figure 4)."""
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
"""How questions end in the same sets, in verl's copies of GSM8K and MATH, in Qwen's evaluations, and in files of
tools/prepare_data.py."""


def bare(question: str) -> str:
    """`question` without the instructions of published files around it; empty where there is nothing else."""
    if found := OPENING.match(question):
        question = question[found.end() :]
    return without_closing(question)


def without_closing(text: str) -> str:
    text = text.strip()
    while found := CLOSING.search(text):
        text = text[: found.start()].rstrip()
    return text


def is_bare_instruction(text: str) -> bool:
    """Tell whether a question is made of instructions alone."""
    return len(text) <= LONGEST and not bare(text)
