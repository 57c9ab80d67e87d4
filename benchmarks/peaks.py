"""Exit status, time and peak memory of a command.

A small process of its own starts the command. Linux gives a started program the peak of the process that started it as
its least value, so that a caller with torch loaded would hide what a light command takes.
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
    """How a command ended and what it took."""

    status: int
    """Exit status; -N where signal N ended it."""
    seconds: float
    """From start to end, imports included."""
    processor: float
    """Seconds of all threads together; what other processes do moves them less."""
    peak: int
    """Largest resident size, bytes."""
    out: str
    """Standard output."""
    said: str
    """Standard error."""


def outcome(command: Sequence[str]) -> Outcome:
    """Runs a command to its end, whatever that is."""
    helper = [sys.executable, __file__, *command]
    done = subprocess.run(helper, check=True, capture_output=True, text=True)
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return Outcome(**json.loads(last), out=out, said=done.stderr)


def _main(command: Sequence[str]) -> None:
    """Prints the command's output and, on a last line, how it ended and what it took."""
    started = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    took = {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}
    print("\n" + json.dumps({"status": os.waitstatus_to_exitcode(status), **took}))


if __name__ == "__main__":
    _main(sys.argv[1:])
