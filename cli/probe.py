"""`probe`: each rollout's derivative along a benchmark's gradient, from forward passes, kept beside the rows."""

from pathlib import Path
from typing import Annotated

from gradstore.cli.app import command, opt
from gradstore.cli.completion import collections
from gradstore.cli.query import Json, StorePath
from gradstore.cli.ranks import load_policy
from gradstore.cli.rollout import Device, Model, Trust, check_rollouts_of
from gradstore.cli.show import print_json, print_table, progress, say
from gradstore.errors import RequestError

_WINDOW = 64
"""Problems probed and kept at once."""


@command(
    panels={
        "What is probed": "pool against rollouts benchmark_rollouts all_problems step",
        "With what": "model adapter known rank token_budget device trust_remote_code",
        "What is printed": "top json verbose quiet help",
    },
    example="gradstore probe store --pool pool --against amc --model MODEL --rollouts pool-rollouts.jsonl "
    "--benchmark-rollouts amc-rollouts.jsonl",
)
def probe(
    store: StorePath,
    pool: Annotated[str, opt("Collection of the problems.", "--pool", autocompletion=collections)],
    rollouts: Annotated[Path, opt("Rollouts of the problems.")],
    against: Annotated[
        str, opt("Benchmark; its name is kept with the derivatives.", "--against", autocompletion=collections)
    ],
    benchmark_rollouts: Annotated[Path, opt("Rollouts of the benchmark, whose gradient is the direction.")],
    model: Model,
    step: Annotated[int | None, opt("Policy version of the model; default: the rollouts' own, or 0.")] = None,
    adapter: Annotated[str | None, opt("PEFT adapter to load on the model.")] = None,
    known: Annotated[
        bool, opt("The rollouts' log-probabilities are this policy's: one forward instead of two.", "--known")
    ] = False,
    rank: Annotated[
        int | None, opt("Move along the direction cut to this rank: for weights coarser than float32.")
    ] = None,
    all_problems: Annotated[
        bool, opt("Problems with equal rewards too, for rewards that may be corrected.", "--all")
    ] = False,
    top: Annotated[int, opt("Problems shown.", "--top", "-k", min=1)] = 10,
    token_budget: Annotated[int | None, opt("Tokens of one micro-batch [default: as memory allows].")] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Exact alignments of problems with a benchmark, with standard errors and p-values, kept in the store.

    The objective is the store's. Selectors `corr`, `snr`, `lcb`, `shrunk` and `fdr` go by what is kept.
    """
    import numpy as np
    import torch

    import gradstore
    from gradstore.engine.gradients.directions import validation_gradient
    from gradstore.engine.gradients.models import load_tokenizer, vocabulary_size
    from gradstore.engine.probing.probe import Probe
    from gradstore.engine.rollouts import read_rollouts
    from gradstore.engine.sketches.spec import SketchSpec

    opened = gradstore.open(store, mode="a")
    for name in (pool, against):
        opened.commit(name)
    settings = SketchSpec.of(opened.fingerprint).objective
    if settings.kl_beta:
        raise RequestError(f"the rows of {store} have a KL term, which probes do not measure (docs/methods.md)")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    source, wanted = (
        read_rollouts(path, tokenizer=tokenizer, vocabulary=vocabulary_size(model, trust_remote_code=trust_remote_code))
        for path in (rollouts, benchmark_rollouts)
    )
    check_rollouts_of(opened, pool, source, rollouts)
    check_rollouts_of(opened, against, wanted, benchmark_rollouts)
    version = (source.step or 0) if step is None else step
    policy = load_policy(model, adapter, device, trust_remote_code=trust_remote_code)
    if rank is None and next(policy.parameters()).dtype != torch.float32:
        policy = policy.float()
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    direction = validation_gradient(policy, list(wanted.groups()), settings, token_budget=token_budget)
    prober = Probe(policy, direction, settings, rank=rank, token_budget=token_budget)
    ids = list(source.problem_ids)
    found: list[dict] = []
    with progress(f"probing {pool}", len(ids)) as advance:
        for start in range(0, len(ids), _WINDOW):
            groups = list(source.groups(ids[start : start + _WINDOW]))
            base = None
            if known:
                missing = [group.problem_id for group in groups if group.logprobs is None]
                if missing:
                    raise RequestError(f"problem {missing[0]!r} has no log-probabilities: leave --known out")
                base = [group.logprobs for group in groups if group.logprobs is not None]
            batch = prober.probe(groups, base, run_all=all_problems)
            batch.save(opened, pool, step=version, target=against, target_commit=opened.commit(against))
            found += [
                {
                    "id": batch.ids[i],
                    "dot": float(batch.dots[i]),
                    "standard_error": float(batch.standard_errors[i]),
                    "t": float(batch.t[i]),
                    "p": float(batch.p_values[i]),
                }
                for i in np.flatnonzero(batch.live)
            ]
            advance(len(groups))
    found.sort(key=lambda row: (-row["dot"], row["id"]))
    calibration = None if prober.calibration is None else prober.calibration.describe()
    if json:
        about = {"n_problems": len(ids), "n_live": len(found), "step": version, "calibration": calibration}
        print_json({**about, "best": found[:top]})
        return
    say(f"{len(ids)} problems probed along {against} at step {version}, {len(found)} with a signal")
    if calibration is not None:
        say(f"relative error against exact dots on a few problems: {calibration['relative_error']:.1e}")
    print_table(
        f"{pool} along {against}",
        ["id", "dot", "standard error", "t", "p"],
        [[row["id"], *(f"{row[name]:.3g}" for name in ("dot", "standard_error", "t", "p"))] for row in found[:top]],
        right=["dot", "standard error", "t", "p"],
    )
