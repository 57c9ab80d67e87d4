"""Keys and credentials are sent, and neither shown nor written, whatever fails and whatever a server repeats."""

import base64
import http.client
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from gradstore.errors import GradstoreError, RequestError
from gradstore.settings import plain, write_yaml
from gradstore.trainer import RoundSettings, RunSettings
from gradstore.trainer.sampling.judge import Judge, JudgeSettings, judge_settings
from gradstore.trainer.sampling.rewards import load_reward
from gradstore.trainer.sampling.secrecy import Address, Secrets, without_credentials
from tests.trainer.judge_server import KEY, Endpoint, box, problem

Make = Callable[..., Judge]


def ask(judge: Judge) -> float:
    return judge.reward()(problem(), box("x"), 0)


def chain(error: BaseException | None) -> str:
    """All that an error and its causes and contexts could show."""
    shown = ""
    while error is not None:
        shown += f"{error!s} {error!r} {error.args!r} {vars(error)!r}"
        error = error.__cause__ or error.__context__
    return shown


ECHOES = [
    KEY,
    quote(KEY, safe=""),
    quote(KEY, safe="").lower(),
    base64.b64encode(KEY.encode()).decode(),
    base64.b64encode(f"Authorization: Bearer {KEY}\r\n".encode()).decode(),
    base64.b64encode(f"x{KEY}".encode()).decode(),
    base64.urlsafe_b64encode(f"xy{KEY}".encode()).decode(),
    KEY.encode().hex(),
    KEY[:-12],
    " ".join(KEY),
    KEY.upper(),
    "".join(f"%{byte:02x}" for byte in KEY.encode()),
    "".join(f"&#{byte};" for byte in KEY.encode()),
]


def run(**settings: Any) -> RunSettings:
    """Settings of a training run."""
    return RunSettings(model="m", pool=Path("p"), out=Path("o"), rounds=RoundSettings(selected=8), **settings)


def no_key(text: str) -> bool:
    return not any(part in text for part in (KEY, KEY[5:20], KEY[-10:], ECHOES[3][4:16], "-Secret", "0123456"))


