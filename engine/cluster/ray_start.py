"""Connect to Ray for the time of a command: a small Ray of its own on this machine, or a cluster that is there.

The embedded Ray has no dashboard, sends no usage statistics, and ends with the process.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator

from gradstore.errors import RequestError, check_number, first_line, needing

log = logging.getLogger(__name__)

LOCAL = "local"
"""The address of an embedded Ray."""
OBJECT_STORE = 1 << 29
"""Bytes of shared memory for an embedded Ray; windows and sketches in flight are far smaller."""


@contextlib.contextmanager
def connected(address: str, cpus: int, object_store: int = OBJECT_STORE) -> Iterator[None]:
    """Ray is initialised inside; it is shut down at the end, unless the caller had started it before.

    Standard output stays clean: Ray prints there when a worker is lost. Inside, what is printed goes to standard error.
    address: `local`, `auto` for the cluster that this machine belongs to, or HOST:PORT. cpus: CPUs that an embedded Ray
    must offer, also more than the machine has. RequestError if Ray is not installed or no cluster answers.
    """
    check_number("cpus", cpus, least=1)
    with needing("--ray", "gradstore[ray]"):
        import ray
    if ray.is_initialized():
        yield
        return
    if address.startswith("ray://"):
        raise RequestError(
            f"--ray {address}: Ray's client is not supported; start the command on a machine of the cluster with "
            "--ray auto, for instance as `ray job submit -- gradstore ...`"
        )
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address == LOCAL:
            offered = max(cpus, os.cpu_count() or 1)
            ray.init(address=LOCAL, num_cpus=offered, object_store_memory=object_store, **quiet)
        else:
            del quiet["include_dashboard"]
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        hint = "" if address == LOCAL else "; `--ray local` starts one on this machine"
        raise RequestError(f"--ray {address}: no Ray could be reached: {first_line(error)}{hint}") from None
    with contextlib.redirect_stdout(_ToStandardError()):
        try:
            yield
        finally:
            ray.shutdown()  # It prints what its threads still had to say.


class _ToStandardError(io.TextIOBase):
    """Passes text on to standard error; Ray's own reports of lost workers only to the log, for debugging."""

    def __init__(self) -> None:
        self._dropped = False

    def write(self, text: str) -> int:
        if "(raylet)" in text or (self._dropped and text == "\n"):
            self._dropped = text != "\n"
            log.debug("%s", text)
        else:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()
