"""A run folder of GradAlign, read and checked: its problems, and what each of its rounds measured and picked.

The folder, as the published code writes it (StigLidu/GradAlign, 7e25218); R counts rounds, S training steps, from 0:

    chunks/manifest.json                                       seed, num_chunks, ...
    chunks/chunk_I/train.jsonl or .parquet                     the candidates of round R, I = R mod the number of chunks
    global_step_S/train_split/similarity_results_aggregated.jsonl      group_id, similarity
    global_step_S/train_split/accuracy_by_problem.jsonl        group_id, total, correct, accuracy
    global_step_S/train_split/part_J/                          responses_sorted.json and the part's similarities
    global_step_S/val_responses/responses_sorted.json          the validation rollouts
    selected/iter_R_MODE_N/train.jsonl or .parquet             the picks of round R

A group_id is a problem's id (`extra_info.index`). S is R times the training steps of a round. Everything but the
picks may be missing; what was left out is in `notes`. A fault is a RequestError with file, row and field.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gradstore.errors import DamagedError, RequestError, check_known, check_number
from gradstore.problems import canonical, from_verl, id_text, read_problems
from gradstore.reading.files import read_object
from gradstore.reading.opening import read_records
from gradstore.schema import ANYTHING, Checker, number, one_of, optional, record, whole

MODES = ("sim", "dot", "norm", "align", "negsim", "simacc", "accgreedy", "acc", "rand")
"""GradAlign's values of --mode."""

_ITERATION = re.compile(r"iter_(\d{1,9})_([a-z]+)_(\d{1,9})")
_SIMILARITIES = ("similarity_results_aggregated.jsonl", "similarity_results_cosine_real.jsonl")
"""Name of the file of all parts, and of each part's."""
_RESPONSES = ("responses_sorted.json", "responses.json")
_MANIFEST = Checker(record({}, {"seed": whole(-(2**63)), "num_chunks": whole(1), "chunk_size": whole(1)}, open=True))
_SIMILARITY = Checker(record({"group_id": ANYTHING, "similarity": number(finite=False)}, open=True))
_ACCURACY = Checker(
    record(
        {"group_id": ANYTHING, "total": whole(1), "correct": whole()},
        {"similarity": optional(number(finite=False))},
        open=True,
    )
)
_RESPONSE = Checker(
    record(
        {"group_id": ANYTHING},
        {"passed": optional(one_of(True, False)), "is_correct": optional(one_of(True, False))},
        open=True,
    )
)


@dataclass(slots=True)
class Measured:
    """What a round measured at one step, by problem id."""

    similarity: dict[str, float] = field(default_factory=dict)
    """As the run's mode measured it; not finite where its gradient was not."""
    rollouts: dict[str, int] = field(default_factory=dict)
    correct: dict[str, int] = field(default_factory=dict)
    """Rollouts that were right."""


@dataclass(slots=True)
class Iteration:
    """One round of the run."""

    number: int
    step: int
    mode: str
    candidates: list[str]
    """Ids in the order of the chunk; picks from outside it (mode rand) come last."""
    picks: list[str]
    """Ids in the order of the file."""
    measured: Measured
    validation: tuple[int, int]
    """Validation rollouts, and how many of them were right."""
    where: str
    """The folder of the picks."""


@dataclass(slots=True)
class GradAlignRun:
    """What a run folder holds."""

    problems: dict[str, dict[str, Any]]
    """Canonical records of the pool by id: of all chunks and picks."""
    validation: dict[str, dict[str, Any]]
    """Canonical records of the validation problems by id."""
    iterations: list[Iteration]
    seed: int | None
    """Seed of the shuffle before the chunks were cut; None: unknown."""
    notes: list[str]
    """What is missing, for the user."""


