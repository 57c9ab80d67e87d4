"""The process that keeps a grader at work: imports the verifiers once, forks a grader, watches it, forks the next one.

It never looks into an answer: batches pass through as they are. It ends when its trainer closes the pipe or dies, and
takes grader and scratch folder with it. Started as `python -m`, never forked from a process with threads or a GPU.
"""

import gc
import math
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradstore.errors import first_line
from gradstore.trainer.sampling.workers import frames
from gradstore.trainer.sampling.workers.confinement import missing
from gradstore.trainer.sampling.workers.grader import Grade, loaded, serve

LONGEST_ANSWER = 1 << 16
"""Longest message of a grader in bytes; honest ones have a hundred."""


@dataclass
class _Grader:
    """A forked grader, as its keeper sees it."""

    pid: int
    requests: int
    answers: int
    inbox: frames.Inbox = field(default_factory=lambda: frames.Inbox(LONGEST_ANSWER))
    graded: int = 0
    """Items it has answered in its life."""

    def kill(self) -> int:
        """End it and all that it started; returns the status that it ended with."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)  # it has not begun its own session yet, or is a zombie
        for fd in (self.requests, self.answers):
            os.close(fd)
        return os.waitpid(self.pid, 0)[1]


class Keeper:
    """Grades batches by a grader that is replaced whenever it overruns or ends."""

    def __init__(self, trainer: int, role: str, grade: Grade, scratch: str, limits: Mapping[str, float]) -> None:
        self._trainer, self._role, self._grade, self._scratch, self._limits = trainer, role, grade, scratch, limits
        self._grader: _Grader | None = None

    def results(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One result per item, in order."""
        found: list[dict[str, Any]] = []
        items = batch["items"]
        while len(found) < len(items):
            grader = self._grader = self._grader or self._forked()
            reason = self._run(grader, {"problems": batch["problems"], "items": items[len(found) :]}, found, len(items))
            if reason is None:
                continue
            status = grader.kill()
            self._grader = None
            # An answer that ends its grader, or fills its memory, is graded once more by a new one: the old one may
            # have suffered from the answers before it.
            if reason and (reason != "ended" or not grader.graded or _overran(status)):
                found.append({"stopped": _in_words(reason, status, self._limits["seconds"])})
        return found

    def close(self) -> None:
        """End the grader."""
        if self._grader is not None:
            self._grader.kill()
            self._grader = None

    def _run(self, grader: _Grader, batch: Mapping[str, Any], found: list[dict[str, Any]], total: int) -> str | None:
        """Send a batch and collect results. Returns why the next item has none; "" for no fault; None at the end."""
        first = len(found)
        rest = memoryview(frames.encoded(batch))
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._trainer, selectors.EVENT_READ)
            waiting.register(grader.answers, selectors.EVENT_READ)
            waiting.register(grader.requests, selectors.EVENT_WRITE)
            deadline = time.monotonic() + self._limits["wall"]
            while len(found) < total:
                events = waiting.select(max(0.0, deadline - time.monotonic()))
                ready = {key.fd for key, _ in events}
                if self._trainer in ready:  # it sends nothing during a batch: it has gone
                    raise SystemExit
                if grader.requests in ready:
                    try:
                        rest = rest[os.write(grader.requests, rest) :]
                    except BrokenPipeError:
                        rest = rest[:0]
                    if not rest:
                        waiting.unregister(grader.requests)
                if grader.answers in ready:
                    data = os.read(grader.answers, 1 << 16)
                    if not data:
                        return "ended"
                    try:
                        for message in grader.inbox.take(data):
                            result = checked(message, len(found) - first, total - first)
                            if result is None:
                                return "forged"
                            retires = message.get("retire") is True
                            if not (retires and "stopped" in result and grader.graded):
                                found.append(result)
                            grader.graded += 1
                            if retires:
                                return ""
                    except frames.BrokenFrameError:
                        return "forged"
                    deadline = time.monotonic() + self._limits["wall"]
                elif time.monotonic() >= deadline:
                    return f"waited longer than {self._limits['wall']:g} seconds"
        return None

    def _forked(self) -> _Grader:
        theirs, requests = os.pipe()
        answers, written = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                os.dup2(theirs, 3)
                os.dup2(written, 4, inheritable=True)
                os.closerange(5, os.sysconf("SC_OPEN_MAX"))
                os.chdir(self._scratch)
                serve(3, 4, self._role, self._grade, self._scratch, self._limits)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(written)
        os.set_blocking(requests, False)
        return _Grader(pid, requests, answers)


def checked(message: Any, place: int, total: int) -> dict[str, Any] | None:
    """The result in a grader's message about the item at `place` of `total`; None if it is something else."""
    if not isinstance(message, dict) or message.get("n") != place or place >= total:
        return None
    score = message.get("score")
    if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
        return {"score": float(score)}
    for kind in ("unusable", "stopped"):
        if isinstance(message.get(kind), str):
            return {kind: message[kind][:300]}
    return None


def _overran(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU


def _in_words(reason: str, status: int, seconds: float) -> str:
    if reason == "forged":
        return "its grader sent something else than a score"
    if reason != "ended":
        return f"its grading {reason}"
    if os.WIFSIGNALED(status):
        if _overran(status):
            return f"its grading took longer than {seconds:g} seconds"
        return f"its grader was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"its grader ended with status {os.waitstatus_to_exitcode(status)}"


def main() -> None:
    """Read the role from standard input, then batches; write results to what was standard output."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)  # verifiers print; only these two pipes lead out
    os.close(nothing)
    role = frames.read(requests)
    if role is None:
        return
    try:
        grade = loaded(role["role"], role["spec"])
    except Exception as error:  # noqa: BLE001 - whatever an import raises; the trainer says it
        frames.write(answers, {"failed": f"{type(error).__name__}: {first_line(error)}"})
        return
    gc.collect()
    gc.freeze()  # forked graders share what is there now
    scratch = tempfile.mkdtemp(prefix="gradstore-rewards-")
    os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = scratch
    keeper = Keeper(requests, role["role"], grade, scratch, role["limits"])
    try:
        frames.write(answers, {"ready": True, "missing": missing(), "scratch": scratch})
        while batch := frames.read(requests):
            frames.write(answers, {"results": keeper.results(batch)})
    except BrokenPipeError:
        pass
    finally:
        keeper.close()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
