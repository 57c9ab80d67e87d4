"""Local browser app to explore a store, made with Dash: `serve(store)`.

catalogue.py computes the results as plain values; ranking, problem and comparison show them; access.py decides who may
ask, turns.py how much is computed at once, and serving.py how long a client may take.
"""

import errno
import gc
import sys
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
    token: bool = True,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the explorer until interrupted; `tell` is called once with the address.

    pool, benchmarks, rollouts, tokenizer: as for the report. host: loopback, or another address. port: 0 takes a free
    one. token: a token is created that every request must carry; it is part of the address. False: every user of this
    machine can read the problems; on loopback only. RequestError if the port is taken or a required package is not
    installed.
    """
    check_number("port", port, least=0, most=65535)
    with needing("the explorer", "gradstore[serve]"):
        import dash  # noqa: F401
        import waitress  # noqa: F401
    from gradstore.analysis.explorer.access import Access, is_loopback, new_token
    from gradstore.analysis.explorer.app import make_app
    from gradstore.analysis.explorer.catalogue import Catalogue
    from gradstore.analysis.explorer.serving import listen, make_server
    from gradstore.analysis.report.findings import find
    from gradstore.analysis.report.transcripts import Transcripts

    if not token and not is_loopback(host):
        raise RequestError(f"{host}: other machines can reach it, so a token is needed: leave --no-token out")
    found = find(store, pool, benchmarks)
    shown = Transcripts(rollouts, tokenizer) if rollouts else None
    try:
        bound = listen(host, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken; choose another with --port" if taken else f"cannot be opened: {error.strerror}"
        raise RequestError(f"{host}:{port} {reason}") from None
    port = bound.getsockname()[1]
    access = Access(new_token() if token else None, is_loopback(host), port)
    catalogue = Catalogue(store, found.pool, found.benchmarks, shown)
    for benchmark in found.benchmarks[:1]:  # the first page, which would wait for the first scan
        catalogue.scored(benchmark, None, "cosine")
    server = make_server(make_app(catalogue, access).server, access, bound)
    name = f"[{host}]" if ":" in host else host
    tell(f"http://{name}:{port}/" + (f"?token={access.token}" if token else ""))
    sys.setswitchinterval(0.001)  # a scan's thread then gives way to answers sooner
    gc.freeze()  # garbage collection, which stops all threads, need not walk through what is loaded so far
    try:
        server.run()
    finally:
        server.close()