def read_run(
    folder: Path, *, problems: Path | None = None, mode: str | None = None, steps: int | None = None
) -> GradAlignRun:
    """Read and check a run folder.

    problems: the data set the run was started on, for problems that no chunk has. mode: the picks to read where a round
    has those of several modes. steps: training steps of a round; None: told by the names of the folders.
    """
    if mode is not None:
        check_known("--mode", mode, MODES)
    if steps is not None:
        check_number("--steps", steps, least=1)
    picked = _picked(folder, mode)
    notes: list[str] = []
    manifest = _manifest(folder / "chunks" / "manifest.json")
    chunks = _chunks(folder / "chunks", manifest.get("num_chunks"))
    if not chunks:
        notes.append("no chunks: the candidates of a round are the problems it measured")
    measured_at = {step: path for step, path in _numbered(folder, "global_step_") if (path / "train_split").is_dir()}
    step_of = _steps(folder, picked, list(measured_at), steps)
    known: dict[str, dict[str, Any]] = {}
    if problems is not None:
        _add(known, read_problems(problems), problems)
    in_chunks: list[list[str]] = []
    for _, file in chunks:
        records = read_problems(file)
        _add(known, records, file)
        in_chunks.append([own["id"] for own in records])
    _check_disjoint(in_chunks, chunks)
    run = GradAlignRun(known, {}, [], manifest.get("seed"), notes)
    for place, (own_mode, file) in picked.items():
        records = read_problems(file)
        _add(known, records, file)
        step = step_of[place]
        split = measured_at.get(step)
        measured = Measured() if split is None else _measured(split / "train_split", run, needed=not chunks)
        if split is None:
            notes.append(f"round {place}: no {folder.name}/global_step_{step}/train_split: nothing was measured")
        iteration = Iteration(
            number=place,
            step=step,
            mode=own_mode,
            candidates=in_chunks[place % len(chunks)] if chunks else _ids(measured),
            picks=[own["id"] for own in records],
            measured=measured,
            validation=(0, 0) if split is None else _validation(split / "val_responses", run),
            where=str(file.parent),
        )
        _complete(iteration, run)
        run.iterations.append(iteration)
    return run


def _picked(folder: Path, mode: str | None) -> dict[int, tuple[str, Path]]:
    """Round -> its mode and the file of its picks, in order."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder, expected GradAlign's ckpt_root/experiment_name")
    found: dict[int, tuple[str, Path]] = {}
    for path in sorted((folder / "selected").glob("iter_*")):
        match = _ITERATION.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        number, own = int(match[1]), match[2]
        check_known(f"{path}: mode", own, MODES)
        if mode not in (None, own):
            continue
        if number in found:
            raise RequestError(
                f"{folder / 'selected'}: several picks of round {number}, expected one: choose by --mode"
            )
        found[number] = own, _table(path)
    if not found:
        of_mode = "" if mode is None else f" of mode {mode}"
        raise RequestError(f"{folder}: no picks{of_mode}, expected folders selected/iter_R_MODE_N of GradAlign's")
    return dict(sorted(found.items()))


def _table(folder: Path) -> Path:
    """The file of problems in a folder: train.jsonl, else train.parquet."""
    for name in ("train.jsonl", "train.parquet"):
        if (folder / name).exists():
            return folder / name
    raise RequestError(f"{folder}: neither train.jsonl nor train.parquet in it")


def _manifest(path: Path) -> dict[str, Any]:
    return dict(_checked(_MANIFEST, read_object(path), str(path))) if path.exists() else {}


def _chunks(folder: Path, expected: int | None) -> list[tuple[int, Path]]:
    """(number, file) of every chunk; RequestError if one is missing: then the rounds' candidates are unknown."""
    found = [(number, _table(path)) for number, path in _numbered(folder, "chunk_")]
    n = max([expected or 0, *(number + 1 for number, _ in found)]) if found else 0
    absent = sorted(set(range(n)) - {number for number, _ in found})
    if absent:
        raise RequestError(f"{folder}: chunk_{absent[0]} is missing, expected chunk_0 to chunk_{n - 1}")
    return found


