"""Storage of probes: each rollout's derivative along a target, with its reward.

Probes are immutable Parquet parts in the collection's folder `probes/`, one part per addition. gradstore/additions.py
defines naming and durability.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradstore import additions
from gradstore.collection import Collection
from gradstore.durable import canonical_json
from gradstore.errors import DamagedError, RequestError
from gradstore.id_lookup import listed
from gradstore.layout import PROBES, check_step
from gradstore.parquet import table_bytes
from gradstore.problem_rows import repeated
from gradstore.schema import ANYTHING, Checker, mapping
from gradstore.stored_parquet import read_stored

_OBJECTIVE = Checker(mapping(ANYTHING))
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("target_commit", pa.int64(), nullable=False),
        pa.field("objective", pa.string(), nullable=False),
        pa.field("derivatives", pa.list_(pa.float32()), nullable=False),
        pa.field("rewards", pa.list_(pa.float32()), nullable=False),
        pa.field("lengths", pa.list_(pa.int32()), nullable=False),
    ]
)
"""One row per problem and addition; docs/format.md explains the columns."""


class RecordedProbes:
    """The stored probes of a collection: each rollout's derivative along a target, with its reward.

    Parts never change, and the steps and targets of each part that was read are remembered. A run of many rounds
    therefore reads only new parts and those of the requested step.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._folder = collection.folder / PROBES
        self._held: dict[str, set[tuple[int, str]]] = {}
        """File name -> (step, target) pairs of a part that was read."""

    def add(
        self,
        ids: Sequence[str],
        derivatives: Sequence[np.ndarray],
        rewards: Sequence[np.ndarray],
        lengths: Sequence[np.ndarray],
        *,
        step: int,
        target: str,
        target_commit: int = 0,
        objective: dict[str, Any] | None = None,
    ) -> None:
        """Store probes: each rollout's derivative along a target, with its reward and its length in tokens.

        derivatives, rewards, lengths: one array per problem, one number per rollout; a derivative may be nan (not run).
        step: the policy's step. target, target_commit: the benchmark and its commit. objective: settings of the
        objective that was differentiated. RequestError for an unknown or repeated id, counts that differ, or a reward
        that is not finite.
        """
        self._collection.refuse_read_only()
        _check(ids, {"derivatives": derivatives, "rewards": rewards, "lengths": lengths}, self._collection.where)
        n = len(ids)
        columns = [
            listed(ids),
            [check_step(step)] * n,
            [target] * n,
            [target_commit] * n,
            [canonical_json(objective or {}).decode()] * n,
            [np.asarray(d_G, np.float32) for d_G in derivatives],
            [np.asarray(r_G, np.float32) for r_G in rewards],
            [np.asarray(T_G, np.int32) for T_G in lengths],
        ]
        data = table_bytes(pa.table(columns, schema=SCHEMA))
        self._collection.add(listed(ids), lambda: additions.add_part(self._folder, data))

    @property
    def n_parts(self) -> int:
        """Number of additions; lists names, reads no file."""
        return additions.count_parts(self._folder)

    def table(self, *, step: int | None = None, target: str | None = None, parts: slice = slice(None)) -> pa.Table:
        """Probes in order of addition, of problems that are not deleted; step or target None: of all.

        parts: which additions, as a slice without a step.

        Columns: id, step, target, target_commit, objective (JSON), derivatives, rewards, lengths (lists, one number per
        rollout). DamagedError if a part with such rows changed, or if a part is missing.
        """
        deleted = pa.array(self._collection.deleted(), pa.string())

        def asked(held: tuple[int, str]) -> bool:
            return step in (None, held[0]) and target in (None, held[1])

        others = {name for name, held in self._held.copy().items() if not any(map(asked, held))}
        tables = []
        for name, data in additions.read_parts(self._folder, parts.start or 0, parts.stop, skip=others).items():
            tables.append(read_part(data, self._folder / name))
            if name not in self._held:
                held = tables[-1].group_by(["step", "target"]).aggregate([])
                self._held[name] = set(zip(held["step"].to_pylist(), held["target"].to_pylist(), strict=True))
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        if step is not None:
            table = table.filter(pc.equal(table["step"], step))
        if target is not None:
            table = table.filter(pc.equal(table["target"], target))
        return table.filter(pc.invert(pc.is_in(table["id"], value_set=deleted)))


def read_part(data: bytes, path: Path) -> pa.Table:
    """The table of a part; DamagedError names the row and the column of what no probe can be."""
    table = read_stored(io.BytesIO(data), path, SCHEMA)
    for objective in table["objective"].unique().to_pylist():
        _OBJECTIVE.parse(objective, f"{path}, objective")
    lengths = [pc.list_value_length(table[name]) for name in ("derivatives", "rewards", "lengths")]
    faults = {
        "step: negative": pc.less(table["step"], 0),
        "rewards: not one for each derivative": pc.not_equal(lengths[0], lengths[1]),
        "lengths: not one for each derivative": pc.not_equal(lengths[0], lengths[2]),
    }
    for fault, wrong in faults.items():
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise DamagedError(f"{path}: damaged: row {row}: {fault}")
    if not np.isfinite(table["rewards"].combine_chunks().flatten().to_numpy()).all():
        raise DamagedError(f"{path}: damaged: rewards: one is not finite")
    return table


def _check(ids: Sequence[str], given: dict[str, Sequence[np.ndarray]], where: str) -> None:
    """Raise RequestError, which names the problem, if counts differ, an id is repeated, or a reward is not finite."""
    for name, arrays in given.items():
        if len(arrays) != len(ids):
            raise RequestError(f"{where}: {len(ids)} ids but {name} of {len(arrays)} problems")
    twice = repeated(ids)
    if twice is not None:
        raise RequestError(f"{where}: problem id {twice!r} occurs more than once; keep one")
    for name, d_G, r_G, T_G in zip(ids, *given.values(), strict=True):
        if not len(d_G) == len(r_G) == len(T_G):
            raise RequestError(
                f"{where}, problem {name!r}: {len(d_G)} derivatives, {len(r_G)} rewards and {len(T_G)} lengths; "
                "give one of each for every rollout"
            )
        if not np.isfinite(r_G).all():
            raise RequestError(f"{where}, problem {name!r}: a reward is not finite")
