"""Target: requests to the explorer, byte by byte, with and without the token.

A request never ends the server or makes it print a traceback, shows no problem to someone without the token, and an
honest request afterwards is answered at once.
"""

import base64
import json
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.fuzz import edits
from tests.fuzz.honest import SECRET, write_store
from tests.fuzz.trial import MEMORY, Trial, is_ours, memory, short

WAIT_S = 4.0
"""Seconds for an answer to a whole request."""
_VALUES: dict[str, Any] = {
    "address.pathname": "/", "address.search": "?id=pool0001", "benchmark.value": "bench", "step.value": "newest",
    "metric.value": "cosine",
    "order.value": "largest", "text.value": "", "sources.value": [], "tags.value": [], "rates.value": [0, 1],
    "states.value": [], "theme.data": "light",
    "ranking-page.data": 0, "problem-id.value": "pool0001", "problem-metric.value": "cosine",
    "problem-step.value": "10", "problem-rollouts.value": "all",
    "left-benchmark.value": "bench", "left-step.value": "0", "right-benchmark.value": "other",
    "right-step.value": "newest", "compare-metric.value": "dot",
}  # fmt: skip
"""What the page's controls send."""
_PATHS = ("/", "/problem?id=pool0001", "/compare", "/_dash-layout", "/_dash-dependencies", "/assets/explorer.css",
    "/_reload-hash", "/favicon.ico",
          "/_dash-update-component", "/_dash-component-suites/dash/deps/react@18.js")  # fmt: skip


@dataclass
class Honest:
    """The server and what a browser knows of it."""

    process: subprocess.Popen
    log: Path
    host: str
    port: int
    cookie: str
    """The Cookie header with the token; empty for a server that wants none."""
    callbacks: list[dict[str, Any]]
    """Honest bodies of the page's callbacks."""
    before: dict[str, int]
    """State between tries: bytes of the log that were read, and the server's memory at its start."""


