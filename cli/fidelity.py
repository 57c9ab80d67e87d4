"""`fidelity`: how well a store's sketches reproduce the exact ranking, beside how well that repeats itself."""

from pathlib import Path
from typing import Annotated

from gradstore.cli.app import command, opt
from gradstore.cli.completion import collections
from gradstore.cli.query import Json, StorePath
from gradstore.cli.ranks import check_divided, load_policy
from gradstore.cli.rollout import Device, Model, Trust, check_rollouts_of
from gradstore.cli.show import print_json, print_table
from gradstore.errors import RequestError


@command(
    divided=True,
    example="gradstore fidelity store --pool pool --against amc --model MODEL --rollouts pool-rollouts.jsonl "
    "--benchmark-rollouts amc-rollouts.jsonl",
)
def fidelity(
    store: StorePath,
    pool: Annotated[str, opt("Collection whose ranking is measured.", "--pool", autocompletion=collections)],
    against: Annotated[str, opt("Benchmark whose gradient is the target.", "--against", autocompletion=collections)],
    model: Model,
    rollouts: Annotated[Path, opt("Rollouts the pool's rows were made from.")],
    benchmark_rollouts: Annotated[Path, opt("Rollouts the benchmark's rows were made from.")],
    sample: Annotated[int, opt("Live problems measured exactly, drawn at random.", min=3)] = 200,
    top: Annotated[int | None, opt("Overlap of the best k too (a tenth).", "--top", "-k", min=1)] = None,
    reference: Annotated[
        str | None, opt("Model of the KL term, for rows that were collected with --reference.")
    ] = None,
    adapter: Annotated[str | None, opt("PEFT adapter to load on the model.")] = None,
    at: Annotated[int | None, opt("Look at the store as of this step.", "--at")] = None,
    seed: Annotated[int, opt("Draws the sample.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Compare stored cosine scores with exact ones on a sample, beside the exact scores' own reliability.

    Under torchrun the model is sharded over the ranks and each measures its own problems.
    """
    import gradstore
    from gradstore.engine.assessing.fidelity import fidelity as measure
    from gradstore.engine.gradients.logprobs import Reference
    from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
    from gradstore.engine.rollouts import read_rollouts
    from gradstore.engine.sketches.spec import SketchSpec

    check_divided("fidelity", *(["--reference"] if reference is not None else []))
    opened = gradstore.open(store)
    settings = SketchSpec.of(opened.fingerprint).objective
    if (settings.reference is None) != (reference is None):
        raise RequestError(
            f"the rows of {store} have {'no' if settings.reference is None else 'a'} KL term to a model: "
            f"{'leave --reference out' if settings.reference is None else 'give it, --reference'}"
        )
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    sources = [
        read_rollouts(path, tokenizer=tokenizer, vocabulary=vocabulary_size(model, trust_remote_code=trust_remote_code))
        for path in (rollouts, benchmark_rollouts)
    ]
    check_rollouts_of(opened, pool, sources[0], rollouts)
    check_rollouts_of(opened, against, sources[1], benchmark_rollouts)
    policy = load_policy(model, adapter, device, trust_remote_code=trust_remote_code)
    if reference is not None:
        compared = Reference(
            load_model(reference, device=device, trust_remote_code=trust_remote_code), temperature=settings.temperature
        )
        if compared.digest != settings.reference:
            raise RequestError(f"{reference}: other weights than those the KL term of the rows of {store} is to")
        for source in sources:
            source.change(compared)
    found = measure(opened, pool, against, policy, *sources, at=at, sample=sample, k=top, seed=seed)
    facts = found.describe()
    if json:
        print_json(facts)
        return
    halves = facts["reliability"]
    print_table(
        f"{pool} against {against}: {facts['n_problems']} live problems measured exactly",
        ["what", "Spearman", "top 5 %", f"top {facts['k']}"],
        [
            [
                f"stored sketches, {facts['row_bytes']:.0f} bytes a row",
                f"{facts['spearman']:.3f}",
                f"{facts['top_5_percent']:.2f}",
                f"{facts['top_k']:.2f}",
            ],
            ["exact, even against odd rollouts", _known(halves["spearman"]), "", ""],
            ["exact, as many new rollouts (Spearman-Brown)", _known(halves["rank_reliability"]), "", ""],
        ],
        right=["Spearman", "top 5 %", f"top {facts['k']}"],
    )


def _known(correlation: float) -> str:
    return "unknown" if correlation != correlation else f"{correlation:.3f}"
