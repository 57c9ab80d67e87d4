"""Tokenisation of prompts and responses, the same everywhere.

- A text prompt goes unchanged through `tokenizer(prompt)`: the tokenizer's default decides about special tokens, as at
  generation time (Llama's adds <s>, Qwen's adds nothing).
- Chat messages go through the chat template with the generation prompt; the template writes the special tokens
  itself, so none are added.
- A text response never gets special tokens, except the end-of-sequence token with `append_eos`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.engine.rollouts.templates import Prompt, prompt_text


def prompt_ids(
    tokenizer: Any,
    prompt: Prompt,
    name: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Token ids of a prompt, int64 [tokens]; the arguments are those of `templates.prompt_text`."""
    text = prompt_text(tokenizer, prompt, name, tools=tools, arguments=arguments)
    special = {} if isinstance(prompt, str) else {"add_special_tokens": False}
    return np.asarray(tokenizer(text, **special)["input_ids"], dtype=np.int64)


def text_of(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of token ids; ids of a padded vocabulary, unknown to the tokenizer, give no text."""
    try:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except (IndexError, KeyError, OverflowError, TypeError):
        known = set(tokenizer.get_vocab().values())
        return tokenizer.decode([i for i in ids if i in known], skip_special_tokens=skip_special_tokens)


def response_ids(tokenizer: Any, response: str, *, append_eos: bool) -> np.ndarray:
    """Token ids of a response, int64 [tokens]; with `append_eos` they end with one end-of-sequence token."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if append_eos and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int64)
