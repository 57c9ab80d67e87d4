"""The explorer's server stays up: what slow, greedy and foreign clients get, and what others wait meanwhile."""

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from gradstore.analysis.explorer import serve, serving, turns
from gradstore.analysis.explorer.access import MOST_BODY, Access, guard
from gradstore.analysis.explorer.serving import Server, listen, make_server
from gradstore.analysis.explorer.turns import PATH, Answers, BusyError, Line, Turns
from gradstore.errors import RequestError

TOKEN = "secret-token"
RIGHT = f"Authorization: Bearer {TOKEN}\r\n"


def hello(environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
    """Answers with the number of bytes of the body, or with as many bytes as the address asks for."""
    n_bytes = int(environ["QUERY_STRING"] or 0)
    body = b"x" * n_bytes if n_bytes else str(len(environ["wsgi.input"].read())).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


@contextmanager
def running(app: Callable = hello, access: Access | None = None) -> Iterator[Server]:
    access = access or Access(TOKEN)
    server = make_server(guard(app, access), access, listen("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.task_dispatcher.shutdown(timeout=0)
    server.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as found:
        yield found


def connect(server: Server) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.effective_port)), timeout=10)
    return client


def read(client: socket.socket, end: bytes | None = None) -> bytes:
    """Everything until the server ends the connection, or until what came ends in `end`."""
    found = b""
    try:
        while (end is None or not found.endswith(end)) and (data := client.recv(1 << 16)):
            found += data
    except ConnectionResetError:
        pass
    return found


def ask(server: Server, path: str = "/", token: str = TOKEN) -> tuple[int, bytes, float]:
    """Status, body and seconds of an honest request on a connection of its own."""
    start = time.perf_counter()
    client = http.client.HTTPConnection("127.0.0.1", int(server.effective_port), timeout=10)
    client.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    answer = client.getresponse()
    body = answer.read()
    client.close()
    return answer.status, body, time.perf_counter() - start


