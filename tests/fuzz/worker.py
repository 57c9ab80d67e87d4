"""A process that makes many tries of one target: `python -m tests.fuzz.worker TARGET FOLDER PATIENCE`.

It reads {"seed": N} or {"case": {...}} from each line of standard input and answers with one line of JSON. A step that
takes too long ends the process, with its stacks in FOLDER/hung. Memory for data is limited, so that no try takes all.

A target that says `FORKS = True` is tried in a fork of a process that has imported everything and has no threads. When
a try ends the fork, {"ended": STATUS, "hung": STACKS} is the answer, and the next try meets a new one at once.
"""

import json
import os
import pickle
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from tests.fuzz.room import Room
from tests.fuzz.targets import Target, case_of, load
from tests.fuzz.trial import MEMORY, Failure, Trial, memory, place

_MARGIN = 1 << 29
"""Bytes above the limit of a step at which the system refuses memory."""


def main() -> None:
    """Serve tries until standard input ends."""
    name, folder, patience = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to the worker's log
    warnings.simplefilter("ignore")
    target = load(name)
    target = replace(target, limit_s=target.limit_s * patience)
    if not target.forks:
        honest = target.prepare(folder / "honest")
        print(json.dumps({"ready": name}), file=answers)
        _serve(target, honest, folder, answers)
        return
    honest = _prepared(target, folder)
    print(json.dumps({"ready": name}), file=answers)
    while True:
        (folder / "hung").touch()
        child = os.fork()
        if not child:
            _serve(target, honest, folder, answers)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not status:
            return
        stacks = (folder / "hung").read_text(errors="replace")  # now: the next fork empties the file
        print(json.dumps({"ended": status, "hung": stacks}), file=answers)


def _prepared(target: Target, folder: Path) -> Any:
    """The honest data, prepared in a process of its own, so that this one has no threads; imports what it took."""
    kept = folder / "honest.pickle"
    child = os.fork()
    if not child:
        try:
            honest = target.prepare(folder / "honest")
            kept.write_bytes(pickle.dumps((honest, sorted(sys.modules))))
        except BaseException:  # noqa: BLE001 - a fork must not return into its parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
    honest, modules = pickle.loads(kept.read_bytes())  # written by this program
    for name in modules:
        with suppress(Exception):
            import_module(name)
    return honest


def _serve(target: Target, honest: Any, folder: Path, answers: TextIO) -> None:
    shutil.rmtree(folder / "top", ignore_errors=True)
    room = Room(folder / "top")
    os.chdir(room.folder)
    most = memory("VmData") + MEMORY + _MARGIN
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with open(folder / "hung", "w", encoding="utf-8") as hung:
        for line in _lines():
            asked = json.loads(line)
            try:
                case = asked.get("case") or case_of(target, honest, asked["seed"])
            except Exception as error:  # noqa: BLE001 - as in `one`
                print(json.dumps({"outcomes": [], "failures": [asdict(_own_fault(error))], "case": None}), file=answers)
                continue
            (folder / "case").write_text(json.dumps(case), encoding="utf-8")  # for one that ends this process
            print(json.dumps(one(target, honest, room, hung, case)), file=answers)


def _lines() -> Iterator[bytes]:
    """Lines of standard input, not read ahead: the next process gets the rest."""
    line = b""
    while more := os.read(0, 1 << 16):
        line += more
        if line.endswith(b"\n"):
            yield line
            line = b""


def one(target: Target, honest: Any, room: Room, hung: TextIO, case: dict[str, Any]) -> dict[str, Any]:
    """Make one try: what each step came to, and the failures."""
    room.clear()
    trial = Trial(room, target.limit_s, hung)
    try:
        target.attempt(trial, honest, case)
    except Exception as error:  # noqa: BLE001 - a fault of the target itself must not stop a run of thousands
        trial.failures.append(_own_fault(error))
    for words in room.touched():
        trial.failures.append(Failure("outside", words, words))
    failures = [asdict(failure) for failure in trial.failures]
    return {"outcomes": trial.outcomes, "failures": failures, "case": case if failures else None}


def _own_fault(error: Exception) -> Failure:
    """The failure of a target's own code."""
    return Failure("fuzzer", f"{place(error)} {error}"[:200], traceback.format_exc())


if __name__ == "__main__":
    main()
