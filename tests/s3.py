"""An S3 server on the loopback interface that counts what is asked of it (moto); nothing leaves the machine."""

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

BUCKET = "stores"


@dataclass
class S3:
    """The server: its port, a client, and every request since `forget`."""

    port: int
    client: Any
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path)."""
    received: int = 0
    """Bytes of the bodies it was sent."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead there."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
        }

    def forget(self) -> None:
        self.requests.clear()
        self.received = 0

    def objects(self, prefix: str) -> dict[str, int]:
        """Key below the prefix -> size."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {one["Key"].removeprefix(prefix): one["Size"] for page in pages for one in page.get("Contents", ())}


@contextmanager
def s3_server() -> Iterator[S3]:
    """Context manager: a server with one bucket."""
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    serving = pytest.importorskip("werkzeug.serving")
    application = moto.DomainDispatcherApplication(moto.create_backend_app)

    def counted(environ: dict, start: Any) -> Any:
        server.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        server.received += int(environ.get("CONTENT_LENGTH") or 0)
        return application(environ, start)

    class Quiet(serving.WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            """Nothing."""

    http = serving.make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{http.server_port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    server = S3(http.server_port, client)
    thread.start()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http.server_port}/moto-api/reset", b""):
            pass  # What earlier servers of this process hold.
        client.create_bucket(Bucket=BUCKET)
        server.forget()
        yield server
    finally:
        http.shutdown()
        thread.join()
