"""Render chat messages as the text that a model sees, by its tokenizer's chat template; nothing is dropped silently.

Templates differ in the content they accept. A list of parts is passed on if the template renders a text part in the
same way as plain text; otherwise the texts are joined by line ends, as in vLLM. Null content, as in a tool call, is
passed on as null, or as "" if the template would print None. Tool calls, tools and template arguments that a template
does not render are refused: the model would not see what the file says.
"""

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from gradstore.errors import RequestError, first_line
from gradstore.keepable import parsed_field
from gradstore.problems import detail
from gradstore.reading.files import read_object

Prompt = str | list[dict[str, Any]]
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""Errors that templates and transformers raise for messages that a template does not support."""


def prompt_text(
    tokenizer: Any,
    prompt: Prompt,
    name: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The prompt as the text that the model sees.

    name: the problem's name in messages. tools: tools that the model may call, in the template's form. arguments: other
    variables of the template, such as {"enable_thinking": False}.
    RequestError for messages, tools or arguments that the template does not render.
    """
    if isinstance(prompt, str):
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{name}: the prompt is chat messages, but the tokenizer has no chat template; "
            "use a chat model's tokenizer, or give prompts as text or token ids"
        )
    messages = [_readable(message, j, name, takes_parts(tokenizer)) for j, message in enumerate(prompt)]
    options = {"tools": list(tools) if tools else None, **(arguments or {})}

    def render(messages: list[dict[str, Any]]) -> str | None:
        return _rendered(tokenizer, messages, options)

    text = render(messages)
    without_null = [{**m, "content": ""} if m["content"] is None else m for m in messages]
    if without_null != messages:
        plain = render(without_null)
        text = text if text is not None and text.count("None") <= (plain or "").count("None") else plain
    if text is None:
        raise RequestError(f"{name}: {_refused(tokenizer, messages, options)}")
    if any(message.get("tool_calls") for message in messages):
        silent = [{key: value for key, value in m.items() if key != "tool_calls"} for m in without_null]
        if render(silent) == render(without_null):
            j = next(j for j, message in enumerate(messages) if message.get("tool_calls"))
            raise RequestError(f"{name}: message {j} calls tools, which the chat template leaves out of the prompt")
    if tools and _rendered(tokenizer, messages, options | {"tools": None}) == text:
        raise RequestError(f"{name}: the problem has tools, which the chat template leaves out of the prompt")
    return text


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise RequestError for arguments that the chat template does not mention, or that transformers itself uses."""
    if not arguments:
        return
    own = inspect.signature(type(tokenizer).apply_chat_template).parameters
    template = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else json.dumps(template)
    for name in arguments:
        if name in own:
            raise RequestError(f"template argument {name!r} is not the template's own and cannot be set")
        if name not in text:
            raise RequestError(f"the tokenizer's chat template has no argument {name!r}: it would change nothing")


def settings_path(rollouts: str | Path) -> Path:
    """Path of the settings file that `gradstore rollout` writes beside a rollout file."""
    return Path(f"{rollouts}.settings.json")


def kept_arguments(rollouts: Path, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The template arguments of a rollout file: those stored beside it, or `given` if none are stored.

    RequestError if both exist and differ.
    """
    try:
        kept = read_object(settings_path(rollouts)).get("template_kwargs") or {}
    except RequestError:
        kept = None
    if not isinstance(kept, dict):
        kept = None  # no settings file of gradstore: use the given arguments
    if kept is not None and given is not None and kept != given:
        raise RequestError(
            f"{rollouts}: sampled with the template arguments {json.dumps(kept)}, given are {json.dumps(given)}"
        )
    return dict(given or kept or {})


def tools_of(record: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """The tools of a problem, from its field `tools`: a list of objects, or the JSON text of one."""
    tools = detail(record, "tools")
    if tools is None:
        tools = ((record.get("extra") or {}).get("verl") or {}).get("tools")
    tools = parsed_field(tools, name, "tools", "a list of objects")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"{name}: field 'tools' must be a list of objects, not {str(tools)[:80]!r}")
    return [_without_nulls(tool) for tool in tools]


@functools.lru_cache(maxsize=16)
def takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template renders a list of one text part in the same way as the plain text."""
    said = "a part of text"
    as_text, as_part = (
        _rendered(tokenizer, [{"role": "user", "content": content}], {})
        for content in (said, [{"type": "text", "text": said}])
    )
    return as_text is not None and as_text == as_part


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
    """The rendered text; None if the template raises."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except _REFUSALS:
        return None


def _refused(tokenizer: Any, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """Error message: why the template raises, and which messages may be the cause."""
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        reason = "no reason given"
    except _REFUSALS as error:
        reason = first_line(error)
    odd = [str(j) for j, message in enumerate(messages) if not isinstance(message["content"], str)]
    hint = f" (message {', '.join(odd)}: the content is not text)" if odd else ""
    return f"the chat template refuses the prompt's messages{hint}: {reason}"


def _readable(message: Mapping[str, Any], j: int, name: str, parts_taken: bool) -> dict[str, Any]:
    """A message in the template's form: without nulls from Parquet columns, its parts as a list or joined."""
    content = message.get("content")
    plain = {key: _without_nulls(value) for key, value in message.items() if value is not None}
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else _without_nulls(part) for part in content]
        for part in parts:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"{name}: message {j} has a part of type {kind!r}; only text parts can be sampled from"
                )
        content = parts if parts_taken else "\n".join(part["text"] for part in parts)
    elif content is None:
        if not plain.get("tool_calls"):
            raise RequestError(f"{name}: message {j} has no content and calls no tool")
    elif not isinstance(content, str):
        raise RequestError(f"{name}: message {j} has content of type {type(content).__name__}, expected text or parts")
    return {**plain, "content": content}


def _without_nulls(value: Any) -> Any:
    """The value without null fields of objects: a Parquet column adds all other objects' fields to each, as nulls."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
