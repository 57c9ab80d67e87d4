"""Merge stores of one fingerprint into a new one: shards collected apart, or stores of other problems and steps.

The sources are only read. Everything is compared before a byte is written: fingerprints by field, problems by id, rows
by problem and step. What is in several stores must be equal in every byte and is kept once. The merged store grows in
OUT.unfinished and takes its name when it is whole; a merge that was killed goes on there and ends with the same bytes.

The sources are taken in the order of their paths, so the order in which they are named changes nothing.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gradstore.attachments import ATTACHMENTS, COVERAGE, ORIGIN, all_attachments, read_attachment
from gradstore.durable import TEMPORARY, canonical_json, fsync_folder, make_folder, writing
from gradstore.errors import FingerprintError, LockedError, RequestError, differences, listed
from gradstore.exclusive import held_file, lock
from gradstore.header import Header
from gradstore.inside import names_inside, remove_folder
from gradstore.layout import COLLECTIONS, PROBES, ROUNDS, ZARR
from gradstore.merged_parts import UnitedParts, unite_parts, write_parts
from gradstore.merged_rows import Member, United, unite, write
from gradstore.outputs import check_output, is_store
from gradstore.schema import load_json
from gradstore.session import Session
from gradstore.store import Store, create, is_blank, open

UNFINISHED = ".unfinished"
"""What the name of a merged store ends in while it grows."""
_PROJECTION = "projection-"


@dataclass(frozen=True, slots=True)
class MergedCollection:
    """Counts of one merged collection."""

    stores: int
    """Stores that have the collection."""
    problems: int
    rows: int
    again: int
    """Rows that were in more than one store, equal in every byte; each is kept once."""
    deleted: int
    """Rows that are deleted in their store and were left out."""
    probes: int
    """Parts of probes."""
    rounds: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Result of a merge."""

    path: Path
    stores: list[str]
    """The sources, in the order in which they were taken."""
    collections: dict[str, MergedCollection] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """What the merged store does not have, and why, one line each."""
    was_there: bool = False
    """Whether an earlier merge of the same stores had finished."""

    def describe(self) -> dict:
        """The report as a dict for JSON."""
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What a merge writes; made without writing."""

    header: Header
    attachments: dict[str, bytes]
    rows: dict[str, United]
    parts: dict[str, UnitedParts]
    left_out: list[str]

    @property
    def n_rows(self) -> int:
        return sum(united.n_rows for united in self.rows.values())


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge the stores at `paths` into a new store at `out`; a merge that was interrupted goes on.

    progress: callback(rows just written, rows of the merged store); the first calls count rows that were there.
    FingerprintError, naming field, values and stores, for stores whose rows cannot be compared. RequestError for a
    problem or a row that differs between two stores, and for something else at `out`. DamagedError for a source whose
    bytes changed. LockedError while another merge writes to `out`.
    """
    out = Path(out)
    sources = _opened(paths)
    check_output(out)
    longest = max(sources, key=lambda store: len(store.bases))
    for store in sources:
        _check_alike(longest, store)
    plan = _plan(sources)
    report = MergeReport(out, [str(store.path) for store in sources], _counts(plan), plan.left_out)
    if _is_merged(out, plan):
        return MergeReport(report.path, report.stores, report.collections, report.left_out, was_there=True)
    unfinished = out.with_name(out.name + UNFINISHED)
    with _alone(unfinished):
        if _is_merged(out, plan):  # Another process was faster.
            unfinished.rmdir()
            return MergeReport(report.path, report.stores, report.collections, report.left_out, was_there=True)
        _begin(unfinished, plan)
        for name, united in plan.rows.items():
            with Session(plan.header, unfinished / COLLECTIONS / name, create=True) as session:
                write(session, united, lambda n: progress(n, plan.n_rows))
                write_parts(session, plan.parts[name])
        with writing(out):
            os.rename(unfinished, out)
            held_file(out).unlink(missing_ok=True)  # Of `_alone`, where the file system has no flock.
            fsync_folder(out.parent)
    return report


def _opened(paths: Sequence[str | Path]) -> list[Store]:
    """The sources, checked for presence, in the order of their paths; RequestError for none, or for one given twice."""
    if not paths:
        raise RequestError("merge needs at least one store")
    places: dict[Path, Path] = {}
    for path in map(Path, paths):
        place = path.resolve()
        if place in places:
            raise RequestError(f"{path}: given twice, as {places[place]} too; name each store once")
        places[place] = path
    stores = [open(places[place]) for place in sorted(places)]
    for store in stores:
        store.check_files()
    return stores


def _check_alike(one: Store, other: Store) -> None:
    """FingerprintError, naming each field with both values and both stores, unless rows of both can be compared."""
    names = str(one.path), str(other.path)
    mine, theirs = (
        {"dim": store.dim, "dtype": store.dtype, "columns": list(store._header.columns)} for store in (one, other)
    )
    found = differences(mine, theirs, *names)
    found += differences(one.fingerprint, other.fingerprint, *names)
    if not found:
        bases = [[(basis.digest, basis.layout) for basis in store.bases] for store in (one, other)]
        n = min(map(len, bases))
        same = bases[0][:n] == bases[1][:n]
        known = [", ".join(digest for digest, _ in of_store) for of_store in bases]
        found += [] if same else [f"bases: {names[0]} has {known[0]}, {names[1]} has {known[1]}"]
    if found:
        apart = any(line.startswith(("projection.basis", "bases:")) for line in found)
        advice = "; their projections were fitted apart: collect one with --like the other" if apart else ""
        raise FingerprintError(f"{other.path}: cannot be merged with {one.path}: {listed(found)}{advice}")


