"""Build a pool of problems from several sources: all or a number of each, without duplicates or benchmark problems.

Each source is drawn with its own seed, from the pool's seed and the source's name. So adding a source, or changing
another source's count, does not change its draws, except for problems that two sources share.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gradstore import read_problems
from gradstore.errors import RequestError, check_number, near_miss
from gradstore.problems import with_id
from gradstore.trainer.data import gym
from gradstore.trainer.data.catalogue import ALIASES, DATA_SETS, NAMES, TOGETHER, DataSet
from gradstore.trainer.data.columns import HUB, Columns
from gradstore.trainer.data.corruption import Corruption, corrupted
from gradstore.trainer.data.loading import SUFFIXES, load
from gradstore.trainer.data.prompts import prompt_key


@dataclass(frozen=True, slots=True)
class Part:
    """One source and the number of problems to take from it."""

    name: str
    """A data set's name, `reasoning-gym:TASK`, or the path of a problem file."""
    count: int | None = None
    """Problems to draw; None: all, in their own order. reasoning-gym is endless, so it needs a count."""
    split: str | None = None
    """Split of a data set; None: its default."""
    rows: tuple[int, int] | None = None
    """Take only the problems [first, last) of the source, in its own order, counted from 0; None: all."""

    @property
    def label(self) -> str:
        """Name and split (NAME@SPLIT), without the count."""
        return self.name if self.split is None else f"{self.name}@{self.split}"


@dataclass(frozen=True)
class Options:
    """Options of the whole pool."""

    seed: int = 0
    local: Mapping[str, Path] = field(default_factory=dict)
    """Data set -> file or folder to read instead of the hub."""
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """reasoning-gym task -> its settings."""
    exclude: Sequence[Path] = ()
    """Problem files, such as held-out benchmarks, whose prompts are excluded from the pool."""
    corruptions: Sequence[Corruption] = ()
    solutions: bool = False
    """Keep reference solutions (gsm8k, math, metamath) in the problems' `extra`."""
    instruction: str | None = None
    """Text after every question; None: the data sets' own texts; "": nothing."""
    columns: Columns | None = None
    """Columns of the files, and of the data sets `hub:...`, among the parts; None: files hold problem records."""


@dataclass
class PartReport:
    """Counts of one source's rows: taken, and left out by reason."""

    name: str
    rows: int = 0
    not_kept: int = 0
    """Rows excluded by the data set's definition (another year, a picture, ...)."""
    unusable: dict[str, int] = field(default_factory=dict)
    """Rows without a usable question or answer, by reason."""
    duplicates: int = 0
    """Problems that already occurred, in this source or an earlier one."""
    contradicting: int = 0
    """Those among the duplicates with another ground truth than the first, which is kept."""
    shared_ids: int = 0
    """Problems whose own id is not theirs alone, so that a hash of the question follows it."""
    excluded: int = 0
    """Problems that are in a held-out file."""
    taken: int = 0


@dataclass
class Pool:
    """The pool's problems, and a report per source."""

    records: list[dict[str, Any]]
    """Canonical problem records."""
    parts: list[PartReport]
    notes: list[str] = field(default_factory=list)
    """Messages to the user about how the problems were combined."""

    def describe(self) -> dict[str, Any]:
        """The report as JSON: problems by source and by tag, and the counts of each part."""
        return {
            "problems": len(self.records),
            "sources": dict(sorted(Counter(record["source"] for record in self.records).items())),
            "tags": dict(sorted(Counter(tag for record in self.records for tag in record["tags"]).items())),
            "parts": [asdict(part) for part in self.parts],
            "notes": self.notes,
        }


