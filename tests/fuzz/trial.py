"""A try: what a target may do with gradstore in it, and what counts as a failure.

Allowed are a right answer, and one clear line: exit status 0, 1 or 2 of a command, a GradstoreError of the Python API.
Everything else is a failure of one of these kinds:

    traceback   another exception
    line        an error that is not one line, or is longer than a reader takes in
    control     control characters of the data in the output
    changed     a command that failed, or one that only reads, changed the store
    outside     a file beside the store was read, written or removed, or its content was shown
    wrong       the answer is not the right one
    memory      more than a gigabyte beyond what the process had
    hang, died  the process did not come back, or ended
"""

import faulthandler
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from gradstore.cli import main
from gradstore.errors import GradstoreError
from tests.fuzz.room import Room, changes, store_picture

T = TypeVar("T")

LONGEST_LINE = 2000
"""Characters of an error message."""
MEMORY = 1 << 30
"""Bytes that one step may take beyond what the process had."""
ROOT = Path(__file__).resolve().parents[2]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Failure:
    """What went wrong in one step of a try."""

    kind: str
    where: str
    """Exception and the innermost place in the repository, or the command: failures that are equal here are one."""
    text: str


@dataclass
class Trial:
    """One try in its room."""

    room: Room
    limit_s: float
    """Seconds that one step may take."""
    hung: TextIO
    """Where the stacks of a step are written that takes longer; the process then ends."""
    failures: list[Failure] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    """What each step came to: ok, 1, 2, or the kind of its failure."""

    @property
    def folder(self) -> Path:
        return self.room.folder

    @property
    def outside(self) -> Path:
        return self.room.outside

    def command(self, *arguments: object, store: Path | None = None, reads: bool = True) -> tuple[int | None, str, str]:
        """Run `gradstore ARGUMENTS` in this process: exit status (None after a failure), output, errors.

        store: must be as it was after a failure; and always, if the command only reads.
        """
        out, err = _Captured(), _Captured()
        name = str(arguments[0])

        def run() -> int:
            sys.argv = ["gradstore", *map(str, arguments)]
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    main()
            except SystemExit as stop:
                return 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
            return 0

        before = None if store is None else store_picture(store)
        ended, status = self._step(name, run)
        output, errors = out.text(), err.text()
        if ended:
            self.check_command(name, status, output if "--json" not in arguments else "", errors)
            self.shown(name, output)
        if store is not None and before is not None and (reads or status != 0):
            self._check_store(name, before, store)
        return status, output, errors

    def call(
        self,
        name: str,
        function: Callable[..., T],
        *arguments: Any,
        store: Path | None = None,
        reads: bool = True,
        **named: Any,
    ) -> T | None:
        """Call a function of the Python API; None after an error. store, reads: as for `command`."""
        before = None if store is None else store_picture(store)
        said: list[str] = []

        def run() -> T | None:
            try:
                return function(*arguments, **named)
            except GradstoreError as error:
                said.append(str(error))
            except OSError as error:
                if error.filename is None:
                    raise
                said.append(f"{error.filename}: {error.strerror}")
            return None

        _, value = self._step(name, run)
        for text in said:
            self.outcomes[-1] = "error"
            self._check_line(name, text)
        if store is not None and before is not None and (reads or said):
            self._check_store(name, before, store)
        return value

    def wrong(self, where: str, text: str) -> None:
        """Record an answer that is not the right one."""
        self.fail("wrong", where, text)

    def fail(self, kind: str, where: str, text: str) -> None:
        """Record a failure."""
        self.failures.append(Failure(kind, where, text[-4000:]))
        if self.outcomes:
            self.outcomes[-1] = kind

    def _step(self, name: str, function: Callable[[], T]) -> tuple[bool, T | None]:
        self.outcomes.append("ok")
        self.room.read()
        with measured() as grown, _in_time(self.limit_s, self.hung):
            try:
                return True, function()
            except MemoryError as error:
                self.fail("memory", place(error), _told(error))
            except BaseException as error:  # noqa: BLE001 - SystemExit in the API, and Rust's panics, are failures too
                self.fail("traceback", place(error), _told(error))
            finally:
                read = self.room.read()
                if read:
                    self.fail("outside", f"{name}: reads a file beside the store", ", ".join(read))
                more = grown()
                if more > MEMORY:
                    self.fail("memory", name, f"{more >> 20} MiB more than before")
        return False, None

    def check_command(self, name: str, status: int | None, output: str, errors: str) -> None:
        """Check what a command printed and its exit status."""
        self.outcomes[-1] = str(status) if status else "ok"
        if status not in (0, 1, 2):
            self.fail("line", f"{name}: exit status {status}", errors)
        if status:
            lines = errors.splitlines()
            told = [line for line in lines if line.startswith("gradstore: ")]
            findings = name == "verify" and status == 1 and not told and output.strip()
            if not findings and (len(told) != 1 or lines[-1] != told[0]):
                self.fail("line", f"{name}: {len(told)} lines of error", errors)
            for line in told:
                self._check_line(name, line)
        if "Traceback (most recent call last)" in errors + output:
            self.fail("traceback", f"{name}: printed", errors + output)
        found = _CONTROL.search(errors + output)
        if found:
            self.fail(
                "control", f"{name}: {'output' if found[0] in output else 'errors'}", repr((errors + output)[:2000])
            )
        self.shown(name, errors)

    def _check_line(self, name: str, text: str) -> None:
        if "\n" in text or len(text) > LONGEST_LINE:
            self.fail(
                "line", f"{name}: an error of {'several lines' if chr(10) in text else 'too many characters'}", text
            )
        self.shown(name, text)

    def shown(self, where: str, text: str) -> None:
        """Check an output: the canaries' content must not be in it."""
        if self.room.secret in text:
            self.fail("outside", f"{where}: shows a file beside the store", text)

    def _check_store(self, name: str, before: dict, store: Path) -> None:
        found = changes(before, store_picture(store))
        if found:
            self.fail("changed", f"{name}: {re.sub(r'[0-9a-f]{8,}|[0-9]+', 'N', found[0])}", "; ".join(found[:20]))


class _Captured(io.TextIOWrapper):
    """A text stream in memory that behaves as a process's own, in UTF-8."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined, no-any-return]


def place(error: BaseException) -> str:
    """The exception's type and where it left gradstore: the innermost frame of the repository, without tests."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_ours(frame.filename)]
    frame = frames[-1] if frames else None
    where = "" if frame is None else f" in {short(frame.filename)}:{frame.name}"
    return f"{type(error).__name__}{where}"


def short(filename: str) -> str:
    """A file's path within the repository."""
    return os.path.relpath(os.path.realpath(filename), ROOT)


def is_ours(filename: str) -> bool:
    """Whether a file is one of the repository's own, without its tests."""
    name = short(filename)
    return not name.startswith(("..", "tests", ".venv"))


def _told(error: BaseException) -> str:
    whole = "".join(traceback.format_exception(error))
    return whole if len(whole) < 3500 else f"{whole[:500]}\n...\n{whole[-2900:]}"


@contextmanager
def _in_time(limit_s: float, hung: TextIO) -> Any:
    """Ends the process when the block takes longer, with every thread's stack in the file."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=hung)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def measured() -> Any:
    """Yields a function that gives the bytes by which this process's memory peaked above its size at the start."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = memory("VmRSS")
    yield lambda: max(0, memory("VmHWM") - before)


def memory(name: str, process: int | str = "self") -> int:
    """A figure of a process's /proc/PID/status in bytes."""
    with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0