@pytest.mark.parametrize("status", [400, 401, 429, 200, 307])
def test_a_key_that_is_echoed_is_not_shown(
    endpoint: Endpoint, judge: Make, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In no message, chain or log, in no encoding; wherever the server puts it."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "httpcore.http11", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    made = judge(retries=0, cache="none")
    for echo in ECHOES:
        for body in ({"error": {"message": f"bad key {echo}!"}}, {"detail": f"{echo}"}, {echo: 1, "choices": echo}):
            headers = {"X-Echo": echo, "Location": f"http://x/{quote(echo)}", "retry-after-ms": "1"}
            endpoint.answer = lambda number, _, body=body, headers=headers: (status, body, headers)
            with pytest.raises(GradstoreError) as failed:
                ask(made)
            shown = chain(failed.value) + "".join(traceback.format_exception(failed.value))
            assert no_key(shown), shown
            assert "'p0'" in str(failed.value)
            assert failed.value.__context__ is None
    assert no_key(caplog.text + "".join(map(repr, caplog.records)))
    assert "httpcore" in caplog.text
    assert no_key("".join(capfd.readouterr()))


def test_a_key_in_a_reply_is_neither_shown_nor_kept(endpoint: Endpoint, judge: Make, tmp_path: Path) -> None:
    for number, echo in enumerate(ECHOES):
        endpoint.answer = lambda number, body, echo=echo: f"{echo}\nVERDICT: CORRECT"
        assert judge().reward()(problem(), box(number), 0) == 1.0
    endpoint.answer = lambda number, body: f"I saw {KEY}"
    with pytest.raises(GradstoreError, match=r"its reply ends in 'I saw \*\*\*'") as failed:
        ask(judge())
    assert no_key(chain(failed.value))
    assert no_key((tmp_path / "verdicts.sqlite").read_bytes().decode(errors="replace"))


def test_other_messages_stay(endpoint: Endpoint, judge: Make) -> None:
    endpoint.answer = lambda number, body: (404, {"error": {"message": "The model `m` \x1b[31mdoes\nnot exist"}})
    with pytest.raises(RequestError, match=r"HTTP 404: The model `m` \[31mdoes not exist$"):
        ask(judge())
    endpoint.answer = lambda number, body: (401, {"error": {"message": "wrong"}})
    with pytest.raises(RequestError, match=r"HTTP 401, the key in \$OPENAI_API_KEY is refused or missing$"):
        ask(judge())


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", " ", "\t", "\0", "é", "\x7f", "\r\nX-Evil: 1"])
def test_an_impossible_key_is_refused_unseen(
    judge: Make, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """httpx prints a header that it cannot send, and so the key."""
    if "\0" in end:
        monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": KEY + end})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", KEY + end)
    with pytest.raises(RequestError, match=r"judge: the key in \$OPENAI_API_KEY holds a .* \(character 41 of ") as bad:
        judge()
    assert no_key(chain(bad.value))
    assert endpoint.requests == []


def test_credentials_in_the_url(
    endpoint: Endpoint, judge: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are sent, and shown and written nowhere."""
    caplog.set_level(logging.DEBUG)
    expected = base64.b64encode(b"robert:pass w0rd-9876").decode()
    url = f"http://robert:pass%20w0rd-9876@{endpoint.host}/v1?api-key=parameter-key-1&api-version=7"
    secrets = ("robert", "pass%20w0rd", "pass w0rd", "parameter-key-1", expected)
    made = judge(base_url=url)
    assert ask(made) == 1.0
    assert endpoint.headers[0]["Authorization"] == f"Basic {expected}"  # and not the key, which is another's
    assert endpoint.paths[0] == "/v1/chat/completions?api-key=parameter-key-1&api-version=7"
    shown = repr(made.settings) + repr(made)
    for status in (401, 404, 429):
        endpoint.answer = lambda number, body, status=status: (status, {"error": f"{url} {expected}"})
        with pytest.raises(GradstoreError, match=rf"at http://\*\*\*@{endpoint.host}/v1\?\*\*\*: HTTP {status}") as bad:
            judge(base_url=url, retries=0).reward()(problem(), box("y"), 0)
        shown += chain(bad.value)
    assert "httpx" in caplog.text
    assert not any(secret in shown + caplog.text for secret in secrets)

    write_yaml(tmp_path / "run.yaml", run(judge=made.settings, reward="judge").filled())
    assert not any(secret in (tmp_path / "run.yaml").read_text() for secret in secrets)
    by_text = run(reward=f"judge:model=m,base_url={url}").filled()
    assert not any(secret in f"{plain(by_text)}" for secret in secrets)
    endpoint.answer = lambda number, body: "VERDICT: CORRECT"
    monkeypatch.setenv("GRADSTORE_JUDGE_URL", url)  # where a resumed run finds them again
    again = RunSettings.of(tmp_path / "run.yaml").judge
    assert again is not None
    assert judge(base_url=again.base_url).reward()(problem(), box("z"), 0) == 1.0
    assert endpoint.headers[-1]["Authorization"] == f"Basic {expected}"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pa/ssw0rd@host/v1",  # the password would be a port, or a path
        "http://user:12/ssw0rd@host/v1",
        "http://user:ssw0rd@host:port/v1",
        "http://user:ssw0rd @host/v1",
        "http://user:ssw0rd\r\n@host/v1",
        "http://user:ssw0rd@/v1",
        "http://user:ssw0rd@host/v1#part",
        "ftp://user:ssw0rd@host/v1",
        "user:ssw0rd@host/v1",
        "http://user:ssw0rd@[::1/v1",
        "http://user:ssw0rd@ho^st/v1",
        "http://user:ssw0rd@host:99999/v1",
        "",
    ],
)
def test_impossible_urls_are_refused_unseen(judge: Make, url: str) -> None:
    with pytest.raises(RequestError, match="base_url is no address") as bad:
        judge(base_url=url or " ")
    assert "ssw0rd" not in chain(bad.value)
    assert "ssw0rd" not in repr(JudgeSettings(model="m", base_url=url))


def test_messages_about_the_reward_itself() -> None:
    url = "https://robert:ssw0rd@host/v1?key=ssw0rd"
    for text in (f"judg:model=m,base_url={url}", f"judge:model=m,model=m,base_url={url}", f"judge base_url={url}"):
        with pytest.raises(RequestError) as bad:
            load_reward(text)
        assert "ssw0rd" not in chain(bad.value)
    with pytest.raises(RequestError) as bad:
        run(judge=JudgeSettings("m"), reward=f"judge:model=m,base_url={url}")
    assert "ssw0rd" not in chain(bad.value)
    assert "ssw0rd" not in repr(judge_settings(f"model=m,base_url={url}"))


def test_a_key_in_place_of_its_variable(endpoint: Endpoint) -> None:
    with pytest.raises(RequestError, match=r"key_variable is no name of an environment variable") as bad:
        load_reward(f"judge:model=m,base_url={endpoint.url},key_variable={KEY.replace('/', '-')}")
    assert no_key(chain(bad.value))


def test_a_proxys_password_is_not_shown(judge: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://robert:ssw0rd-9876@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY")
    with pytest.raises(GradstoreError, match="cannot be reached") as bad:
        ask(judge(base_url="http://192.0.2.1/v1", retries=0, timeout=2.0))
    assert "ssw0rd" not in chain(bad.value)
    monkeypatch.setenv("HTTP_PROXY", "gopher://robert:ssw0rd-9876@127.0.0.1:1")
    with pytest.raises(RequestError, match="its URL or a proxy of the environment cannot be used") as wrong:
        judge(base_url="http://192.0.2.1/v1")
    assert "ssw0rd" not in chain(wrong.value)


def test_addresses_and_secrets() -> None:
    assert str(Address.of("https://u:p@h:8/v1/?k=v")) == "https://***@h:8/v1?***"
    assert Address.of("http://[::1]:8000/v1/").url == "http://[::1]:8000/v1"
    assert without_credentials("a=https://u:p@h/v1?k=v, b") == "a=https://***@h/v1?***, b"
    assert Secrets("abc").masked("abc") == "abc"  # too short to be told from a word
    assert Secrets("EMPTY").masked("the key EMPTY is wrong") == "the key *** is wrong"
    assert repr(Secrets(KEY)) == "Secrets()"


def test_the_server_of_these_tests_shows_headers(endpoint: Endpoint) -> None:
    """Otherwise the tests of keys would show nothing."""
    connection = http.client.HTTPConnection(endpoint.host)
    connection.request("POST", "/v1/chat/completions", "{}", {"Authorization": f"Bearer {KEY}"})
    assert connection.getresponse().status == 200
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    connection.close()
