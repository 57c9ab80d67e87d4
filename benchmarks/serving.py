"""What an honest reader of `gradstore serve` waits while others misuse it, for docs/reliability.md.

    python -m benchmarks.serving [--seconds 60] [--problems 100000] [--steps 8] [--dim 512] [--store FOLDER]

The store holds random sketches. Every half second an honest client asks for the main page's data (the rank view, with
the token) on a new connection. Meanwhile, one after the other and then together: clients that never finish a request,
clients that send bodies of 1 GB, and readers that ask without a pause for rankings, text searches, comparisons and
problems. Clients run in another process, on the same machine. Before that, fifty people read: each asks for a ranking,
or for a problem and what is near it, and reads for two to six seconds (`--calm-only`: these alone).
"""

import http.client
import json
import multiprocessing
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import gradstore

_DASH = "/_dash-update-component"
_WORDS = ["apple", "river", "seven", "train", "circle", "number", "speed", "water", "price", "triangle"]


def write_store(path: Path, n: int, steps: int, dim: int) -> None:
    """A pool measured at every step, and a benchmark of 64 problems."""
    store = gradstore.create(path, dim=dim, fingerprint={"made": "at random"})
    draw = np.random.default_rng(0)
    for name, size in (("pool", n), ("bench", 64)):
        words = draw.choice(_WORDS, (size, 20))
        store.add_problems(
            name,
            [
                {"id": f"{name}{p:06d}", "prompt": " ".join(words[p]), "source": f"source {p % 5}", "tags": ["tag"]}
                for p in range(size)
            ],
        )
        ids = [f"{name}{p:06d}" for p in range(size)]
        for step in range(steps):
            with store.writer(name, step=step) as writer:
                for first in range(0, size, 10_000):
                    some = ids[first : first + 10_000]
                    rows = draw.standard_normal((len(some), dim), np.float32)
                    writer.append(some, rows, pass_rate=draw.random(len(some)).astype(np.float32))


@contextmanager
def serving(store: Path) -> Iterator[tuple[int, str, int]]:
    """`gradstore serve` as a person starts it: its port, token and process."""
    command = [sys.executable, "-m", "gradstore", "serve", str(store), "--pool", "pool", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError("gradstore serve ended")
            found = re.search(r":(\d+)/\?token=(\S+)", line)
        yield int(found[1]), found[2], process.pid
        process.terminate()


class Client:
    """Asks a server's callbacks, as Dash's pages do."""

    def __init__(self, port: int, token: str) -> None:
        self.port, self.headers = port, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self._known = {spec["output"]: spec for spec in json.loads(self.ask("GET", "/_dash-dependencies")[1])}

    def ask(self, method: str, path: str, body: bytes | None = None, timeout: float = 60) -> tuple[int, bytes]:
        """Status and body of an answer; on the connection of the last one if that is still open."""
        for attempt in range(2):
            kept = self._connection
            try:
                if kept is None:
                    kept = self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
                kept.request(method, path, body, self.headers)
                answer = kept.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                self.close()
                if attempt:
                    raise
        raise AssertionError

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def call(self, named: str, values: dict[str, Any]) -> tuple[int, bytes]:
        """Call the callback whose outputs have this name, with the values of controls; the others are empty."""
        output, spec = next((key, spec) for key, spec in self._known.items() if named in key)
        parts = [part.rsplit(".", 1) for part in output.strip(".").split("...")]
        outputs = [{"id": name, "property": key} for name, key in parts]

        def filled(kind: str) -> list[dict]:
            return [{**one, "value": values.get(one["id"])} for one in spec[kind]]

        body = {"output": output, "outputs": outputs if len(outputs) > 1 else outputs[0], "inputs": filled("inputs")}
        body |= {"state": filled("state"), "changedPropIds": [f"{spec['inputs'][0]['id']}.value"]}
        return self.ask("POST", _DASH, json.dumps(body).encode())


def ranking(step: str = "newest", metric: str = "cosine", order: str = "largest", text: str = "") -> dict:
    """Values of the rank view's controls."""
    return {
        "benchmark": "bench", "step": step, "metric": metric, "order": order, "text": text, "sources": [], "tags": [],
        "rates": [0, 1], "states": [], "theme": "light", "ranking-page": 0,
    }  # fmt: skip


def problem(number: int, step: str = "newest", metric: str = "cosine") -> dict:
    """Values of the problem view's controls."""
    values = {"problem-id": f"pool{number:06d}", "problem-metric": metric, "problem-step": step}
    return {**values, "problem-rollouts": "newest", "theme": "light"}


def read_calmly(
    port: int, token: str, seed: int, steps: int, problems: int, end: float, waits: list, told: Counter
) -> None:
    """A person: a ranking or a problem (then its nearest), and two to six seconds of reading."""
    draw, client = random.Random(seed), Client(port, token)
    time.sleep(draw.uniform(0, 4))
    while time.monotonic() < end:
        client.close()
        step, number = str(draw.randrange(steps)), draw.randrange(problems)
        asked = [("ranking-table", ranking(step, draw.choice(["cosine", "dot"])))]
        if draw.random() < 0.5:
            asked = [
                ("problem-view", problem(number, step)),
                ("problem-nearest", {"problem-shown": [f"pool{number:06d}", int(step)]}),
            ]
        for name, values in asked:
            start = time.perf_counter()
            try:
                told[f"{name} {client.call(name, values)[0]}"] += 1
            except (OSError, http.client.HTTPException) as error:
                told[type(error).__name__] += 1
            waits.append((name, time.perf_counter() - start))
        time.sleep(draw.uniform(2, 6))


def people(port: int, token: str, steps: int, problems: int, seconds: float, found: Any) -> None:
    """Fifty readers in this process; puts their waits and answers."""
    end, told, waits = time.monotonic() + seconds, Counter[str](), list[tuple[str, float]]()
    given = [(port, token, seed, steps, problems, end, waits, told) for seed in range(50)]
    threads = [threading.Thread(target=read_calmly, args=one, daemon=True) for one in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 60 - time.monotonic()))
    found.put((list(waits), dict(told)))


