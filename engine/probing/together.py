"""Probe groups with all ranks of a sharded model: the same groups on every rank, and the batch of one process."""

from collections.abc import Sequence
from functools import partial

from gradstore.engine.gradients.logprobs import TokenLogprobs
from gradstore.engine.gradients.ranks import each_its_share
from gradstore.engine.gradients.sharding import own_share
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError


def probe_together(prober: Probe, groups: Sequence[Group], *, known: bool = False, run_all: bool = False) -> ProbeBatch:
    """`prober.probe(groups)`; of a sharded model each rank runs its share, and all get the whole batch.

    All ranks call this together with the same groups. The step is calibrated on the groups that one process would take.
    known: the groups' own log-probabilities are this policy's, `base_logprobs` of `Probe.derivatives`; RequestError for
    a group without. run_all and errors: as in `Probe.derivatives`.
    """
    base = _recorded(groups) if known else None
    if prober.calibration is None and groups:
        pilots = own_share(prober.model, prober.pilots(groups))
        chosen = [groups[place] for place in pilots]
        prober.calibrate(chosen, None if base is None else [base[place] for place in pilots])
    run = partial(_probed, prober, known=known, run_all=run_all)
    (batch,) = each_its_share(prober.model, groups, run)
    return batch


def _probed(prober: Probe, groups: list[Group], *, known: bool, run_all: bool) -> list[ProbeBatch]:
    return [prober.probe(groups, _recorded(groups) if known else None, run_all=run_all)]


def _recorded(groups: Sequence[Group]) -> TokenLogprobs:
    found = []
    for group in groups:
        if group.logprobs is None:
            raise RequestError(f"problem {group.problem_id!r} has no log-probabilities: leave --known out")
        found.append(group.logprobs)
    return found
