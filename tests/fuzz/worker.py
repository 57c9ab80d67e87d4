"""A process that makes many tries of one target: `python -m tests.fuzz.worker TARGET FOLDER PATIENCE`.

It reads {"seed": N} or {"case": {...}} from each line of standard input and answers with one line of JSON. A step that
takes too long ends the process, with its stacks in FOLDER/hung. Memory for data is limited, so that no try takes the machine's.
"""

import json
import os
import resource
import sys
import traceback
import warnings
from dataclasses import asdict, replace
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
    os.chdir(folder)
    target = load(name)
    target = replace(target, limit_s=target.limit_s * patience)
    honest = target.prepare(folder / "honest")
    room = Room(folder / "top")
    os.chdir(room.folder)
    most = memory("VmData") + MEMORY + _MARGIN
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    print(json.dumps({"ready": name}), file=answers)
    with open(folder / "hung", "w", encoding="utf-8") as hung:
        for line in sys.stdin:
            asked = json.loads(line)
            case = asked.get("case") or case_of(target, honest, asked["seed"])
            (folder / "case").write_text(
                json.dumps(case), encoding="utf-8"
            )  # for one that this process does not survive
            print(json.dumps(one(target, honest, room, hung, case)), file=answers)


def one(target: Target, honest: Any, room: Room, hung: TextIO, case: dict[str, Any]) -> dict[str, Any]:
    """Make one try: what each step came to, and the failures."""
    room.clear()
    trial = Trial(room, target.limit_s, hung)
    try:
        target.attempt(trial, honest, case)
    except Exception as error:  # noqa: BLE001 - a fault of the target itself must not stop a run of thousands
        trial.failures.append(Failure("fuzzer", f"{place(error)} {error}"[:200], traceback.format_exc()))
    for words in room.touched():
        trial.failures.append(Failure("outside", words, words))
    failures = [asdict(failure) for failure in trial.failures]
    return {"outcomes": trial.outcomes, "failures": failures, "case": case if failures else None}


if __name__ == "__main__":
    main()