def test_without_the_token_no_body_is_read(server: Server) -> None:
    """The answer comes when the head is complete, whatever length the head announces."""
    for length in ("Content-Length: 1000000000", "Transfer-Encoding: chunked", "Content-Length: 20"):
        with connect(server) as client:
            client.sendall(f"POST / HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
            assert read(client).startswith(b"HTTP/1.1 401 ")


def test_a_foreign_host_is_refused_before_the_body(server: Server) -> None:
    with connect(server) as client:
        client.sendall(f"POST / HTTP/1.1\r\nHost: evil.example\r\n{RIGHT}Content-Length: 1000000000\r\n\r\n".encode())
        assert read(client).startswith(b"HTTP/1.1 403 ")


def test_large_bodies_are_refused_and_never_on_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced, a body is refused at once; sent in chunks, after the bytes that are allowed."""
    import tempfile

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\n{RIGHT}"
    with connect(server) as client:
        client.sendall(f"{head}Content-Length: 1000000000\r\n\r\n".encode())
        assert read(client).startswith(b"HTTP/1.1 413 ")
    with connect(server) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(64):
                client.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        except OSError:
            pass
        assert read(client).startswith((b"HTTP/1.1 413 ", b""))
    with connect(server) as client:
        client.sendall(f"{head}Connection: close\r\nContent-Length: {MOST_BODY - 1}\r\n\r\n".encode())
        client.sendall(b"x" * (MOST_BODY - 1))
        assert read(client).endswith(str(MOST_BODY - 1).encode())


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * (64 << 10),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
    ids=["large", "long length", "half an address", "half a host", "no HTTP", "unknown coding"],
)
def test_bad_heads_get_an_answer_of_4xx_or_5xx(server: Server, head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server) as client:
        client.sendall(head)
        assert read(client)[:10] in (b"HTTP/1.1 4", b"HTTP/1.0 4", b"HTTP/1.1 5", b"HTTP/1.0 5")
    assert "Traceback" not in caplog.text
    assert ask(server)[0] == 200


def test_half_sent_requests_hold_nobody(server: Server) -> None:
    """More than waitress's limit of 100 connections, half of them in the head and half in the body."""
    with ExitStack() as held:
        for number in range(200):
            client = held.enter_context(connect(server))
            body = f"GET / HTTP/1.1\r\nHost: localhost\r\n{RIGHT}Content-Length: 100\r\n\r\nhalf"
            client.sendall(b"GET / HTTP/1.1\r\nHost: loc" if number % 2 else body.encode())
            if number % 20 == 0:
                status, _, seconds = ask(server)
                assert status == 200
                assert seconds < 10


def test_above_the_limit_those_without_a_token_go_first(server: Server) -> None:
    """The server goes on accepting; a connection that showed the token is kept."""
    server.adj.most = 20
    with ExitStack() as held:
        known = held.enter_context(connect(server))
        request = f"GET / HTTP/1.1\r\nHost: localhost\r\n{RIGHT}\r\n".encode()
        known.sendall(request)
        read(known, b"\r\n0")
        for _ in range(60):
            held.enter_context(connect(server)).sendall(b"GET / HT")
        assert ask(server)[0] == 200
        known.sendall(request)
        assert read(known, b"\r\n0").startswith(b"HTTP/1.1 200 ")
        assert len(server.active_channels) <= 22


@pytest.mark.parametrize("begun", [b"", b"GET / HT", f"GET / HTTP/1.1\r\nHost: localhost\r\n{RIGHT}".encode()])
def test_a_request_that_drips_ends(server: Server, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not prolong it."""
    monkeypatch.setattr(serving, "REQUEST_SECONDS", 1)
    with connect(server) as client:
        start = time.monotonic()
        client.sendall(begun)
        client.settimeout(0.1)
        while time.monotonic() - start < 25:
            try:
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                if begun:
                    client.sendall(b"x")
            except ConnectionError:
                break
        assert time.monotonic() - start < 20


def test_an_answer_that_is_not_taken_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the client's window is closed, so that nothing can be written to it; others are answered meanwhile."""
    monkeypatch.setattr(serving, "STALLED_SECONDS", 1)
    with ExitStack() as held:
        for _ in range(120):
            client = held.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(server.effective_port)))
            client.sendall(f"GET /?5000000 HTTP/1.1\r\nHost: localhost\r\n{RIGHT}\r\n".encode())
        for _ in range(4):
            assert ask(server)[0] == 200  # within ten seconds
            assert sum(one.total_outbufs_len for one in server.active_channels.values()) < 2 * serving.MOST_UNSENT
        end = time.monotonic() + 15
        while server.active_channels and time.monotonic() < end:
            time.sleep(0.1)
        assert not server.active_channels


def test_requests_before_the_answer_end_the_connection(server: Server) -> None:
    """One client cannot queue work without limit."""
    with connect(server) as client:
        client.sendall(f"GET /?1000000 HTTP/1.1\r\nHost: localhost\r\n{RIGHT}\r\n".encode() * 50)
        assert len(read(client)) < 10_000_000
    assert ask(server)[0] == 200


# Turns ---------------------------------------------------------------------------------------------------------------


class Asked:
    """An app that counts its calls, and takes a while."""

    def __init__(self, seconds: float = 0.0, status: str = "200 OK") -> None:
        self.n, self.at_once, self._now, self._seconds, self._status = 0, 0, 0, seconds, status
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        with self._lock:
            self.n += 1
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        start_response(self._status, [])
        return [environ["wsgi.input"].read()]


