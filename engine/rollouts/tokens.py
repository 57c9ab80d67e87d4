"""Text to token ids, the same way wherever a prompt or a response is tokenised.

- A text prompt goes through `tokenizer(prompt)` as it is: the tokenizer's own default decides about special tokens,
  as it would at generation time (Llama's adds <s>, Qwen's adds nothing).
- Chat messages go through the chat template with the generation prompt; the template writes the special tokens
  itself, so none are added.
- A text response never gets special tokens, save the end-of-sequence token where `append_eos` asks for it.
"""

from typing import Any

import numpy as np
from jinja2 import TemplateError

from engine.rollouts.rollout import Prompt
from gradstore.errors import RequestError


def prompt_text(tokenizer: Any, prompt: Prompt, name: str) -> str:
    """The prompt as the one text the model sees; `name` says whose it is in the RequestError of a failing template."""
    if isinstance(prompt, str):
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{name}: the prompt is chat messages, but the tokenizer has no chat template; "
            "use a chat model's tokenizer, or give prompts as text or token ids"
        )
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError(f"{name}: the chat template refuses the prompt's messages: {error}") from None


def prompt_ids(tokenizer: Any, prompt: Prompt, name: str) -> np.ndarray:
    """Token ids of a prompt, int64 [tokens]."""
    text = prompt_text(tokenizer, prompt, name)
    special = {} if isinstance(prompt, str) else {"add_special_tokens": False}
    return np.asarray(tokenizer(text, **special)["input_ids"], dtype=np.int64)


def response_ids(tokenizer: Any, response: str, *, append_eos: bool) -> np.ndarray:
    """Token ids of a response, int64 [tokens]; with `append_eos` it ends in one end-of-sequence token."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if append_eos and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.int64)