def build(parts: Sequence[Part], options: Options) -> Pool:
    """Build the pool. A single part taken whole keeps its order; several parts are shuffled together.

    Raises RequestError for an unknown name, a count larger than the source, and an invalid file; GradstoreError when
    the hub cannot be reached.
    """
    if not parts:
        raise RequestError(f"no data set named, expected some of {', '.join(NAMES)}, reasoning-gym:TASK or a file")
    _check(parts, options)
    instructions = [options.instruction] if options.instruction else []
    held_out = {
        prompt_key(record["prompt"], instructions) for path in options.exclude for record in read_problems(path)
    }
    seen: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    reports = []
    problem_files = [] if options.columns else [part.name for part in parts if _is_file(part.name)]
    files, notes = _files_with_own_ids(problem_files)
    for part in parts:
        report = PartReport(part.label)
        reports.append(report)
        candidates = _candidates(part, options, report, files)
        if part.rows is not None:
            candidates = _in_range(list(candidates), part)
        if part.count is not None and not _is_gym(part.name):
            candidates = list(candidates)
            Random(f"{options.seed} {part.label}").shuffle(candidates)
        for record in candidates:
            key = prompt_key(record["prompt"], instructions)
            if key in held_out:
                report.excluded += 1
            elif key in seen:
                report.duplicates += 1
                report.contradicting += seen[key] != record["ground_truth"]
            else:
                seen[key] = record["ground_truth"]
                records.append(record)
                report.taken += 1
            if report.taken == part.count:
                break
        if part.count is not None and report.taken < part.count:
            raise RequestError(
                f"{part.label}: {part.count} problems asked for, {report.taken} there are ({report.rows} rows, "
                f"{report.duplicates} duplicates, {report.excluded} excluded, {sum(report.unusable.values())} without "
                "a usable question or answer)"
            )
        if not report.taken:
            lost = {"duplicates": report.duplicates, "held out": report.excluded, "left out": report.not_kept}
            why = "; ".join(f"{n}: {reason}" for reason, n in {**report.unusable, **lost}.items() if n)
            raise RequestError(f"{part.label}: no problem is left of {report.rows} rows ({why})")
    _check_ids(records)
    if len(parts) > 1:
        Random(f"{options.seed} order").shuffle(records)
    if options.corruptions:
        records = corrupted(records, options.corruptions, options.seed)
    return Pool(records, reports, notes)


def _check(parts: Sequence[Part], options: Options) -> None:
    """RequestError for mistakes that can be found before loading anything."""
    known = set()
    own = [part for part in parts if _is_file(part.name) or part.name.startswith(HUB)]
    if options.columns and not own:
        names = ", ".join(part.name for part in parts) or "no source"
        raise RequestError(
            f"{names}: columns are those of a file ({', '.join(SUFFIXES)}) or of {HUB}USER/NAME; name one, or leave "
            "--prompt and --truth out"
        )
    made = [part for part in parts if not _is_file(part.name) or options.columns]
    if options.instruction is not None and (not made or (options.columns and options.columns.template)):
        raise RequestError("--instruction: these prompts are whole as they are; leave it out, or use a --template")
    for part in parts:
        if _is_file(part.name.partition("@")[0]) and "@" in part.label:
            raise RequestError(f"{part.label}: a file has no splits: leave @{part.label.rpartition('@')[2]} out")
        if _is_file(part.name) and part.name in options.local:
            raise RequestError(f"{part.name}: is a file already: leave --from out")
        if part.name.startswith(HUB) and options.columns is None:
            raise RequestError(
                f"{part.name}: say which columns hold question and truth: --prompt COLUMN --truth COLUMN"
            )
        known |= {part.name, *(source.name for source in _data_sets(part, options.columns))}
        if part.count is not None:
            check_number(f"{part.label}: the count", part.count, least=1)
        if _is_gym(part.name):
            task = part.name.partition(":")[2]
            known.add(task)
            if part.rows is not None:
                raise RequestError(f"{part.name}: has no range of rows; its problems are drawn from the seed")
            if part.count is None:
                raise RequestError(f"{part.name} has no end: say how many, as in {part.name}:1000")
            gym.check(task, options.config.get(task, {}))
    labels = [part.label for part in parts]
    for label in labels:
        if labels.count(label) > 1:
            raise RequestError(f"{label} is named twice: name it once, with one count")
    for name in (*options.local, *options.config):
        if name not in known:
            raise RequestError(f"settings for {name!r}, which is none of the data sets asked for")
    for path in options.local.values():
        if not path.exists():
            raise RequestError(f"{path}: the file or folder does not exist")


