"""Detect prompts that ask the same: compare their text without case, spacing and the added instructions."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradstore.problems import message_text
from gradstore.trainer.data.catalogue import BOXED, LETTER, TRUE_FALSE

GYM = "Think step by step, then give only the final answer within <answer> and </answer>."
"""Text after the question of a reasoning-gym problem; its verifiers read the answer from these tags."""


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt's text; for chat messages, the user's messages (all messages if there are none)."""
    if isinstance(prompt, str):
        return prompt
    said = [m["content"] for m in prompt if m["role"] == "user"] or [m["content"] for m in prompt]
    return "\n\n".join(filter(None, map(message_text, said)))


def prompt_key(prompt: str | Sequence[Mapping[str, Any]], instructions: Iterable[str] = ()) -> str:
    """Comparison key, equal for prompts that differ only in case, spacing and known instructions.

    instructions: further texts to remove from the start or end of a prompt.
    """
    key = _plain(prompt_text(prompt))
    for instruction in sorted(map(_plain, (BOXED, TRUE_FALSE, LETTER, GYM, *instructions)), key=len, reverse=True):
        if instruction:
            key = key.removesuffix(instruction).removeprefix(instruction).strip()
    return key


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