def post(app: Callable, value: object) -> tuple[str, dict, bytes]:
    body, told = json.dumps(value).encode(), []
    environ = {"PATH_INFO": PATH, "REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(body))}
    parts = app(environ | {"wsgi.input": io.BytesIO(body)}, lambda status, headers, *_: told.append((status, headers)))
    return told[0][0], dict(told[0][1]), b"".join(parts)


def together(n: int, work: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * n

    def one(number: int) -> None:
        found[number] = work(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_an_answer_is_computed_once_until_something_is_published() -> None:
    commit = [0]
    asked = Asked()
    app = Answers(asked, lambda: commit[0])
    for _ in range(3):
        assert post(app, "same")[2] == b'"same"'
    assert asked.n == 1
    commit[0] = 1
    time.sleep(turns.FRESH_SECONDS)
    post(app, "same")
    post(app, "other")
    assert asked.n == 3


def test_many_who_ask_the_same_cost_one_computation() -> None:
    asked = Asked(0.2)
    app = Answers(asked, lambda: 0)
    assert {one[2] for one in together(20, lambda _: post(app, "same"))} == {b'"same"'}
    assert asked.n <= 2  # as many as are computed at once


def test_errors_are_not_kept() -> None:
    asked = Asked(status="500 INTERNAL SERVER ERROR")
    app = Answers(asked, lambda: 0)
    for _ in range(2):
        assert post(app, "x")[0].startswith("500")
    assert asked.n == 2


def test_kept_answers_are_bounded() -> None:
    app = Answers(Asked(), lambda: 0, most_bytes=1000)
    for number in range(100):
        post(app, f"{number:0100d}")
    assert app._n_bytes == sum(len(answer[2]) for answer in app._kept.values()) <= 1000


def test_few_are_computed_at_once_and_too_many_are_told_to_come_back() -> None:
    asked = Asked(0.05)
    app = Answers(asked, lambda: 0, Turns(Line(2, 10, 10.0)))
    found = together(40, lambda number: post(app, number))
    served = [one for one in found if one[0].startswith("200")]
    refused = [one for one in found if one[0].startswith("503")]
    assert len(served) + len(refused) == 40
    assert len(served) >= 10
    assert refused
    assert all(one[1]["Retry-After"] for one in refused)
    assert asked.at_once <= 2
    assert post(app, "later")[0].startswith("200")


def test_nobody_waits_for_ever() -> None:
    line = Line(1, 5, patience=0.1)
    with line.turn(), pytest.raises(BusyError):
        line.turn().__enter__()
    with line.turn():
        pass


def test_who_waits_for_a_scan_lets_others_pass() -> None:
    """Quick answers do not wait for slow ones; the line for scans is bounded too."""
    both = Turns(Line(1, 10, 5.0), Line(1, 2, 5.0))
    done: list[str] = []

    def slow(number: int) -> None:
        try:
            with both.answer(), both.scan():
                time.sleep(0.3)
            done.append("slow")
        except BusyError:
            done.append("busy")

    threads = [threading.Thread(target=slow, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    with both.answer():
        done.append("quick")
    for thread in threads:
        thread.join()
    assert done.index("quick") < done.index("slow")
    assert sorted(done) == ["busy", "busy", "quick", "slow", "slow", "slow"]
    with both.answer(), both.scan():
        pass


def test_a_busy_scan_is_told_to_come_back(history: Any) -> None:
    """From the middle of a callback: not an error of the server."""
    import gradstore
    from gradstore.analysis.explorer.app import make_app
    from gradstore.analysis.explorer.catalogue import Catalogue

    full = Turns(Line(1, 1, 1.0), Line(1, 0, 0.0))
    catalogue = Catalogue(gradstore.open(history.store.path), "pool", ("bench",), turns=full)
    client = make_app(catalogue).server.test_client()
    known = next(one for one in client.get("/_dash-dependencies").json if "comparison" in one["output"])
    values = {"left-benchmark": "bench", "right-benchmark": "bench", "left-step": "0", "right-step": "10"}
    values |= {"compare-metric": "cosine", "theme": "light"}
    inputs = [{**one, "value": values[one["id"]]} for one in known["inputs"]]
    output = {"id": "comparison", "property": "children"}
    body = {"output": "comparison.children", "outputs": output, "inputs": inputs, "changedPropIds": ["theme.data"]}
    answer = client.post(PATH, json=body)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]


# Addresses -----------------------------------------------------------------------------------------------------------


def test_addresses_that_cannot_be_are_one_line(history: Any) -> None:
    with pytest.raises(RequestError, match="no-such-host"):
        serve(history.store, host="no-such-host.invalid", port=0)
    with pytest.raises(RequestError, match="leave --no-token out"):
        serve(history.store, host="0.0.0.0", port=0, token=False)