def _numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """(number, path) of the folders PREFIX<number>, by number."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob(f"{prefix}*") if path.is_dir()]
    found = sorted((int(match[1]), path) for match, path in matches if match)
    for (before, _), (after, path) in pairwise(found):
        if before == after:
            raise RequestError(f"{path}: number {after} occurs twice in {folder}")
    return found


def _steps(folder: Path, picked: Mapping[int, Any], measured: list[int], given: int | None) -> dict[int, int]:
    """Round -> training step at which it was done."""
    last = max(picked)
    if given is None and last == 0:
        return {0: 0}
    if given is None:
        # the newest folder is of the last round, or of one more that has not picked yet
        newest, common = max(measured, default=0), math.gcd(*measured)
        fitting = {newest // n for n in (last, last + 1) if newest and newest % n == 0 and common % (newest // n) == 0}
        if len(fitting) > 1 and common in fitting:
            fitting = {common}
        if len(fitting) != 1:
            raise RequestError(
                f"{folder}: the steps of its folders global_step_S ({', '.join(map(str, measured)) or 'none'}) do not "
                f"tell how many training steps each of the {last + 1} rounds had: give --steps (iters_per_select)"
            )
        given = fitting.pop()
    return {number: number * given for number in picked}


def _add(known: dict[str, dict[str, Any]], records: list[dict[str, Any]], path: Path) -> None:
    """Add records that are new; RequestError for an id that stands for another problem."""
    for own in records:
        first = known.setdefault(own["id"], own)
        for name in ("prompt", "ground_truth", "source"):
            if first[name] != own[name]:
                raise RequestError(f"{path}: problem {own['id']!r}: field {name!r} differs from elsewhere in the run")


def _check_disjoint(in_chunks: list[list[str]], chunks: list[tuple[int, Path]]) -> None:
    first: dict[str, Path] = {}
    for ids, (_, path) in zip(in_chunks, chunks, strict=True):
        for problem_id in ids:
            if first.setdefault(problem_id, path) != path:
                raise RequestError(f"{path}: problem {problem_id!r} is in {first[problem_id]} too; chunks share none")


def _measured(split: Path, run: GradAlignRun, *, needed: bool) -> Measured:
    """Similarities and counts of right rollouts at one step. needed: problem records come from the responses."""
    found = Measured()
    parts = _numbered(split, "part_")
    absent = sorted(set(range(max((number for number, _ in parts), default=-1) + 1)) - {number for number, _ in parts})
    if absent:
        run.notes.append(f"{split}: part_{absent[0]} is missing; problems without rows count as not measured")
    whole_file = split / _SIMILARITIES[0]
    files = [whole_file] if whole_file.exists() else [path / _SIMILARITIES[1] for _, path in parts]
    for file in files:
        for where, row in _rows(file, _SIMILARITY):
            _once(found.similarity, row, float(row["similarity"]), where)
    accuracies = split / "accuracy_by_problem.jsonl"
    if accuracies.exists():
        for where, row in _rows(accuracies, _ACCURACY):
            if row["correct"] > row["total"]:
                raise RequestError(f"{where}: field 'correct' is {row['correct']} of a 'total' of {row['total']}")
            _once(found.rollouts, row, row["total"], where)
            _once(found.correct, row, row["correct"], where)
            if not files and row.get("similarity") is not None:
                _once(found.similarity, row, float(row["similarity"]), where)
    if not accuracies.exists() or needed:
        counted = Measured() if accuracies.exists() else found
        for _, path in parts:
            _count(path, counted, run.problems)
    return found


def _rows(path: Path, checker: Checker) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, checked row) of a file of rows; none without a file, or if it is empty: a stage died."""
    if path.exists() and path.stat().st_size:
        for where, row in read_records(path, what="row"):
            yield where, _checked(checker, row, where)


