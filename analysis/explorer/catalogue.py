"""The explorer's queries to a store: rankings with filters and text search, one problem, two rankings side by side.

They return plain values, so they are tested without a browser. Scores of a (benchmark, step, metric), their order and
the problems that contain a text are kept until something new is published, so that a query costs milliseconds.

Dimension letters: P problems of the pool.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gradstore import State, Store
from gradstore.analysis.agreement import jaccard, spearman
from gradstore.analysis.explorer.turns import Turns
from gradstore.analysis.report.transcripts import Transcript, Transcripts
from gradstore.analysis.trajectory import STATE_NAMES, UNMEASURED, target_at
from gradstore.engine.searching.blocks import laid_out
from gradstore.engine.searching.query import (
    METRICS,
    Metric,
    direction,
    eligible_positions,
    query_vectors,
    score_rows,
    search,
)
from gradstore.engine.searching.where import Where
from gradstore.errors import check_known
from gradstore.layout import COLLECTIONS, PROBES
from gradstore.problems import message_text

_Value = TypeVar("_Value")


class Recent(Generic[_Value]):
    """The values that were asked for last, by key."""

    def __init__(self, most: int) -> None:
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()
        self._most, self._lock = most, Lock()

    def find(self, key: Hashable) -> _Value | None:
        """The value of a key; None if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made if it is not kept."""
        found = self.find(key)
        if found is not None:
            return found
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value


@dataclass(frozen=True, slots=True)
class Filter:
    """Filter of the problems to show."""

    sources: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pass_rate: tuple[float, float] = (0.0, 1.0)
    states: tuple[str, ...] = ()
    """Problems in any of these states; empty: all."""
    text: str = ""
    """Search text in the problem's text or id; case is ignored."""


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """All problems of the pool, in order of addition. One copy of the texts serves the frames of all scores."""

    ids_P: np.ndarray
    sources_P: np.ndarray
    names_P: np.ndarray
    """Rank of each id in the order of ids."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all problems at one moment."""

    frame: pd.DataFrame
    """The columns of `Catalogue.scored`; its index is the problem's row in `Store.problems`."""
    names_P: np.ndarray
    """Rank of each problem's id in the order of ids."""

    @cached_property
    def best_first(self) -> np.ndarray:
        """Positions by descending score; ties by id, problems without a score last."""
        return np.lexsort((self.names_P, -self.frame["score"].to_numpy(float)))

    @cached_property
    def worst_first(self) -> np.ndarray:
        """Positions by ascending score; ties by id, problems without a score last."""
        return np.lexsort((self.names_P, self.frame["score"].to_numpy(float)))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two rankings of the problems that are live in both."""

    frame: pd.DataFrame
    """Columns: id, source, left, right (scores), left_rank, right_rank (from 1), moved (ranks gained)."""
    spearman: float
    jaccard: float
    k: int
    only_left: int
    """Number of problems with a score only on the left."""
    only_right: int


@dataclass(eq=False)
class Catalogue:
    """Read access to a store: one pool, its benchmarks, and rollout files."""

    store: Store
    pool: str
    benchmarks: tuple[str, ...]
    transcripts: Transcripts | None = None
    turns: Turns = field(default_factory=Turns)
    """Who may compute now."""
    _scores: Recent[Scores] = field(default_factory=lambda: Recent(24))
    _listed: Recent[Listing] = field(default_factory=lambda: Recent(1))
    _queries: Recent[np.ndarray | None] = field(default_factory=lambda: Recent(1024))
    _near: Recent[pd.DataFrame] = field(default_factory=lambda: Recent(256))
    _texts: Recent[np.ndarray] = field(default_factory=lambda: Recent(64))

    def version(self) -> Hashable:
        """Changes with everything that is published: rows, problems, probes."""
        folder, changed = self.store.path / COLLECTIONS / self.pool / PROBES, 0
        with suppress(FileNotFoundError):
            changed = folder.stat().st_mtime_ns
        return (*map(self.store.commit, (self.pool, *self.benchmarks)), changed)

    @property
    def steps(self) -> list[int]:
        """Steps at which the pool or a benchmark was measured, ascending."""
        return sorted({step for name in (self.pool, *self.benchmarks) for step in self.store.steps(name)})

    def sources(self) -> list[str]:
        """Every source of the pool, sorted."""
        return sorted(set(pc.unique(self.store.problems(self.pool, columns=["source"])["source"]).to_pylist()))

    def tags(self) -> list[str]:
        """Every tag of the pool, sorted."""
        flat = pc.list_flatten(self.store.problems(self.pool, columns=["tags"])["tags"])
        return sorted(pc.unique(flat).to_pylist())

    def scored(self, benchmark: str, step: int | None, metric: str) -> pd.DataFrame:
        """Frame of all problems, in order of addition: id, source, score (nan: not ranked), state, pass_rate, norm,
        n_rollouts, age.

        RequestError for an unknown benchmark or metric.
        """
        return self._scores_of(benchmark, step, metric).frame

    def ranked(
        self, benchmark: str, step: int | None, metric: str, wanted: Filter, *, largest: bool = True
    ) -> pd.DataFrame:
        """Problems that pass the filter, best first; ties by id, problems without a score last."""
        frame, order = self.ranking(benchmark, step, metric, wanted, largest=largest)
        return frame.iloc[order]

    def ranking(
        self, benchmark: str, step: int | None, metric: str, wanted: Filter, *, largest: bool = True
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Like `ranked`: the frame of `scored`, and the positions in it, best first."""
        scores = self._scores_of(benchmark, step, metric)
        order = scores.best_first if largest else scores.worst_first
        return scores.frame, order if wanted == Filter() else order[self._mask(scores.frame, wanted)[order]]

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """Text of some problems."""
        return {record["id"]: text_of(record) for record in self.store.records(self.pool, list(ids))}

    def record(self, problem_id: str) -> dict[str, Any]:
        """The problem's record; RequestError for an unknown id."""
        return self.store.records(self.pool, [problem_id])[0]

    def history(self, problem_id: str, metric: str) -> pd.DataFrame:
        """Frame of one problem at every step: step, benchmark, score, state, pass_rate, norm, n_rollouts, age."""
        columns = ["step", "benchmark", "score", "state", "pass_rate", "norm", "n_rollouts", "age"]
        if metric in ("cosine", "dot") and len(self.store.bases) == 1:
            return pd.DataFrame(self._own_history(problem_id, cast("Metric", metric)), columns=columns)
        row = int(self.store.view(self.pool).numbers_of([problem_id])[0])
        self.record(problem_id)
        rows = []
        for step in self.steps:
            for name in self.benchmarks:
                frame = self.scored(name, step, metric)
                place = int(np.searchsorted(frame.index.to_numpy(), row))
                if place < len(frame) and frame.index[place] == row:  # not deleted
                    rows.append([step, name, *(frame[column].to_numpy()[place] for column in columns[2:])])
        return pd.DataFrame(rows, columns=columns)

    def _own_history(self, problem_id: str, metric: Metric) -> Iterator[tuple]:
        """The rows of `history`, from the problem's own rows alone; the store has one basis."""
        track = self.store.track(self.pool, problem_id)
        if track.is_deleted:
            return
        units_RD, live = track.unit_rows(), track.states == State.LIVE
        nothing = (float("nan"), STATE_NAMES[3], float("nan"), float("nan"), 0, float("nan"))
        for step in self.steps:
            row = track.newest(step)
            for name in self.benchmarks:
                if row < 0:
                    yield (step, name, *nothing)
                    continue
                score, query_D = float("nan"), self._query(name, step, metric)
                if live[row] and query_D is not None:
                    score = float(units_RD[row] @ query_D) * (1.0 if metric == "cosine" else float(track.norms[row]))
                about = float(track.pass_rates[row]), float(track.norms[row]), int(track.n_rollouts[row])
                yield (step, name, score, STATE_NAMES[track.states[row]], *about, float(step - track.steps[row]))

    def _query(self, benchmark: str, step: int, metric: Metric) -> np.ndarray | None:
        """The benchmark's target at a step as a query, float32 [D]; None without one. The store has one basis."""

        def make() -> np.ndarray | None:
            found = target_at(self.store, benchmark, step)
            return None if found is None else direction(found, self.store.dim, metric)

        return self._queries.get((benchmark, step, metric, self.store.commit(benchmark)), make)

    def nearest(self, problem_id: str, step: int | None, k: int = 10) -> pd.DataFrame:
        """The k problems with the most similar gradients: id, source, cosine, pass_rate.

        Empty if the problem has no gradient.
        """
        key = (problem_id, step, k, self.store.commit(self.pool))
        return self._near.get(key, lambda: self._nearest(problem_id, step, k))

    def _nearest(self, problem_id: str, step: int | None, k: int) -> pd.DataFrame:
        view = self.store.view(self.pool, step)
        place = int(view.positions([problem_id], strict=False)[0])
        columns = ["id", "source", "cosine", "pass_rate"]
        if place < 0 or not view.live[place]:
            return pd.DataFrame(columns=columns)
        query = view.rows(np.array([place]))[0]
        if view.n_bases > 1:  # rows of other bases share no dimensions with this one
            basis = int(view.bases[place])
            view = self.store.view(self.pool, step, basis=basis)
            query = laid_out({basis: query}, view.n_bases)
        with self.turns.scan():
            hits = search(view, query, k + 1, metric="cosine")
        others = hits.ids != problem_id
        positions = hits.positions[others][:k]
        ids = view.ids_at(positions)
        return pd.DataFrame(
            {
                "id": ids,
                "source": view.problems_at(positions, ["source"])["source"].to_pylist(),
                "cosine": hits.scores[others][:k].astype(float),
                "pass_rate": view.pass_rates[positions].astype(float),
            },
            columns=columns,
        )

    def rollouts(self, problem_id: str) -> list[Transcript]:
        """The problem's rollouts from the given files; empty without files."""
        return [] if self.transcripts is None else self.transcripts.of(problem_id)

    def probes(self, problem_id: str) -> list[dict[str, Any]]:
        """Stored probes of a problem: step, target, derivatives, rewards, lengths."""
        table = self.store.probes(self.pool).table()
        rows: list[dict[str, Any]] = table.filter(pc.equal(table["id"], problem_id)).to_pylist()
        return rows

    def compare(self, left: tuple[str, int | None], right: tuple[str, int | None], metric: str) -> Comparison:
        """Compare two rankings, each given by (benchmark, step)."""
        a, b = self.scored(*left, metric), self.scored(*right, metric)
        both = a["score"].notna() & b["score"].notna()
        frame = pd.DataFrame({"id": a["id"], "source": a["source"], "left": a["score"], "right": b["score"]})[both]
        names_P = self._listing().names_P[frame.index.to_numpy()]
        frame = frame.reset_index(drop=True)
        for side in ("left", "right"):
            ranks = np.empty(len(frame))
            ranks[np.lexsort((names_P, -frame[side].to_numpy()))] = np.arange(1, len(frame) + 1)
            frame[f"{side}_rank"] = ranks
        frame["moved"] = frame["left_rank"] - frame["right_rank"] if len(frame) else []
        k = max(1, len(frame) // 10)
        x, y = frame["left"].to_numpy(float), frame["right"].to_numpy(float)
        return Comparison(
            frame,
            spearman(x, y),
            jaccard(x, y, k),
            k,
            int((a["score"].notna() & b["score"].isna()).sum()),
            int((a["score"].isna() & b["score"].notna()).sum()),
        )

    def _scores_of(self, benchmark: str, step: int | None, metric: str) -> Scores:
        check_known("metric", metric, METRICS)
        key = (benchmark, step, metric, self.store.commit(self.pool), self.store.commit(benchmark))

        def make() -> Scores:
            frame = self._scored(benchmark, step, cast("Metric", metric))
            return Scores(frame, self._listing().names_P[frame.index.to_numpy()])

        found = self._scores.find(key)
        if found is None:
            with self.turns.scan():
                found = self._scores.get(key, make)  # the one before in the line may have asked the same
        return found

    def _listing(self) -> Listing:
        problems = self.store.problems(self.pool, columns=["id", "source"])
        ids, sources = problems["id"], problems["source"]
        key = (self.store.commit(self.pool), len(problems))
        return self._listed.get(key, lambda: Listing(ids.to_numpy(), sources.to_numpy(), _ranks(ids)))

    def _scored(self, benchmark: str, step: int | None, metric: Metric) -> pd.DataFrame:
        view = self.store.view(self.pool, step)
        listing, gone = self._listing(), self.store.deleted(self.pool)
        if self.store.commit(self.pool) != view.commit:  # published meanwhile: a compaction gives other numbers
            return self._scored(benchmark, step, metric)
        place_P = np.full(len(listing.ids_P), -1)
        place_P[view.stored.column("problem")] = np.arange(len(view))
        wanted = target_at(self.store, benchmark, step)
        scores = np.full(len(view), np.nan, np.float32)
        if wanted is not None and view.live.any():
            scores = score_rows(view, query_vectors(view, [wanted], metric)[0], metric, eligible_positions(view, None))
        newest = step if step is not None else max(self.steps, default=0)
        states = np.append(view.states, np.uint8(UNMEASURED))[place_P]
        names = np.array([*STATE_NAMES[:3], STATE_NAMES[3]], object)
        frame = pd.DataFrame(
            {
                "id": listing.ids_P,
                "source": listing.sources_P,
                "score": np.append(scores, np.nan)[place_P].astype(float),
                "state": names[np.where(states == UNMEASURED, 3, states)],
                "pass_rate": np.append(view.pass_rates, np.nan)[place_P].astype(float),
                "norm": np.append(view.norms, np.nan)[place_P].astype(float),
                "n_rollouts": np.append(view.n_rollouts, 0)[place_P].astype(int),
                "age": newest - np.append(view.steps.astype(float), np.nan)[place_P],
            }
        )
        return frame if not gone else frame[~frame["id"].isin(gone)]

    def _mask(self, frame: pd.DataFrame, wanted: Filter) -> np.ndarray:
        words = wanted.text.strip()
        columns = ["id", "source", "prompt", "tags"] if words else ["source", "tags"]
        problems = self.store.problems(self.pool, columns=columns)
        rates = frame["pass_rate"].reindex(range(len(problems))).to_numpy(float)
        whole = wanted.pass_rate == (0.0, 1.0)
        where = Where(wanted.sources, wanted.tags, None if whole else wanted.pass_rate)
        mask = where.mask(problems, rates)
        if words:
            key = (words, self.store.commit(self.pool), len(problems))
            mask &= self._texts.get(key, lambda: _containing(problems, words))
        kept: np.ndarray = mask[frame.index.to_numpy()]
        if wanted.states:
            kept = kept & frame["state"].isin(wanted.states).to_numpy()
        return kept


def _ranks(values: pa.ChunkedArray) -> np.ndarray:
    """Rank of each text, int64; UTF-8 sorts as Python's texts do."""
    order = pc.sort_indices(values).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _containing(problems: pa.Table, words: str) -> np.ndarray:
    """bool [P]: the problems that have the words in their text or id; case is ignored."""
    found = [pc.match_substring(problems[name], words, ignore_case=True) for name in ("prompt", "id")]
    mask_P: np.ndarray = pc.or_(*found).to_numpy()
    return mask_P


def text_of(record: dict[str, Any]) -> str:
    """A problem's text for display: its prompt, or its chat messages joined by blank lines."""
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return message_text(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message_text(message['content'])}" for message in prompt)
