"""Exit status, time and peak memory of a command.

A small helper process starts the command. On Linux, a program's reported peak is at least that of the process that
started it. So a caller with torch loaded would hide the peak of a light command.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Exit status, costs and output of a command."""

    status: int
    """Exit status; -N if signal N ended it."""
    seconds: float
    """Wall seconds from start to end, imports included."""
    processor: float
    """Processor seconds of all threads together; other processes affect them less."""
    peak: int
    """Peak resident size, bytes."""
    out: str
    """Standard output."""
    said: str
    """Standard error."""


def outcome(command: Sequence[str]) -> Outcome:
    """Run a command to its end, whether it succeeds or fails."""
    helper = [sys.executable, __file__, *command]
    done = subprocess.run(helper, check=True, capture_output=True, text=True)
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return Outcome(**json.loads(last), out=out, said=done.stderr)


def _main(command: Sequence[str]) -> None:
    """Print the command's output and, on the last line, its exit status and costs as JSON."""
    started = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    took = {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}
    print("\n" + json.dumps({"status": os.waitstatus_to_exitcode(status), **took}))


if __name__ == "__main__":
    _main(sys.argv[1:])