def _plan(sources: Sequence[Store]) -> _Plan:
    members: dict[str, list[Member]] = {}
    for store in sources:
        for name in store.collections:
            members.setdefault(name, []).append(Member(store.path, store._collection(name).snapshot()))
    rows = {name: unite(members[name]) for name in sorted(members)}
    parts = {}
    for name, united in rows.items():
        folders = [member.snapshot.collection for member in united.members]
        parts[name] = unite_parts(folders, set(united.problems["id"].to_pylist()))
    attachments, left_out = _attachments(sources)
    attachments[ORIGIN] = _origin(sources, members)
    for name, united in rows.items():
        if united.deleted or united.dropped:
            left_out.append(f"collection {name!r}: {united.deleted} deleted rows and {united.dropped} deleted problems")
        if united.kept:
            left_out.append(
                f"collection {name!r}: the deletion of {len(united.kept)} problems (first: {united.kept[0]!r}), which "
                "another store has rows of"
            )
        left_out += parts[name].left_out
    for store in sources:
        left_out += [
            f"{store.path / name}: the round under way; finish it where it began"
            for name in names_inside(store.path, store.path)
            if name.startswith("round-of-")
        ]
    return _Plan(sources[0]._header, attachments, rows, parts, left_out)


def _attachments(sources: Sequence[Store]) -> tuple[dict[str, bytes], list[str]]:
    """The attachments of all sources, and what is left out of them."""
    found: dict[str, tuple[Store, bytes]] = {}
    left_out = []
    for store in sources:
        for name, data in all_attachments(store.path).items():
            first, known = found.setdefault(name, (store, data))
            if known == data or name == ORIGIN:
                continue
            if name != COVERAGE and not name.startswith((_PROJECTION, "basis-")):
                raise RequestError(f"attachment {name!r}: {store.path} and {first.path} have others of this name")
            # Of the same rows: digests of projections and bases were compared; what differs is what was measured.
            left_out.append(f"attachment {name!r} of {store.path}: measured otherwise than that of {first.path}")
    return {name: data for name, (_, data) in found.items() if name != ORIGIN}, left_out


def _origin(sources: Sequence[Store], members: dict[str, list[Member]]) -> bytes:
    """What the merged store keeps of its sources: name and a digest of the content, so that a merge knows its own."""
    stores = []
    for store in sources:
        digest = hashlib.sha256(store._header.to_bytes())
        for member in (one for of_name in members.values() for one in of_name if one.store == store.path):
            folder = member.snapshot.collection
            files = [names_inside(folder / kind, store.path) for kind in (PROBES, ROUNDS)]
            digest.update(canonical_json([member.name, files]) + member.snapshot.manifest.to_bytes())
        names = names_inside(store.path / ATTACHMENTS, store.path)
        digest.update(canonical_json([name for name in names if not name.startswith(TEMPORARY)]))
        earlier = any(name.startswith(f"{ORIGIN}.") for name in names)
        of = {"of": load_json(read_attachment(store.path, ORIGIN), ORIGIN)} if earlier else {}
        stores.append({"name": store.path.name, "digest": digest.hexdigest()[:32], **of})
    return canonical_json({"merged": stores})


def _counts(plan: _Plan) -> dict[str, MergedCollection]:
    return {
        name: MergedCollection(
            stores=len(united.members),
            problems=united.problems.num_rows,
            rows=united.n_rows,
            again=united.again,
            deleted=united.deleted,
            probes=len(plan.parts[name].parts[PROBES]),
            rounds=len(plan.parts[name].parts[ROUNDS]),
        )
        for name, united in plan.rows.items()
    }


def _is_merged(out: Path, plan: _Plan) -> bool:
    """Whether `out` is the finished merge of this plan; RequestError for something else there."""
    if not os.path.lexists(out):
        return False
    if is_store(out) and _is_of(out, plan):
        open(out).check_files()
        return True
    raise RequestError(f"{out}: there is something else here already; choose another path, or remove it")


def _is_of(path: Path, plan: _Plan) -> bool:
    """Whether the store at a path, finished or not, is of this plan."""
    names = names_inside(path / ATTACHMENTS, path)
    if not any(name.startswith(f"{ORIGIN}.") for name in names):
        return False
    header = open(path)._header
    return header.to_bytes() == plan.header.to_bytes() and read_attachment(path, ORIGIN) == plan.attachments[ORIGIN]


def _begin(unfinished: Path, plan: _Plan) -> None:
    """Create the store that grows, or check that the one that is there is of this plan."""
    if (unfinished / ZARR).exists():
        if not _is_of(unfinished, plan):
            raise RequestError(
                f"{unfinished}: an unfinished merge of other stores, or of these before they changed; remove it, or "
                "choose another path"
            )
        return
    if is_blank(unfinished) and (unfinished / ATTACHMENTS).is_dir():
        remove_folder(unfinished / ATTACHMENTS, unfinished)  # Of a merge that was killed before its store began.
    header = plan.header
    create(
        unfinished,
        dim=header.dim,
        fingerprint=header.fingerprint,
        dtype=header.dtype,
        chunk_rows=header.chunk_rows,
        column_rows=header.column_rows,
        attachments=plan.attachments,
    )


@contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """The lock of the merge into a folder, which is created; LockedError while another process has it."""
    with writing(unfinished):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    make_folder(unfinished)
    try:
        release = lock(os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY), unfinished, wait=False)
    except BlockingIOError:
        raise LockedError(f"{unfinished}: another process is merging into it; wait until it has finished") from None
    try:
        yield
    finally:
        release()
