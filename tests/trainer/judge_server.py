"""A chat completions server on loopback for the judge's tests, which can misbehave in any way."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-proj-a-Secret_of+this/test-0123456789"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news here."""


class Endpoint:
    """The server; `answer(number, body)` decides what each request gets.

    It is a reply's text; or (status, content); or (status, content, headers); or a function of the handler, which
    writes to its `wfile` whatever it likes.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Callable[[int, dict[str, Any]], Any] = lambda number, body: "VERDICT: CORRECT"
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.paths.append(self.path)
                    endpoint.under_way += 1
                    endpoint.most_under_way = max(endpoint.most_under_way, endpoint.under_way)
                try:
                    answer = endpoint.answer(number, body)
                finally:
                    with endpoint._lock:
                        endpoint.under_way -= 1
                if callable(answer):
                    self.close_connection = True
                    answer(self)
                    return
                status, content, *more = answer if isinstance(answer, tuple) else (200, reply(answer))
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                if status != 200:
                    headers["retry-after-ms"] = "5"
                self.send_response(status)
                for name, value in (headers | (more[0] if more else {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, number: int = 0) -> str:
        """The question of a request."""
        return self.requests[number]["messages"][0]["content"]


def reply(text: Any, **choice: Any) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
    }


def problem(number: int = 0, truth: str = "the tide") -> dict[str, Any]:
    """A problem for the judge."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What moves {number} boats?"}]
    return {"id": f"p{number}", "source": "s", "prompt": prompt, "ground_truth": truth, "tags": [], "extra": {}}


def box(answer: object) -> str:
    """A response with a final answer."""
    return f"I think so. \\boxed{{{answer}}}"
