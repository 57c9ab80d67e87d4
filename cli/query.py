"""`query`, `select` and `selectors`: ask a store which problems align with a benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gradstore.cli.app import command, given, opt
from gradstore.cli.completion import collections
from gradstore.cli.show import print_csv, print_json, print_table, say, warn
from gradstore.errors import GradstoreError, RequestError, check_number
from gradstore.wording import first_words, short_layer

if TYPE_CHECKING:
    import numpy as np

    from gradstore import Store, View
    from gradstore.engine.searching.fusion import Fusion
    from gradstore.engine.searching.query import Hits, Metric
    from gradstore.engine.searching.targets import Aggregate, Target
    from gradstore.engine.searching.where import Where
    from gradstore.engine.selecting.candidates import Selector


class _OnlyReadError(GradstoreError):
    """A URL where a store is written; no RequestError, because that is a ValueError, which click shows in its way."""

    exit_status = 2


def _folder(text: str) -> Path:
    if "://" in text:
        raise _OnlyReadError(
            "a store at a URL is only read (query, select, info, open): `gradstore pull URL FOLDER`, and give FOLDER"
        )
    return Path(text)


def _folder_or_url(text: str) -> Path | str:
    return text if "://" in text else Path(text)


StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", parser=_folder)]
StoreOrUrl = Annotated[
    Path,
    typer.Argument(
        metavar="STORE",
        help="Folder of the store, or its URL (s3://, gs://, az://, hf://, ...).",
        parser=_folder_or_url,
    ),
]
"""A store that is only read; a URL is a str, for `gradstore.open`."""
AgainstAny = Annotated[
    list[str] | None,
    opt("Benchmark whose gradient is the target; may be repeated.", "--against", autocompletion=collections),
]
Pool = Annotated[
    str | None,
    opt(
        "Collection to rank; default: the only other one, or one that is twice as large as any.",
        "--pool",
        autocompletion=collections,
    ),
]
At = Annotated[int | None, opt("Look at the store as of this step.", "--at")]
HowAggregated = Annotated[str, opt("How the target is made: mean or unit_mean.")]
Filter = Annotated[
    list[str] | None, opt("Keep source=NAME, tag=NAME or pass_rate=LOW..HIGH; may be repeated.", "--where")
]
Overwrite = Annotated[bool, opt("Replace files that are there already.", "--overwrite")]
Json = Annotated[bool, opt("Print JSON.", "--json")]


@command(
    needs={"damping": "metric=fisher"},
    panels={
        "What is ranked": "against pool at where top smallest",
        "By what": "metric damping aggregate fuse weight index",
        "What is printed": "layers json csv verbose quiet help",
    },
    example="gradstore query store --against amc --top 20 --where source=gsm8k",
)
def query(
    store: StoreOrUrl,
    against: AgainstAny = None,
    top: Annotated[int, opt("How many problems.", "--top", "-k")] = 20,
    pool: Pool = None,
    at: At = None,
    metric: Annotated[str, opt("cosine, dot or fisher.")] = "cosine",
    damping: Annotated[
        float | None, opt("fisher: lambda over the mean eigenvalue of the second moment [default: 0.1].")
    ] = None,
    fuse: Annotated[
        str | None, opt("Several benchmarks: mean of the scores (default), minimum, or rrf (ranks).")
    ] = None,
    weight: Annotated[
        list[float] | None, opt("One for each --against, in their order (mean, rrf).", "--weight")
    ] = None,
    smallest: Annotated[bool, opt("The least aligned first.", "--smallest")] = False,
    aggregate: HowAggregated = "mean",
    where: Filter = None,
    index: Annotated[
        str,
        opt(
            "scan (exact, nothing built), auto (the fastest for one query), or turbovec or flat: "
            "opened or built beside the collection."
        ),
    ] = "scan",
    layers: Annotated[int, opt("Show the N layers with the largest terms of each score.")] = 0,
    json: Json = False,
    csv: Annotated[bool, opt("Print CSV.", "--csv")] = False,
) -> None:
    """Which problems align with a benchmark, or with several, best first."""
    import gradstore

    if not against:
        raise RequestError("query needs a benchmark: --against NAME")
    check_number("--top", top, least=1)
    check_number("--layers", layers, least=0)
    several = len(against) > 1
    if not several and (fuse or weight):
        raise RequestError("--fuse and --weight combine several benchmarks: give --against more than once")
    if json and csv:
        raise RequestError("--json and --csv are two forms of one answer: give one")
    if several and (layers or index != "scan"):
        raise RequestError("--layers and --index are for one benchmark: give --against once")
    opened = gradstore.open(store)
    chosen = _pool(opened, pool, against)
    opened.check_files(chosen, *against)
    view = opened.view(chosen, at)
    view.stored.read_ahead()  # Reading and checking the codes takes as long as these imports.
    from gradstore.engine.searching.fisher import DAMPING
    from gradstore.engine.searching.notices import notices
    from gradstore.engine.searching.query import search
    from gradstore.engine.searching.targets import target

    wanted = [target(opened, name, at, cast("Aggregate", aggregate)) for name in against]
    strength = DAMPING if damping is None else damping
    asked: dict[str, Any] = {
        "metric": metric, "largest": not smallest, "where": _filter(view, where), "damping": strength,
    }  # fmt: skip
    if several:
        from gradstore.engine.searching.fusion import search_fused

        combined = search_fused(view, wanted, top, how=cast("Fusion", fuse or "mean"), weights=weight or None, **asked)
        hits: Hits = combined
        more = [{"scores": dict(zip(against, each, strict=True))} for each in combined.scores_QK.T.tolist()]
    else:
        hits = search(view, wanted[0], top, index=None if index == "scan" else index, **asked)
        more = [{} for _ in range(len(hits))]
    if layers:
        shares = _largest_layers(view, hits.positions, wanted[0], cast("Metric", metric), layers, strength)
        more = [{"layers": share} for share in shares]
    best = float(hits.scores[0]) if len(hits) and not smallest and (fuse or "mean") != "rrf" else None
    said = notices(view, wanted, best)
    newest = max(int(view.steps.max()), *(goal.steps[1] for goal in wanted)) if at is None else at
    rows = [
        {
            "rank": rank + 1,
            "id": str(hits.ids[rank]),
            "score": float(hits.scores[rank]),
            "pass_rate": float(view.pass_rates[position]),
            "age": newest - int(view.steps[position]),
            "source": problem["source"],
            "problem": problem["prompt"],
            **more[rank],
        }
        for rank, (position, problem) in enumerate(
            zip(hits.positions, view.problems_at(hits.positions, ["source", "prompt"]).to_pylist(), strict=True)
        )
    ]
    if json:
        one = {"target": wanted[0].describe()}
        each = {"fuse": fuse or "mean", "weights": weight or None, "targets": [goal.describe() for goal in wanted]}
        print_json(
            {
                "pool": view.collection,
                "commit": view.commit,
                "at": at,
                "metric": metric,
                **({"damping": strength} if metric == "fisher" else {}),
                **(each if several else one),
                "n_problems": len(view),
                "n_eligible": hits.n_eligible,
                "n_unknown": hits.n_unknown,
                "notices": said,
                "hits": rows,
            }
        )
        return
    for sentence in said:
        warn(sentence)
    if csv:
        print_csv([{name: value for name, value in row.items() if not isinstance(value, dict)} for row in rows])
        return
    against_what = " and ".join(against) + (f" ({fuse or 'mean'})" if several else "")
    unknown = f", {hits.n_unknown} in a basis without target left out" if hits.n_unknown else ""
    title = (
        f"{view.collection} against {against_what}, {metric}, step {newest}: {len(hits)} of {hits.n_eligible} eligible"
    )
    _print_hits(f"{title}, {len(view)} measured{unknown}", rows, bool(layers))


def _print_hits(title: str, rows: list[dict], with_layers: bool) -> None:
    shown = []
    for row in rows:
        score = row["score"]
        terms = [" ".join(f"{short_layer(name)} {term:+.3f}" for name, term in row.get("layers", {}).items())]
        cells = [
            str(row["rank"]),
            row["id"],
            f"{score:+.4f}" if 1e-3 <= abs(score) < 1e5 else f"{score:+.3e}",
            f"{row['pass_rate']:.2f}",
            str(row["age"]),
            row["source"],
        ]
        shown.append([*cells, *terms * with_layers, first_words(row["problem"])])
    columns = ["rank", "id", "score", "pass rate", "age", "source", *["layers"] * with_layers, "problem"]
    numbers = ["rank", "score", "pass rate", "age"]
    spare = ["source", "age", "pass rate", *["problem"] * with_layers]
    print_table(title, columns, shown, right=numbers, spare=spare, signed="score")


@command(
    needs={"relevance": "diversity=mmr"},
    panels={
        "What is chosen from": "against pool at where",
        "By what": "selector aggregate confidence temperature quota diversity relevance seed",
        "What is written": "n out allow_fewer overwrite",
    },
    example="gradstore select store --against amc -n 256 --out selected/",
)
def select(
    context: typer.Context,
    store: StoreOrUrl,
    n: Annotated[int, opt("How many problems.", "-n")],
    out: Annotated[Path, opt("Folder for train.parquet, train.jsonl and selection.json.")],
    against: AgainstAny = None,
    pool: Pool = None,
    at: At = None,
    selector: Annotated[
        str,
        opt(
            "Name of a selector (`gradstore selectors`), or GradAlign's name of it, or a mixture such as "
            "cosine:0.7+rand:0.3."
        ),
    ] = "cosine",
    aggregate: HowAggregated = "mean",
    where: Filter = None,
    temperature: Annotated[
        float | None, opt("Draw the picks, the better the likelier, in units of the scores' standard deviation.")
    ] = None,
    quota: Annotated[
        list[str] | None,
        opt("SOURCE=SHARE of the picks; may be repeated. What is left of 1 is the others'.", "--quota"),
    ] = None,
    confidence: Annotated[float, opt("Of the scores' intervals, where there are any.")] = 0.95,
    diversity: Annotated[
        str | None, opt("Pick among the best 4 n so that they differ: mmr (marginal relevance) or kmeans (strata).")
    ] = None,
    relevance: Annotated[float, opt("mmr: weight of the score against being different, 0 to 1.")] = 0.5,
    seed: Annotated[int, opt("Drives whatever is drawn at random, and k-means.")] = 0,
    allow_fewer: Annotated[bool, opt("Go on with fewer than asked.", "--allow-fewer")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose n problems and write them ready for verl."""
    import gradstore
    from gradstore.engine.searching.notices import notices
    from gradstore.engine.searching.targets import target
    from gradstore.engine.selecting.diversity import Diversity, Method
    from gradstore.engine.selecting.export import check_folder, write_selection
    from gradstore.engine.selecting.mixture import mixture_name, parts_of, sums_to_one
    from gradstore.engine.selecting.quotas import parse_quotas
    from gradstore.engine.selecting.selection import select as choose

    opened = gradstore.open(store)
    names = against or []
    check_folder(out, overwrite)
    picks_by = parts_of(selector)
    if "confidence" in given(context) and not any(part.selector.needs_probes for part in picks_by):
        raise RequestError(f"--confidence: {selector} has no intervals, only selectors by probes have: leave it out")
    if not sums_to_one(selector):
        say(f"the weights of {selector} do not sum to 1: taken as {mixture_name(picks_by)}")
    chosen = _pool(opened, pool, names)
    opened.check_files(chosen, *names)
    goes_by_one = any(part.selector.needs_target or part.selector.needs_probes for part in picks_by)
    if names and not goes_by_one:
        say(f"{selector} goes by no benchmark: --against is not used")
    targets = [target(opened, name, at, cast("Aggregate", aggregate)) for name in names if goes_by_one]
    view = opened.view(chosen, at)
    selection = choose(
        opened,
        chosen,
        targets,
        n,
        selector,
        at,
        where=_filter(view, where),
        seed=seed,
        allow_fewer=allow_fewer,
        diversity=Diversity(cast("Method", diversity), relevance) if diversity else None,
        temperature=temperature,
        quotas=parse_quotas(quota) if quota else None,
        confidence=confidence,
    )
    written = write_selection(opened, selection, out, overwrite)
    best = float(selection.scores.max()) if selection.targets and not (temperature or quota) else None
    said = notices(view, targets if selection.targets else [], best)
    if json:
        print_json({**selection.describe(), "notices": said})
    else:
        for sentence in said:
            warn(sentence)
        if len(selection) < n:
            say(f"only {len(selection)} of {n} problems could be chosen")
        say(f"{len(selection)} of {selection.n_candidates} candidates by {selection.selector}: {', '.join(written)}")


