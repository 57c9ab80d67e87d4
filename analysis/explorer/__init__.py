"""Local browser app to explore a store, made with Dash: `serve(store)`.

catalogue.py computes the results as plain values; ranking, problem and comparison show them; access.py controls who may
connect.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.errors import RequestError, check_number, needing

if TYPE_CHECKING:
    from gradstore import Store

HOST, PORT = "127.0.0.1", 8050


def serve(
    store: "Store",
    *,
    pool: str | None = None,
    benchmarks: Sequence[str] = (),
    rollouts: Sequence[str | Path] = (),
    tokenizer: Any = None,
    host: str = HOST,
    port: int = PORT,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the explorer until interrupted; `tell` is called once with the address.

    pool, benchmarks, rollouts, tokenizer: as for the report. host: loopback, or another address; then a token is
    created that every request must carry. port: 0 takes a free one. RequestError if the port is taken or a required
    package is not installed.
    """
    check_number("port", port, least=0, most=65535)
    with needing("the explorer", "gradstore[serve]"):
        import dash  # noqa: F401
        from waitress.server import create_server
    from gradstore.analysis.explorer.access import is_loopback, new_token
    from gradstore.analysis.explorer.app import make_app
    from gradstore.analysis.explorer.catalogue import Catalogue
    from gradstore.analysis.report.findings import find
    from gradstore.analysis.report.transcripts import Transcripts

    found = find(store, pool, benchmarks)
    shown = Transcripts(rollouts, tokenizer) if rollouts else None
    token = None if is_loopback(host) else new_token()
    app = make_app(Catalogue(store, found.pool, found.benchmarks, shown), token)
    try:
        server = create_server(app.server, host=host, port=port, threads=4, ident=None)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken; choose another with --port" if taken else f"cannot be opened: {error.strerror}"
        raise RequestError(f"{host}:{port} {reason}") from None
    name = f"[{host}]" if ":" in host else host
    tell(f"http://{name}:{server.effective_port}/" + ("" if token is None else f"?token={token}"))
    try:
        server.run()
    finally:
        server.close()
