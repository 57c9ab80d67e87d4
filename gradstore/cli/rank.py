"""`query` and `select`: ask a store which problems align with a benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gradstore.cli import app
from gradstore.cli.show import first_words, print_json, print_table, say, short_layer
from gradstore.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    from engine.query import Metric
    from engine.targets import Aggregate, Target
    from gradstore import Store, View

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Against = Annotated[str | None, typer.Option("--against", help="Benchmark whose gradient is the target.")]
Pool = Annotated[str | None, typer.Option("--pool", help="Collection to rank; default: the only other one.")]
At = Annotated[int | None, typer.Option("--at", help="Look at the store as of this step.")]
HowAggregated = Annotated[str, typer.Option(help="How the target is made: mean or unit_mean.")]
Filter = Annotated[
    list[str] | None,
    typer.Option("--where", help="Keep source=NAME, tag=NAME or pass_rate=LOW..HIGH; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def query(
    store: StorePath,
    against: Against = None,
    top: Annotated[int, typer.Option("--top", "-k", help="How many problems.")] = 20,
    pool: Pool = None,
    at: At = None,
    metric: Annotated[str, typer.Option(help="cosine or dot.")] = "cosine",
    smallest: Annotated[bool, typer.Option("--smallest", help="The least aligned first.")] = False,
    aggregate: HowAggregated = "mean",
    where: Filter = None,
    index: Annotated[str, typer.Option(help="scan (exact, nothing built) or flat (FAISS).")] = "scan",
    layers: Annotated[int, typer.Option(help="Show the N layers with the largest terms of each score.")] = 0,
    json: Json = False,
) -> None:
    """Which problems align with a benchmark, best first."""
    import gradstore
    from engine.query import search
    from engine.targets import target
    from engine.where import Where

    if against is None:
        raise RequestError("query needs a benchmark: --against NAME")
    opened = gradstore.open(store)
    view = opened.view(_pool(opened, pool, against), at)
    wanted = target(opened, against, at, cast("Aggregate", aggregate))
    score = cast("Metric", metric)
    hits = search(
        view,
        wanted,
        top,
        metric=score,
        largest=not smallest,
        where=Where.parse(where) if where else None,
        index=None if index == "scan" else index,
    )
    newest = max(int(view.steps.max()), wanted.steps[1]) if at is None else at
    problems = view.problems.take(hits.positions).to_pylist()
    shares = _largest_layers(view, hits.positions, wanted, score, layers) if layers else [{}] * len(hits)
    rows = [
        {
            "rank": rank + 1,
            "id": str(hits.ids[rank]),
            "score": float(hits.scores[rank]),
            "pass_rate": float(view.pass_rates[position]),
            "age": newest - int(view.steps[position]),
            "source": problems[rank]["source"],
            "problem": problems[rank]["prompt"],
            **({"layers": shares[rank]} if layers else {}),
        }
        for rank, position in enumerate(hits.positions)
    ]
    if json:
        print_json(
            {
                "pool": view.collection,
                "commit": view.commit,
                "at": at,
                "metric": metric,
                "target": wanted.describe(),
                "n_problems": len(view),
                "n_eligible": hits.n_eligible,
                "hits": rows,
            }
        )
        return
    extra = ["layers"] if layers else []
    print_table(
        f"{view.collection} against {against}, {metric}, step {newest}: "
        f"{len(hits)} of {hits.n_eligible} eligible, {len(view)} measured",
        ["rank", "id", "score", "pass rate", "age", "source", *extra, "problem"],
        [
            [
                str(row["rank"]),
                row["id"],
                f"{row['score']:+.4f}",
                f"{row['pass_rate']:.2f}",
                str(row["age"]),
                row["source"],
                *(
                    [" ".join(f"{short_layer(name)} {term:+.3f}" for name, term in row["layers"].items())]
                    if layers
                    else []
                ),
                first_words(row["problem"]),
            ]
            for row in rows
        ],
        right=["rank", "score", "pass rate", "age"],
    )


@app.command()
def select(
    store: StorePath,
    n: Annotated[int, typer.Option("-n", help="How many problems.")],
    out: Annotated[Path, typer.Option(help="Folder for train.parquet, train.jsonl and selection.json.")],
    against: Against = None,
    pool: Pool = None,
    at: At = None,
    selector: Annotated[str, typer.Option(help="Name of a selector, or GradAlign's name of it.")] = "cosine",
    aggregate: HowAggregated = "mean",
    where: Filter = None,
    seed: Annotated[int, typer.Option(help="Drives the selectors that draw at random.")] = 0,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Go on with fewer than asked.")] = False,
    json: Json = False,
) -> None:
    """Choose n problems and write them ready for verl."""
    import gradstore
    from engine.export import write_selection
    from engine.selection import select as choose
    from engine.targets import target
    from engine.where import Where

    opened = gradstore.open(store)
    wanted = None if against is None else target(opened, against, at, cast("Aggregate", aggregate))
    selection = choose(
        opened,
        _pool(opened, pool, against),
        wanted,
        n,
        selector,
        at,
        where=Where.parse(where) if where else None,
        seed=seed,
        allow_fewer=allow_fewer,
    )
    written = write_selection(opened, selection, out)
    if json:
        print_json(selection.describe())
    else:
        if len(selection) < n:
            say(f"only {len(selection)} of {n} problems could be chosen")
        say(f"{len(selection)} of {selection.n_candidates} candidates by {selection.selector}: {', '.join(written)}")


def _pool(store: "Store", pool: str | None, against: str | None) -> str:
    if pool is not None:
        return pool
    others = [name for name in store.collections if name != against]
    if len(others) == 1:
        return others[0]
    raise RequestError(
        f"name the collection to rank with --pool: {', '.join(store.collections) or 'the store has none'}"
    )


def _largest_layers(
    view: "View", positions: "np.ndarray", wanted: "Target", metric: "Metric", n: int
) -> list[dict[str, float]]:
    from engine.shares import layer_contributions

    names = [name for name, _, _ in view.layers]
    terms_KL = layer_contributions(view, positions, wanted, metric)
    return [{names[i]: float(row[i]) for i in (-row).argsort()[:n]} for row in terms_KL]