def read_on(port: int, token: str, seed: int, steps: int, end: float, told: Counter) -> None:
    """A reader that asks without a pause: six in ten rankings, two searches, one comparison, one problem."""
    draw, client = random.Random(seed), Client(port, token)
    while time.monotonic() < end:
        step, metric = str(draw.randrange(steps)), draw.choice(["cosine", "dot", "fisher"])
        what = draw.random()
        try:
            if what < 0.6:
                status, _ = client.call("ranking-table", ranking(step, metric, draw.choice(["largest", "smallest"])))
            elif what < 0.8:
                text = " ".join(draw.sample(_WORDS, 2))
                status, _ = client.call("ranking-table", ranking(step, metric, text=text))
            elif what < 0.9:
                values = {"left-benchmark": "bench", "right-benchmark": "bench", "left-step": step}
                values |= {"right-step": str(draw.randrange(steps)), "compare-metric": metric, "theme": "light"}
                status, _ = client.call("comparison", values)
            else:
                status, _ = client.call("problem-view", problem(draw.randrange(1000), step, metric))
            told[str(status)] += 1
        except (OSError, http.client.HTTPException) as error:
            told[type(error).__name__] += 1


def never_finish(port: int, token: str, end: float, told: Counter) -> None:
    """A client that sends a head or a body byte by byte, and begins anew when it is dropped."""
    begun = random.choice(
        [
            b"",
            b"GET / HTTP/1.1\r\nHost: local",
            f"POST {_DASH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            "Content-Length: 100000\r\n\r\n".encode(),
        ]
    )
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            told["connections"] += 1
            client.sendall(begun)
            while time.monotonic() < end:
                time.sleep(2)
                client.sendall(b"x")


def send_much(port: int, token: str, end: float, told: Counter) -> None:
    """A client that sends a body of 1 GB, with the token and without, announced and in chunks."""
    part = b"x" * (1 << 20)
    while time.monotonic() < end:
        chunked = random.random() < 0.5
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000"
        known = f"Authorization: Bearer {token}\r\n" if random.random() < 0.5 else ""
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            told["bodies"] += 1
            client.sendall(f"POST {_DASH} HTTP/1.1\r\nHost: localhost\r\n{known}{length}\r\n\r\n".encode())
            for _ in range(1000):
                client.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                told["megabytes"] += 1