def _checked(checker: Checker, value: Any, where: str) -> Any:
    try:
        return checker.check(value, where)
    except DamagedError as error:
        raise RequestError(str(error).replace(f"{where}: damaged: ", f"{where}: ", 1)) from None


def _once(values: dict[str, Any], row: Mapping[str, Any], value: float, where: str) -> None:
    """Add a value by group_id; RequestError if it has another already, as where shards of two runs were merged."""
    problem_id = id_text(row["group_id"], "group_id", where)
    first = values.setdefault(problem_id, value)
    if first != value and not (math.isnan(first) and math.isnan(value)):
        raise RequestError(f"{where}: group_id {problem_id!r} occurs twice, with {first} and {value}")


def _count(folder: Path, found: Measured, known: dict[str, dict[str, Any]]) -> None:
    """Count a folder's responses by problem; add the records of problems that are not known yet."""
    file = next((folder / name for name in _RESPONSES if (folder / name).exists()), None)
    for where, row in [] if file is None else _rows(file, _RESPONSE):
        problem_id = id_text(row["group_id"], "group_id", where)
        right = row.get("passed") if row.get("passed") is not None else row.get("is_correct")
        if right is None:
            raise RequestError(f"{where}: field 'passed' or 'is_correct' is missing")
        found.rollouts[problem_id] = found.rollouts.get(problem_id, 0) + 1
        found.correct[problem_id] = found.correct.get(problem_id, 0) + bool(right)
        if problem_id not in known:
            known[problem_id] = _record(problem_id, row, where)


def _record(problem_id: str, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The problem of a response: the record it was made from, else its own prompt and answer."""
    made_from = row.get("original_data")
    entry = made_from.get("original_entry") if isinstance(made_from, Mapping) else None
    if isinstance(entry, dict):
        own = from_verl(entry, f"{where}: field 'original_data.original_entry'")
        if own["id"] == problem_id:
            return own
    truth = row.get("expected_answer")
    return canonical(
        {
            "id": problem_id,
            "source": row.get("data_source"),
            "prompt": row.get("msg") or row.get("prompt"),
            "ground_truth": truth if truth is None or isinstance(truth, str) else str(truth),
        },
        where,
    )


def _validation(folder: Path, run: GradAlignRun) -> tuple[int, int]:
    found = Measured()
    _count(folder, found, run.validation)
    return sum(found.rollouts.values()), sum(found.correct.values())


def _ids(measured: Measured) -> list[str]:
    return list(dict.fromkeys([*measured.rollouts, *measured.similarity]))


def _complete(iteration: Iteration, run: GradAlignRun) -> None:
    """Add picks from outside the candidates where the mode allows it, and check that all belongs together."""
    number, known = iteration.number, set(iteration.candidates)
    outside = [name for name in iteration.picks if name not in known]
    if outside and iteration.mode != "rand" and known:
        raise RequestError(
            f"{iteration.where}: picked problem {outside[0]!r} is none of round {number}'s candidates: are the chunks, "
            "the steps (--steps) and the picks of one run?"
        )
    strangers = [name for name in _ids(iteration.measured) if name not in known]
    if strangers:
        raise RequestError(
            f"{iteration.where}: step {iteration.step} measured problem {strangers[0]!r}, which is none of round "
            f"{number}'s candidates: are the chunks and the steps (--steps) of one run?"
        )
    iteration.candidates = [*iteration.candidates, *outside]
    unknown = [name for name in iteration.candidates if name not in run.problems]
    if unknown:
        raise RequestError(
            f"{iteration.where}: round {number} has problem {unknown[0]!r}, whose record is in no chunk, pick or "
            "response: give the data set with --problems FILE"
        )
    if iteration.mode not in ("rand", "acc", "accgreedy") and not iteration.measured.similarity:
        run.notes.append(f"round {number}: no similarities of step {iteration.step}: its scores are unknown")
    if not iteration.measured.rollouts:
        run.notes.append(f"round {number}: no accuracies and no responses of step {iteration.step}: pass rates unknown")
