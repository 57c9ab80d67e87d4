"""Section on the best and worst problems of the ranking, with their text, history and rollouts."""

from typing import Any

import numpy as np
import pandas as pd

from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import Section, Table, columns_of, written
from gradstore.analysis.report.transcripts import Transcripts, chosen
from gradstore.wording import first_words

_ROLLOUTS_SHOWN = 4
_LONGEST_ROLLOUT = 3000
_LONGEST_PROMPT = 20_000


def extremes(found: Findings, transcripts: Transcripts | None) -> Section:
    """Section on the best and worst aligned problems of each benchmark."""
    if not found.benchmarks:
        return Section("problems", "Problems", missing="No benchmark has a target, so problems cannot be ranked.")
    blocks = []
    for name in found.benchmarks:
        noise_P = found.noise(name)
        live = found.newest[name].assign(place=np.arange(len(noise_P))).dropna(subset="score")
        n = min(found.n_listed, (len(live) + 1) // 2)
        best, worst = _first(live, n, ascending=False), _first(live, n, ascending=True)
        for key, part, words in (("top", best, "most aligned"), ("bottom", worst, "least aligned")):
            first = 1 if key == "top" else len(live)
            ranks = [first + place if key == "top" else first - place for place in range(len(part))]
            title = f"The {len(part)} {words} with {name}"
            errors = noise_P[part["place"]].tolist()
            table = _table(found, f"{key}-{name}", title, part, ranks, transcripts, errors)
            blocks.append(table)
    lead = f"Ranked by {found.metric} at step {found.steps[-1]}. Open a row for the whole text, its history"
    lead += " and rollouts." if transcripts is not None else "; give a rollout file with --rollouts to see responses."
    lead += " Grey: a score within the noise of its rollouts, as far as repeated measurements tell it."
    return Section("problems", "Problems", lead, blocks)


def _first(live: pd.DataFrame, n: int, *, ascending: bool) -> pd.DataFrame:
    """The first n by score, ties by id, with their ids as `text_id`: from the least score up, or from the best down."""
    if n == 0:
        return live.head(0).assign(text_id="")
    scores_P = live["score"].to_numpy() if ascending else -live["score"].to_numpy()
    some = live[scores_P <= np.partition(scores_P, n - 1)[n - 1]]
    some = some.assign(text_id=some["id"].astype(str))
    return some.sort_values(["score", "text_id"], ascending=[ascending, not ascending]).head(n)


def _table(
    found: Findings,
    key: str,
    title: str,
    part: Any,
    ranks: list[int],
    transcripts: Transcripts | None,
    errors: list[float],
) -> Table:
    ids = part["text_id"].tolist()
    records = found.problems(ids)
    histories = history_lines(found, ids)
    columns = columns_of(
        "Rank:integer | Problem:id | Source | Score:signed | Pass rate:percent | Age (steps):integer | Text"
    )
    rows, details = [], []
    for rank, line, record in zip(ranks, part.to_dict("records"), records, strict=True):
        rows.append(
            [
                rank,
                record["id"],
                record["source"],
                line["score"],
                line["pass_rate"],
                line["age"],
                first_words(record["prompt"], 160),
            ]
        )
        details.append(
            {
                "text": record["prompt"][:_LONGEST_PROMPT],
                "facts": _facts(record, line, histories[record["id"]]),
                "rollouts": []
                if transcripts is None
                else chosen(transcripts.of(record["id"]), _ROLLOUTS_SHOWN, _LONGEST_ROLLOUT),
            }
        )
    return Table(key, title, columns, rows, details, errors={"Score": errors})


def _facts(record: dict[str, Any], line: dict[str, Any], history: list[tuple[str, str]]) -> list[tuple[str, str]]:
    facts = [("Ground truth", record["ground_truth"] or "–"), ("Tags", ", ".join(record["tags"]) or "–")]
    facts.append(("Gradient norm", written(line["norm"], "number")))
    return [*facts, *history]


def history_lines(found: Findings, ids: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Problem id -> (name, text) lines: scores over steps, one line per benchmark; rounds that picked it."""
    lines: dict[str, list[tuple[str, str]]] = {name: [] for name in ids}
    for benchmark, frame in found.alignments.items():
        codes = frame["id"].cat.categories.get_indexer(ids)
        mine = frame[np.isin(frame["id"].cat.codes, codes)]
        for name, rows in mine.groupby(mine["id"].astype(str)):
            parts = [
                f"step {step}: {written(float(score), 'signed') if np.isfinite(score) else state.replace('_', ' ')}"
                for step, score, state in zip(rows["step"], rows["score"], rows["state"].astype(str), strict=True)
            ]
            shown = parts if len(parts) <= 12 else [*parts[:3], "…", *parts[-8:]]
            lines[name].append((f"Score against {benchmark}", ", ".join(shown)))
    for name in ids:
        taken = [str(one.step) for one in found.rounds if name in found.picked[one.number]]
        if taken:
            lines[name].append(("Trained on", "in the round of step " + ", ".join(taken)))
    return lines