@command(example="gradstore selectors")
def selectors(json: Json = False) -> None:
    """The selectors there are, those of other packages too."""
    from gradstore.engine.selecting.selectors import ALIASES, SELECTORS

    rows = [
        {
            "name": name,
            "aliases": " ".join(alias for alias, meant in ALIASES.items() if meant == name),
            "needs": " ".join(["target"] * selector.needs_target + ["probes"] * selector.needs_probes),
            "chooses_among": _chooses_among(selector),
            "score": selector.formula,
        }
        for name, selector in SELECTORS.items()
    ]
    if json:
        print_json(rows)
        return
    columns = ["name", "aliases", "needs", "chooses_among", "score"]
    print_table(
        f"{len(rows)} selectors",
        [name.replace("_", " ") for name in columns],
        [[row[name] for name in columns] for row in rows],
        spare=["aliases", "chooses among", "needs"],
    )


def _chooses_among(selector: "Selector") -> str:
    if selector.needs_probes:
        return "probed"
    return "all" if selector.whole_pool else "live" if selector.live_only else "measured"


def _filter(view: "View", terms: list[str] | None) -> "Where | None":
    """The filter of some terms; RequestError for a source or tag that no problem of the view has."""
    from gradstore.engine.searching.where import Where

    if not terms:
        return None
    found = Where.parse(terms)
    found.check(view.problems_at(columns=["source", "tags"]), view.pass_rates)
    return found


def _pool(store: "Store", pool: str | None, against: list[str]) -> str:
    from gradstore.layout import DERIVED

    if pool is not None:
        return pool
    others = [name for name in store.collections if name not in against and not name.endswith(DERIVED)]
    if len(others) == 1:
        return others[0]
    facts = store.info()["collections"]
    sizes = {name: facts[name]["problems"] for name in others}
    largest = max(others, key=lambda name: sizes.get(name, 0), default="")
    if others and all(2 * size <= sizes[largest] for name, size in sizes.items() if name != largest):
        return largest
    raise RequestError(
        f"name the collection to rank with --pool: {', '.join(store.collections) or 'the store has none'}"
    )


def _largest_layers(
    view: "View", positions: "np.ndarray", wanted: "Target", metric: "Metric", n: int, damping: float
) -> list[dict[str, float]]:
    from gradstore.engine.searching.shares import layer_contributions

    names = [name for name, _, _ in view.store.layers]
    terms_KL = layer_contributions(view, positions, wanted, metric, damping)
    return [{names[i]: float(row[i]) for i in (-row).argsort()[:n]} for row in terms_KL]