def prepare(folder: Path) -> Honest:
    """Start the server as the command line does, and learn its callbacks."""
    write_store(folder)
    log = folder.parent / "served"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gradstore", "serve", str(folder), "--pool", "pool", "--port", "0"],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    address = _address(process, log)
    token = parse_qs(address.query).get("token", [""])[0]
    honest = Honest(process, log, address.hostname or "", address.port or 0, "", [], {"log": 0})
    if token:
        answer = _exchange(honest, _request(f"/?token={token}", honest)) or b""
        found = re.search(rb"\r\nSet-Cookie: ([^;\r]+)", answer, re.IGNORECASE)
        honest.cookie = found[1].decode() if found else ""
    answer = _exchange(honest, _request("/_dash-dependencies", honest)) or b""
    honest.callbacks = [
        _callback(one) for one in json.loads(answer.partition(b"\r\n\r\n")[2]) if not one.get("clientside_function")
    ]
    for body in honest.callbacks:
        for _ in range(2):
            answer = _exchange(honest, _request("/_dash-update-component", honest, json.dumps(body).encode())) or b""
        if not answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204")):
            raise RuntimeError(f"an honest callback is refused: {answer[:500]!r}")
    honest.before |= {"log": log.stat().st_size, "rss": memory("VmRSS", process.pid)}
    return honest


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """A request: with the token or without, and the way in which it is odd."""
    case: dict[str, Any] = {"token": random.random() < 0.8, "whole": True}
    kind = random.randrange(10)
    if kind <= 4:
        body = json.loads(json.dumps(random.choice(honest.callbacks)))
        return case | {"method": "POST", "path": "/_dash-update-component", "headers": [], "body": _body(random, body)}
    if kind <= 6:
        return case | {"method": "GET", "path": _path(random), "headers": [], "body": ""}
    return case | _odd(random, honest)


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Send the request, then an honest one."""
    head, body = _head(honest, case), edits.payload(case["body"])
    answer = trial.call("request", _exchange, honest, head + body, case["whole"])
    if answer is None and case["whole"]:
        trial.fail("hang", "request: no answer", f"after {WAIT_S:g} s")
    status = _status(answer or b"")
    printed = _printed(honest)
    if printed or (status >= 500 and status not in (501, 503, 505)):
        trial.fail("traceback", f"request: status {status}{printed}", _log(honest))
    if not case["token"] and SECRET.encode() in (answer or b""):
        trial.fail("outside", "request: shows problems without the token", (answer or b"").decode(errors="replace"))
    trial.shown("request", (answer or b"").decode(errors="replace"))
    begun = time.monotonic()
    after = trial.call("honest request", _exchange, honest, _request("/_dash-layout", honest))
    if _status(after or b"") != 200:
        trial.fail(
            "hang",
            f"an honest request afterwards: {_status(after or b'')}",
            f"{time.monotonic() - begun:.1f} s: {after!r:.500}",
        )
    _check_server(trial, honest)


def _check_server(trial: Trial, honest: Honest) -> None:
    """The server lives, has printed no traceback, and has taken no more memory than it may."""
    if honest.process.poll() is not None:
        trial.fail("died", f"server: status {honest.process.returncode}", _log(honest))
        raise SystemExit(1)  # the worker starts anew, with another server
    honest.before["log"] = honest.log.stat().st_size
    more = memory("VmHWM", honest.process.pid) - honest.before["rss"]
    if more > MEMORY:
        trial.fail("memory", "server", f"{more >> 20} MiB more than at its start")


def _printed(honest: Honest) -> str:
    """The exception that the server printed since the last try, and the innermost place in the repository."""
    text = _log(honest)
    raised = [line for line in text.splitlines() if re.match(r"[A-Za-z_.]+(Error|Exception|Exit)\b", line)]
    frames = [found for found in re.findall(r'File "([^"]+)", line \d+, in (\w+)', text) if is_ours(found[0])]
    where = f" in {short(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    return f", {raised[-1].partition(':')[0]}{where}" if raised else ""


def _log(honest: Honest) -> str:
    with open(honest.log, "rb") as file:
        file.seek(honest.before["log"])
        return file.read().decode(errors="replace")


def _address(process: subprocess.Popen, log: Path) -> Any:
    for _ in range(1200):
        found = re.search(r"http://\S+", log.read_text(encoding="utf-8", errors="replace"))
        if found:
            return urlsplit(found[0])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def _callback(one: dict[str, Any]) -> dict[str, Any]:
    """The body that a page sends for a callback."""

    def given(part: dict[str, Any]) -> Any:
        if part["id"].startswith("{"):  # a pattern stands for the list of those that fit it: the headings to sort by
            return [{"id": {"sort": name}, "property": part["property"], "value": None} for name in ("score", "id")]
        return {**part, "value": _VALUES.get(f"{part['id']}.{part['property']}")}

    outputs = one["output"].strip(".").split("...")
    listed = [dict(zip(("id", "property"), name.rsplit(".", 1), strict=True)) for name in outputs]
    inputs = [given(part) for part in one["inputs"]]
    changed = [f"{one['inputs'][0]['id']}.{one['inputs'][0]['property']}"]
    more = {"inputs": inputs, "changedPropIds": changed, "state": [given(part) for part in one["state"]]}
    return {"output": one["output"], "outputs": listed if one["output"].startswith("..") else listed[0], **more}


def _body(random: Random, body: dict[str, Any]) -> Any:
    """A callback's body with something else in it."""
    if random.random() < 0.1:
        return random.choice(
            ("", "[]", "null", "{", {"repeat": "[", "times": 200_000}, {"repeat": " ", "times": 1 << 20}, "\xff", "NaN")
        )
    inputs = [one for part in body["inputs"] for one in (part if isinstance(part, list) else [part])]
    values = [one for one in inputs if "value" in one]
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.7:
            random.choice(values)["value"] = random.choice((edits.nasty(random), _control(random)))
        else:
            path = random.choice(list(edits.places(body)) or [("output",)])
            holder = edits.at(body, path[:-1])
            if random.random() < 0.3:
                del holder[path[-1]]
                break
            holder[path[-1]] = edits.nasty(random)
            break
    return {"base64": base64.b64encode(edits.dumped(body)).decode()}