def misuse(kind: str, port: int, token: str, steps: int, seconds: float, found: Any) -> None:
    """Run the clients of a kind in this process."""
    end, told = time.monotonic() + seconds, Counter[str]()
    work: list[tuple] = []
    if kind in ("half-open", "together"):
        work += [(never_finish, port, token, end, told)] * 200
    if kind in ("bodies", "together"):
        work += [(send_much, port, token, end, told)] * 8
    if kind in ("readers", "together"):
        work += [(read_on, port, token, seed, steps, end, told) for seed in range(50)]
    threads = [threading.Thread(target=one, args=given, daemon=True) for one, *given in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 20 - time.monotonic()))
    found.put(dict(told))


def honest(port: int, token: str, seconds: float, pid: int) -> tuple[list[float], Counter, int]:
    """Seconds and statuses of the main page's data, asked for every half second on a new connection.

    And the most memory that the server had of its own, in bytes; the store's files, which it maps, are not counted.
    """
    client, waits, statuses, most = Client(port, token), [], Counter[str](), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.close()
        start = time.perf_counter()
        try:
            statuses[str(client.call("ranking-table", ranking())[0])] += 1
        except (OSError, http.client.HTTPException) as error:
            statuses[type(error).__name__] += 1
        waits.append(time.perf_counter() - start)
        time.sleep(max(0.0, 0.5 - waits[-1]))
        most = max(most, _own_bytes(pid))
    return waits, statuses, most


def _own_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def spread(waits: list[float]) -> str:
    """Number, median and 95th percentile of waits in seconds."""
    middle, high = (1000 * np.quantile(waits, (0.5, 0.95))).tolist()
    return f"{len(waits)} answers, median {middle:.0f} ms, p95 {high:.0f} ms"


def main(
    seconds: Annotated[float, typer.Option(help="Of all kinds together; each alone takes a sixth.")] = 60,
    problems: Annotated[int, typer.Option(help="Problems of the pool.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps at which all are measured.")] = 8,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 512,
    store: Annotated[Path | None, typer.Option(help="Store to keep; default: a temporary one.")] = None,
    calm_only: Annotated[bool, typer.Option(help="Measure the fifty readers alone.")] = False,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = store or Path(folder) / "store"
        if not path.exists():
            write_store(path, problems, steps, dim)
        with serving(path) as (port, token, pid):
            found_people: Any = multiprocessing.Queue()
            process = multiprocessing.Process(target=people, args=(port, token, steps, problems, seconds, found_people))
            process.start()
            waits_of_people, told = found_people.get(timeout=seconds + 120)
            process.join(timeout=5)
            for name in ("ranking-table", "problem-view", "problem-nearest"):
                print(f"50 readers, {name}: {spread([wait for of, wait in waits_of_people if of == name])}")
            spent = spread([wait for _, wait in waits_of_people])
            print(f"50 readers, all: {spent}; {told}; server's own memory {_own_bytes(pid) / 1e6:.0f} MB", flush=True)
            if calm_only:
                return
            print("| others | honest requests | median | worst | answers | server's own memory | others got |")
            print("|---|---|---|---|---|---|---|")
            for kind in ("none", "half-open", "bodies", "readers", "together"):
                lasting = seconds if kind == "together" else seconds / 6
                found: Any = multiprocessing.Queue()
                given = (kind, port, token, steps, lasting, found)
                others = multiprocessing.Process(target=misuse, args=given, daemon=True)
                others.start()
                waits, statuses, memory = honest(port, token, lasting, pid)
                told = found.get(timeout=60)
                others.join(timeout=5)
                print(
                    f"| {kind} | {len(waits)} | {1000 * np.median(waits):.0f} ms | {1000 * max(waits):.0f} ms | "
                    f"{dict(statuses)} | {memory / 1e6:.0f} MB | {told} |",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
