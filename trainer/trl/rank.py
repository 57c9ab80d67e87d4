"""One process's part of the policy: it samples with TRL's trainer, and sketches and probes the trainer's own model.

Nothing is copied or merged: under DDP every process has the whole model and computes its share of the problems; under
FSDP2 they also gather the weights together, as in training. The model, its mode and the random state are left as they
were, so that training goes on as it would have without a round.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gradstore.engine.gradients.sharding import reshard, total
from gradstore.engine.probing.aimed import AimedProbe
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles, fit_sketcher, sketcher_from
from gradstore.engine.sketches.from_training_pass import sketched_and_summed
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.trl.rollouts import Sampled
from gradstore.trainer.trl.settings import TrlSettings


class Rank:
    """The policy of one process. Arguments named `shares` have one list for every process."""

    def __init__(self, trainer: Any, settings: TrlSettings) -> None:
        self._trainer, self._settings = trainer, settings
        self._sketcher: Sketcher | None = None
        self._aimed: AimedProbe | None = None
        """Probe along the gradient of the validation groups of the last `aim`, on all processes."""

    def roll_out(self, shares: Sequence[Sequence[str]], n: int, seed: int) -> list[Sampled]:
        """n rollouts of each problem of this process's share; the shares are equally long."""
        trainer, rank = self._trainer, self._trainer.accelerator.process_index
        ids = [name for name in shares[rank] for _ in range(n)]
        size = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
        found: list[Sampled] = []
        with self._live():
            for start in range(0, len(ids), size):
                _seed_everything(derived_seed(seed, rank, start))
                found += trainer.sample(ids[start : start + size])
        return found

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group]) -> SketcherFiles:
        """Make the sketcher, the same on every process."""
        with self._live() as model:
            self._sketcher, files = fit_sketcher(model, spec, groups, benchmark)
        return files

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        """Make a store's sketcher; FingerprintError if its rows would not be comparable with this model's."""
        spec = replace(SketchSpec.of(fingerprint), token_budget=self._settings.rounds.spec.token_budget)
        with self._live() as model:
            self._sketcher = sketcher_from(model, fingerprint, attachments, spec)

    def sketch(self, shares: Sequence[Sequence[Group]]) -> SketchBatch:
        with self._live():
            return self._made().sketch(self._own(shares))

    def aim(self, shares: Sequence[Sequence[Group]]) -> SketchBatch:
        """Sketch this process's groups; set the probe direction to the gradient of all processes' groups."""
        self._aimed = None  # free the old direction before making a new one
        groups = self._own(shares)
        with self._live() as model:
            batch, sums = sketched_and_summed(self._made(), groups)
            self._aimed = AimedProbe(groups, sums, int(total(model, [len(groups)])[0]))
        return batch

    def probe(self, shares: Sequence[Sequence[Group]], like: Calibration | None) -> ProbeBatch:
        """Probe this process's groups along the direction of the last `aim`."""
        if self._aimed is None:
            raise RequestError("the policy has no direction to probe along: the round calls `aim` first")
        spec = self._made().spec
        with self._live() as model:
            rank = self._settings.probe_rank_for(next(model.parameters()).dtype)
            make = partial(Probe, model, settings=spec.objective, rank=rank, token_budget=spec.token_budget)
            return self._aimed.calibrated(make, like=like).probe(self._own(shares))

    def forget_direction(self) -> None:
        """Free the probe direction, which is as large as the weights."""
        self._aimed = None

    def _own(self, shares: Sequence[Sequence[Group]]) -> list[Group]:
        return list(shares[self._trainer.accelerator.process_index])

    def _made(self) -> Sketcher:
        if self._sketcher is None:
            raise RequestError("the policy has no sketcher yet: the round calls `fit` or `use` first")
        return self._sketcher

    @contextmanager
    def _live(self) -> Iterator[nn.Module]:
        """The trainer's model with its current weights, in evaluation mode."""
        model: nn.Module = self._trainer.model
        training = [module for module in model.modules() if module.training]
        device = self._trainer.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            reshard(model)
            try:
                yield model
            finally:
                reshard(model)
                for module in training:
                    module.training = True


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)  # also seeds the GPUs
