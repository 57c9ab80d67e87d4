"""When two prompts ask the same: their text without case, spacing and the instructions that are put around it."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradstore.problems import message_text
from gradstore.trainer.data.catalogue import BOXED, LETTER, TRUE_FALSE

GYM = "Think step by step, then give only the final answer within <answer> and </answer>."
"""What follows the question of a reasoning-gym problem: its verifiers read the answer from these tags."""


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt's text: of messages what the user says."""
    if isinstance(prompt, str):
        return prompt
    said = [m["content"] for m in prompt if m["role"] == "user"] or [m["content"] for m in prompt]
    return "\n\n".join(filter(None, map(message_text, said)))


def prompt_key(prompt: str | Sequence[Mapping[str, Any]], instructions: Iterable[str] = ()) -> str:
    """The same text for prompts that ask the same, whatever the case, the spacing and the known instructions.

    instructions: further texts that do not count at the start or end of a prompt.
    """
    key = _plain(prompt_text(prompt))
    for instruction in sorted(map(_plain, (BOXED, TRUE_FALSE, LETTER, GYM, *instructions)), key=len, reverse=True):
        if instruction:
            key = key.removesuffix(instruction).removeprefix(instruction).strip()
    return key


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
