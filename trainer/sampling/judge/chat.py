"""Questions as chat completions: what the judge sends to its endpoint, and what it takes for a reply."""

import os
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from gradstore.errors import RequestError
from gradstore.trainer.sampling.endpoint import Endpoint, Limits, Question
from gradstore.trainer.sampling.judge.settings import JudgeSettings
from gradstore.trainer.sampling.secrecy import Address

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model replied."""

    text: str
    complete: bool
    """Whether the model ended the reply itself; False if it was cut off."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


class Chat:
    """One model behind an endpoint for chat completions. The constructor raises RequestError for a bad key or URL."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        given = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        if not os.environ.get(settings.key_variable) and not given:
            raise RequestError(
                f"judge: environment variable {settings.key_variable} is not set and no base_url is given; set the "
                "key, or name a local endpoint"
            )
        limits = Limits(settings.concurrency, settings.timeout, settings.retries, settings.max_bytes)
        self.endpoint = Endpoint("judge", Address.of(given or OPENAI), settings.key_variable, limits)

    async def reply(self, messages: list[dict[str, str]], where: str) -> Reply:
        """The model's reply to a conversation; errors as of `Endpoint.ask`."""
        body = {
            "model": self._settings.model,
            "messages": messages,
            "temperature": self._settings.temperature,
            "max_completion_tokens": self._settings.max_tokens,
        }
        return await self.endpoint.ask(Question("/chat/completions", body, "chat completion", where), _reply)


def _reply(body: bytes) -> Reply:
    choice = _Completion.model_validate_json(body, strict=True).choices[0]
    return Reply(choice.message.content or "", choice.finish_reason not in ("length", "content_filter"))
