"""Target: what a judge's endpoint answers, from the first byte of the head to the last of the body.

A reward may only be what the answer's last line says. All else is one line that names the problem, within the time and
the memory of an honest answer, and without the key.
"""

import base64
import gzip
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

from gradstore.trainer.sampling import endpoint
from gradstore.trainer.sampling.judge import Judge, JudgeSettings, verdict
from tests.fuzz import edits
from tests.fuzz.trial import Trial

LIMIT_S = 10.0
"""Twice the total time that the settings allow, which is itself longer than that of one request."""
KEY = "sk-key-that-nobody-may-see"
DEADLINE_S = 3.0
_RECORD = {"id": "p1", "prompt": "Why is the sky blue?", "ground_truth": "Blue light is scattered more than red light."}
_RESPONSE = "It is \\boxed{Because of Rayleigh scattering, which is stronger for blue light}."


class Endpoint:
    """A server that sends the parts of one answer to whoever connects."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._answer, args=(connection, self.parts), daemon=True).start()

    def _answer(self, connection: socket.socket, parts: list[dict[str, Any]]) -> None:
        with connection:
            try:
                connection.settimeout(10)
                _read_request(connection)
                for part in parts:
                    for _ in range(part.get("times", 1)):
                        connection.sendall(edits.payload(part["data"]))
                        time.sleep(part.get("pause", 0))
            except (OSError, ValueError):
                return


def _read_request(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        more = connection.recv(65536)
        if not more:
            return
        body += more


@dataclass
class Honest:
    """The server, and an answer of an honest one."""

    endpoint: Endpoint
    body: dict[str, Any]
    settings: dict[str, Any]


def prepare(folder: Path) -> Honest:
    """Start the server, and ask once: the client's imports take seconds."""
    folder.mkdir()
    endpoint.LONGEST_PAUSE_S = 0.5  # an endpoint may ask for a minute, and gets it
    os.environ |= {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    server = Endpoint()
    known = {field.name for field in fields(JudgeSettings)}
    wanted = {
        "timeout": 1.0,
        "retries": 1,
        "deadline": DEADLINE_S,
        "cache": "none",
        "model": "m",
        "base_url": server.url,
    }
    settings = {name: value for name, value in wanted.items() if name in known}
    message = {"role": "assistant", "content": "Both name the scattering.\nVERDICT: CORRECT"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    server.parts = [{"data": _plain(json.dumps(body).encode()).decode()}]
    if _judge(settings) != [1.0]:
        raise RuntimeError("an honest answer is not read")
    return Honest(server, body, settings)


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """A body, a head around it, and how they are sent."""
    body, expected = _body(random, honest.body)
    parts = _parts(random, body)
    return {"parts": parts, "expected": expected}


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Score one response; expected: the scores that the answer's text allows."""
    honest.endpoint.parts = case["parts"]
    scores = trial.call("judge", _judge, honest.settings)
    honest.endpoint.parts = []
    if scores is not None and (len(scores) != 1 or scores[0] not in case["expected"]):
        trial.wrong("judge: score", f"{scores}, expected one of {case['expected']}")
    for failure in trial.failures:
        if KEY in failure.text:
            trial.fail("outside", "judge: shows the key", failure.text)


def _judge(settings: dict[str, Any]) -> list[float]:
    try:
        return list(Judge(JudgeSettings(**settings)).score([(_RECORD, _RESPONSE, 0)]))
    except Exception as error:
        if KEY in str(error):
            raise AssertionError(f"the key is shown: {error}") from None
        raise


def _body(random: Random, honest: dict[str, Any]) -> tuple[bytes, list[float]]:
    """A body and the scores that it allows."""
    body = json.loads(json.dumps(honest))
    kind = random.randrange(5)
    if kind == 0:
        body["choices"][0]["message"]["content"] = _reply(random)
    elif kind <= 2:
        for _ in range(random.choice((1, 1, 2))):
            path = random.choice(list(edits.places(body)) or [("id",)])
            holder = edits.at(body, path[:-1])
            if random.random() < 0.2:
                del holder[path[-1]]
            else:
                holder[path[-1]] = edits.nasty(random)
    text = edits.dumped(body)
    if kind == 3:
        text = random.choice((
            b"[" * 200_000, b'{"a":' * 200_000, b"", b"null", b"[]", b"{}", b"\xff\xfe",
            text[: random.randrange(len(text))], text + text,
            b"\xef\xbb\xbf" + text, text.replace(b'"content"', b'"content":"x","content"'), b"9" * 10_000, b"NaN",
            b"<html>",
            b'{"error": {"message": "no"}}', b"data: " + text + b"\n\ndata: [DONE]\n\n", text.decode().encode("utf-16"),
        ))  # fmt: skip
    return text, _allowed(text)


def _reply(random: Random) -> str:
    """What a judge might say."""
    return random.choice(("VERDICT: {}", "x\n**VERDICT: {}**", "VERDICT: {}\n\n", "VERDICT: {}\nNo: VERDICT: MAYBE",
        "verdict: {}", "VERDICT: {}\x00",
        "VERDICT: {}." + "\u2028", "\x1b[2JVERDICT: {}", "VERDICT:{}" + " " * 100_000, "{}", "",
        "\n" * 100_000 + "VERDICT: {}", "VERDICT: {} VERDICT: {}",
        "\ud800 VERDICT: {}", "_" * 50_000 + "VERDICT: {}" + "_" * 50_000 + "x",
    )).replace("{}", random.choice(("CORRECT", "INCORRECT", "CORRECTLY", "")))  # fmt: skip


def _allowed(text: bytes) -> list[float]:
    """Scores that an answer's text allows: what its last line says, if it can be read at all."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
        found = verdict(content)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return []
    return [] if found is None else [found]


def _plain(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    about = f"Content-Type: application/json\r\n{more}Content-Length: {len(body)}\r\nConnection: close"
    return f"HTTP/1.1 {status}\r\n{about}\r\n\r\n".encode() + body


def _parts(random: Random, body: bytes) -> list[dict[str, Any]]:
    """The bytes of the answer and their pace."""
    kind = random.randrange(12)
    whole = _plain(body)
    if kind <= 4:
        return [_part(whole)]
    if kind == 5:
        status = random.choice(("204 No Content", "301 Moved", "302 Found", "400 Bad", "401 No", "404 Not Found",
            "408 Late", "409 C", "422 X",
                                "429 Slow", "500 Error", "503 Busy", "599 X", "100 Continue", "999 X", "0 X",
                                "abc"))  # fmt: skip
        more = random.choice(("", "Retry-After: 999999999\r\n", "Retry-After: -1\r\n", "Retry-After: nan\r\n",
            "Location: file:///etc/passwd\r\n",
                              "Location: http://127.0.0.1:1/\r\n", "Location: /v1/chat/completions\r\n",
                              "retry-after-ms: 1\r\n"))  # fmt: skip
        return [_part(_plain(body, status, more))]
    if kind == 6:
        cut = random.randrange(len(whole))
        return [_part(whole[:cut])]
    if kind == 7:
        place = random.randrange(min(len(whole), 200))
        return [_part(whole[:place] + random.randbytes(random.choice((1, 2, 8))) + whole[place + 1 :])]
    if kind == 8:
        start = random.randrange(min(200, len(whole)))
        slow = random.choice(("body", "head"))
        first, rest = (whole[:start], whole[start : start + 12]) if slow == "head" else (whole[:-12], whole[-12:])
        return [
            _part(first),
            *({"data": {"base64": base64.b64encode(rest[i : i + 1]).decode()}, "pause": 0.7} for i in range(len(rest))),
        ]
    if kind == 9:
        encoding = random.choice(("gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "x"))
        zeros = gzip.compress(b" " * (64 << 20), 9)
        bomb = random.random() < 0.5
        data = gzip.compress(body) if not bomb else zeros * 24  # members follow one another: 1.5 GB of blanks
        return [_part(_plain(data, more=f"Content-Encoding: {encoding}\r\n"))]
    if kind == 10:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        size = random.choice(
            (
                b"%x" % len(body),
                b"-1",
                b"ffffffffffffffff",
                b"0x10",
                b"",
                b"%x;a=b" % len(body),
                b"%x" % (len(body) + 5),
            )
        )
        return [_part(head + size + b"\r\n" + body + random.choice((b"\r\n0\r\n\r\n", b"", b"\r\n0\r\nX: y\r\n\r\n")))]
    return _endless(random, body)


def _endless(random: Random, body: bytes) -> list[dict[str, Any]]:
    """More than anybody wants."""
    length = random.choice((10**12, 2**31, 2**63, -1))
    json_head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    kind = random.randrange(4)
    if kind == 0:
        return [{"data": json_head}, {"data": {"repeat": " ", "times": 1 << 20}, "times": 1500}]
    if kind == 1:
        return [{"data": "HTTP/1.1 200 OK\r\n"}, {"data": {"repeat": "X: y\r\n", "times": 10_000}, "times": 200}]
    if kind == 2:
        return [{"data": "HTTP/1.1 200 OK\r\nX: "}, {"data": {"repeat": "y", "times": 1 << 20}, "times": 64}]
    return [{"data": json_head}, _part(body), {"data": "", "pause": 20.0}]


def _part(data: bytes) -> dict[str, Any]:
    return {"data": {"base64": base64.b64encode(data).decode()}}