def _control(random: Random) -> Any:
    """A value of the right sort for some control."""
    return random.choice(("pool0001", "pool0005", "nobody", "bench", "other", "pool", "cosine", "dot", "fisher", "0",
        "10", "newest", "all", "smallest",
                          "secret", "s1", ["s1"], ["s1", "x"], [0.2, 0.5], [1, 0], [-5, 5], ["a", "b"], 3, 10**6, -7,
                          "light", "dark", ["live", "failed"],
                          "(", "a" * 100_000, ["x"] * 10_000, "?id=pool0002", "/problem", "/compare"))  # fmt: skip


def _path(random: Random) -> str:
    """A path and a query."""
    path = random.choice(_PATHS)
    kind = random.randrange(8)
    if kind == 0:
        return path + random.choice(
            (
                "/..",
                "/../../../../outside/canary",
                "/%2e%2e/%2e%2e/%2e%2e/canary",
                "%00",
                "%ff%fe",
                "//",
                "/.",
                "\\..\\..",
                ";a=b",
            )
        )
    if kind == 1:
        return (
            path
            + "?"
            + random.choice(
                (
                    "token=",
                    "token=x",
                    "token=%ff",
                    "token=a&token=b",
                    "&" * 10_000,
                    "a=" * 5000,
                    "id=%00",
                    "id=" + "x" * 60_000,
                )
            )
        )
    if kind == 2:
        return "/assets/" + random.choice(
            (
                "../access.py",
                "..%2faccess.py",
                "%2e%2e/access.py",
                ".",
                "",
                "a" * 5000,
                "explorer.css/x",
                "{outside}/canary",
            )
        )
    if kind == 3:
        name = random.choice(("dash", "dash_core_components", "..", "os", "gradstore", "plotly"))
        return f"/_dash-component-suites/{name}/" + random.choice(
            ("", "../../x.js", "deps/react@18.js.map", "a.v1m2.js", "__init__.py", "%00.js", "x" * 300)
        )
    if kind == 4:
        return random.choice(
            ("*", "", "x", "http://evil.example/", "//evil.example/", "/" * 5000, "/\x01", "/é", "/ /", "/?#", "/%")
        )
    return path


