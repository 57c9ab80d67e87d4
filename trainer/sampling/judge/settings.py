"""Settings of the judge: model, endpoint, limits of a request, and how a question is put."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from gradstore.errors import RequestError, check_known, check_number
from gradstore.reading.files import read_text
from gradstore.settings import read
from gradstore.trainer.sampling.secrecy import HIDDEN, URL_VARIABLE, Address, without_credentials

ANSWERS = ("final", "whole")
RULES = ("equal", "both", "none")


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """The judge's model, endpoint and request settings."""

    model: str = field(default_factory=lambda: os.environ.get("GRADSTORE_JUDGE_MODEL", ""))
    """Name of the model, as the endpoint knows it; default: environment variable GRADSTORE_JUDGE_MODEL."""
    base_url: str | None = field(default_factory=lambda: os.environ.get(URL_VARIABLE) or None)
    """The endpoint, such as http://localhost:8000/v1; default: environment variable GRADSTORE_JUDGE_URL; None:
    OPENAI_BASE_URL, or OpenAI's own. It may hold `user:password@` and parameters, which are never shown or written."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key. May be unset if `base_url` is given: local servers need none."""
    concurrency: int = 64
    """Requests in parallel."""
    timeout: float = 60.0
    """Seconds within which one try must have its whole answer, from connecting to the last byte."""
    retries: int = 6
    """Retries after HTTP 408, 409, 429, 5xx, a timeout or a broken connection; pauses grow from 0.5 to 8 s."""
    max_bytes: int = 1_000_000
    """Maximum size of one answer of the endpoint, in bytes."""
    max_tokens: int = 1024
    """Maximum tokens of the judge's reply."""
    temperature: float = 0.0
    """Sampling temperature; some models only accept 1."""
    answer: Literal["final", "whole"] = "final"
    """What of a response is sent: `final`, its final answer; a response without one scores 0 and is not sent. `whole`:
    the end of the response."""
    length: int = 2000
    """Maximum characters sent: a longer final answer scores 0; of a longer whole response the last ones are sent."""
    rule: Literal["equal", "both", "none"] = "equal"
    """When the comparison by rule is final: `equal`, where it finds the answer equal; `both`, wherever it can read the
    ground truth; `none`, never."""
    cache: str | None = None
    """Path of the verdict cache; None: judge.sqlite in the user's cache folder; "none": no cache."""
    template: str | None = None
    """Path of a question template with {problem}, {reference} and {response}; {token} stands for a random text, for
    delimiters. None: the built-in question."""

    def __post_init__(self) -> None:
        if not self.model:
            raise RequestError("no model; use judge:model=NAME or set GRADSTORE_JUDGE_MODEL")
        for name in ("concurrency", "max_bytes", "max_tokens", "length", "timeout"):
            check_number(name, getattr(self, name), above=0)
        for name in ("retries", "temperature"):
            check_number(name, getattr(self, name), least=0)
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.key_variable):  # it may be a key, put in the wrong place
            raise RequestError("key_variable is no name of an environment variable, such as OPENAI_API_KEY")
        check_known("answer", self.answer, ANSWERS)
        check_known("rule", self.rule, RULES)

    def __repr__(self) -> str:
        shown = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.base_url is not None:
            shown["base_url"] = _shown(self.base_url)
        return f"JudgeSettings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def writable(base_url: str | None) -> str | None:
    """An endpoint's URL for files: without credentials and parameters. RequestError for one that cannot be read."""
    return None if base_url is None else Address.of(base_url).url


def judge_settings(text: str = "") -> JudgeSettings:
    """Settings from "model=NAME,base_url=URL,..." (any fields of JudgeSettings); "NAME" alone is a model.

    RequestError for an unknown field, an invalid value, or a missing model.
    """
    try:
        return read(JudgeSettings, text, "judge: ")
    except RequestError as error:
        wrong = without_credentials(str(error))
    raise RequestError(wrong)


MOST_TEMPLATE_BYTES = 1 << 20
"""Largest file that is taken for a template."""


def read_template(path: Path, places: tuple[str, ...]) -> str:
    """A question's template; RequestError if the file cannot be read or lacks one of the places."""
    try:
        text = read_text(path, MOST_TEMPLATE_BYTES)
    except RequestError as error:
        raise RequestError(f"judge: template {error}") from None
    missing = [name for name in places if f"{{{name}}}" not in text]
    if missing:
        raise RequestError(f"judge: template {path} lacks {', '.join(f'{{{name}}}' for name in missing)}")
    return text


def _shown(base_url: str) -> str:
    try:
        return str(Address.of(base_url))
    except RequestError:
        return HIDDEN
