"""A verifier that a random model can satisfy, now and then."""

from sdpg_megatron.records import Prompt


def has_digit(prompt: Prompt, response: str) -> float:
    return float(any(character.isdigit() for character in response))


def broken(prompt: Prompt, response: str) -> float:
    raise KeyError("no such key")


def gives_text(prompt: Prompt, response: str) -> str:
    return "right"


def first_digit(response: str) -> str | None:
    return next((character for character in response if character.isdigit()), None)


has_digit.extract = first_digit  # type: ignore[attr-defined]