def _odd(random: Random, honest: Honest) -> dict[str, Any]:
    """Requests that are odd in their head."""
    kind = random.randrange(9)
    get: dict[str, Any] = {"method": "GET", "path": random.choice(_PATHS), "headers": [], "body": ""}
    if kind == 0:
        methods = (
            "HEAD",
            "PUT",
            "DELETE",
            "OPTIONS",
            "TRACE",
            "CONNECT",
            "PATCH",
            "get",
            "",
            "G E T",
            "X" * 5000,
            "\x00",
            "PRI",
        )
        return get | {"method": random.choice(methods)}
    if kind == 1:
        hosts = (
            "evil.example",
            "127.0.0.1.evil.example",
            "",
            "localhost:99999",
            "[::1",
            "[::1]]",
            "a" * 5000,
            "127.0.0.1:x",
            "\xff",
            "@",
            "127.1",
            "0",
        )
        return get | {"host": random.choice(hosts)}
    if kind == 2:
        n = random.choice((10, 1000, 100_000))
        return get | {"headers": [["X", "y" * n]], "whole": n < 1000}
    if kind == 3:
        return get | {"headers": [[f"X{i}", "y"] for i in range(random.choice((100, 20_000)))], "whole": False}
    if kind == 4:
        cookies = (
            "gradstore-token",
            "gradstore-token=",
            "=",
            ";" * 1000,
            "a=b; " * 1000,
            "gradstore-token=\xff",
            '"',
            "a=\x00",
            f"gradstore-token-{honest.port}=x",
        )
        return get | {"headers": [["Cookie", random.choice(cookies)]]}
    if kind == 5:
        length = random.choice(
            ("-1", "1e3", "10000000000", str(2**63), "0x10", "", "5, 5", "abc", "5\r\nContent-Length: 6")
        )
        return get | {
            "method": "POST",
            "path": "/_dash-update-component",
            "headers": [["Content-Length", length]],
            "whole": False,
        }
    if kind == 6:
        size = random.choice(("5", "-5", "ffffffffffffffff", "", "5;a=b", "0" * 5000))
        body = f"{size}\r\nhello\r\n0\r\n\r\n"
        headers = [["Transfer-Encoding", random.choice(("chunked", "gzip, chunked", "Chunked", "x"))]]
        return get | {
            "method": "POST",
            "path": "/_dash-update-component",
            "headers": headers,
            "body": body,
            "whole": False,
        }
    if kind == 7:
        others = (["Authorization", "Bearer"], ["Authorization", "Basic \xff"], ["Authorization", "Bearer é"],
            ["Expect", "100-continue"], ["Upgrade", "h2c"],
                  ["Range", "bytes=0-0,1-1"], ["If-None-Match", '"'], ["Content-Type",
                      "multipart/form-data; boundary=x"], ["Accept-Encoding", "gzip;q=x"],
                  ["X-Forwarded-For", "127.0.0.1"], ["X-Forwarded-Host", "evil.example"], ["Origin",
                      "http://evil.example"], ["If-Modified-Since", "x"])  # fmt: skip
        return get | {"headers": [list(random.choice(others))]}
    raw = (
        "\x16\x03\x01\x02\x00\x01\x00",
        "GET",
        "GET /",
        "GET / HTTP/9.9\r\n\r\n",
        "\r\n\r\n\r\n",
        "GET / HTTP/1.1\r\nA",
        " GET / HTTP/1.1\r\n\r\n",
        "\x00" * 1000,
    )
    return get | {"raw": random.choice(raw), "whole": False}


def _head(honest: Honest, case: dict[str, Any]) -> bytes:
    if "raw" in case:
        return case["raw"].encode("latin-1")
    lines = [f"{case['method']} {case['path']} HTTP/1.1", f"Host: {case.get('host', f'{honest.host}:{honest.port}')}"]
    named = {name.lower() for name, _ in case["headers"]}
    if honest.cookie and case["token"] and "cookie" not in named:
        lines.append(f"Cookie: {honest.cookie}")
    lines += [f"{name}: {value}" for name, value in case["headers"]]
    body = edits.payload(case["body"])
    if body and not named & {"content-length", "transfer-encoding"}:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode("utf-8", "surrogatepass")


def _request(path: str, honest: Honest, body: bytes = b"") -> bytes:
    """An honest request."""
    encoded = {"base64": base64.b64encode(body).decode()}
    return (
        _head(
            honest, {"method": "POST" if body else "GET", "path": path, "headers": [], "token": True, "body": encoded}
        )
        + body
    )


def _exchange(honest: Honest, request: bytes, whole: bool = True) -> bytes | None:
    """Send bytes and read the answer to its end; None if there is none in time. whole: False: nothing follows them."""
    with socket.create_connection((honest.host, honest.port), timeout=WAIT_S) as connection:
        connection.settimeout(WAIT_S if whole else 0.3)
        data = b""
        try:
            connection.sendall(request)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(1 << 16):
                data += more
        except TimeoutError:
            return data or None
        except OSError:  # the server closed the connection
            return data
        return data


def _status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return int(found[1]) if found else 0