def _data_sets(part: Part, columns: Columns | None = None) -> list[DataSet]:
    """The catalogue entries of a part; empty for reasoning-gym and files of problem records."""
    if columns is not None and (part.name.startswith(HUB) or _is_file(part.name)):
        return [columns.data_set(part.name, part.split)]
    if _is_gym(part.name) or _is_file(part.name):
        return []
    name = ALIASES.get(part.name, part.name)
    if name not in (*DATA_SETS, *TOGETHER):
        if Path(part.name).exists():
            kind = "a folder" if Path(part.name).is_dir() else "no file of problems by its name"
            raise RequestError(f"{part.name}: is {kind}; expected a file of problems ({', '.join(SUFFIXES)})")
        raise RequestError(
            f"unknown data set {part.name!r}, expected one of {', '.join(NAMES)}, reasoning-gym:TASK, "
            f"{HUB}USER/NAME, or a file of problems ({', '.join(SUFFIXES)}){near_miss(part.name, [*NAMES, *ALIASES])}"
        )
    return [DATA_SETS[name] for name in TOGETHER.get(name, (name,))]


def _is_gym(name: str) -> bool:
    return name.startswith(f"{gym.PREFIX}:")


def _is_file(name: str) -> bool:
    return name.endswith(SUFFIXES)


def _candidates(
    part: Part, options: Options, report: PartReport, files: Mapping[str, list[dict[str, Any]]]
) -> Iterable[dict[str, Any]]:
    """Yield a part's problems and count its rows in the report."""
    if _is_gym(part.name):
        task, count = part.name.partition(":")[2], part.count or 0
        for record in gym.draw(task, count, options.seed, options.config.get(task, {}), options.instruction):
            report.rows += 1
            yield record
    elif part.name in files:
        report.rows = len(files[part.name])
        yield from files[part.name]
    for source in _data_sets(part, options.columns):
        local = Path(part.name) if _is_file(part.name) else options.local.get(source.name, options.local.get(part.name))
        loaded = load(
            source, split=part.split, local=local, instruction=options.instruction, solutions=options.solutions
        )
        report.rows += loaded.rows
        report.not_kept += loaded.not_kept
        report.duplicates += loaded.duplicates
        report.contradicting += loaded.contradicting
        report.shared_ids += loaded.shared_ids
        for reason, n in loaded.unusable.items():
            report.unusable[reason] = report.unusable.get(reason, 0) + n
        yield from loaded.records


def _in_range(records: list[dict[str, Any]], part: Part) -> list[dict[str, Any]]:
    """The problems of the part's range; RequestError for one that the source does not have whole."""
    assert part.rows is not None
    first, last = part.rows
    if not 0 <= first < last <= len(records):
        raise RequestError(
            f"{part.label}: range {first}:{last} of {len(records)} problems, expected 0 <= A < B <= {len(records)}"
        )
    return records[first:last]


def _files_with_own_ids(paths: Sequence[str]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Read several problem files and make their ids unique; returns (path -> records, notes for the user).

    verl's files number their rows from 0, so ids can clash. If one id has different prompts in two files, all ids of
    both get a prefix: the problem's source, or if that is not enough the file's name, or its whole path.
    """
    files = {path: read_problems(path) for path in paths}
    asked: dict[str, dict[str, str]] = {}
    for path, records in files.items():
        for record in records:
            asked.setdefault(record["id"], {})[path] = prompt_key(record["prompt"])
    shared = [prompts for prompts in asked.values() if len(set(prompts.values())) > 1]
    clashing = [path for path in files if any(path in prompts for prompts in shared)]
    if not clashing:
        return files, []
    prefixes: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
        "source": lambda path, record: record["source"],
        "file's name": lambda path, record: Path(path).stem,
        "file's path": lambda path, record: str(Path(path).with_suffix("")).strip("/").replace("/", "-"),
    }
    for kind in prefixes:
        ids = {path: [f"{prefixes[kind](path, record)}-{record['id']}" for record in files[path]] for path in clashing}
        own = [name for each in ids.values() for name in each]
        if len(own) == len(set(own)) and not any(name.startswith("-") for name in own):
            break
    for path in clashing:
        files[path] = [with_id(record, name) for record, name in zip(files[path], ids[path], strict=True)]
    which, shown = ", ".join(clashing), ids[clashing[0]][0]
    return files, [f"the same ids name different problems in {which}: each got its {kind} in front, as in {shown!r}"]


def _check_ids(records: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record["id"] in seen:
            raise RequestError(
                f"problem id {record['id']!r} occurs in {seen[record['id']]!r} and {record['source']!r} with different "
                "prompts: give the files ids that differ"
            )
        seen[record["id"]] = record["source"]
