"""Probe mode: derivatives of each rollout's log-probability along a direction, from forward passes alone.

With V the validation gradient, a problem's alignment is a covariance over its rollouts: <g_i, V> = mean_j A_ij d_ij,
where d_ij is the derivative along V of rollout j's log-probability. A finite difference gives d_ij: two more forwards
over the rollouts (one, if the log-probabilities at theta are known), no backward and no hooks. Every parameter counts,
and any model that gives log-probabilities can be probed. The d_ij are kept. So each dot has a standard error, a t
statistic and a p-value, and corrected rewards need no new run. Formulas: docs/methods.md.

The step is measured, not guessed: see `Probe.calibrate`.

Dimension letters: P problems, G rollouts of one problem, R their responses, N response tokens that the policy wrote.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from gradstore.engine.gradients.directions import Direction, dot_along
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import evaluating
from gradstore.engine.gradients.logprobs import TokenLogprobs, response_logprobs
from gradstore.engine.gradients.objectives import Objective, importance_weights, objective, rollout_weights
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import n_shards, of_all_ranks, reshard, total
from gradstore.engine.probing import statistics as probe_statistics
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration, best_step
from gradstore.engine.probing.displacement import LowRankBranch, Move, displaced
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError, check_number

log = logging.getLogger(__name__)

FIRST_STEP = 0.02
"""Initial step of calibration: root mean square change of a token's log-probability, in nats."""
LARGEST_STEP = 0.1
"""Largest step, in nats per token."""
BASE_TOLERANCE = 0.05
"""Largest difference between given log-probabilities and the model's own, in nats per token."""
_TRIES = 3
"""Step lengths tried to reach a given change in nats."""
CHECK_TOLERANCE = 0.02
"""Relative error against exact dots above which a warning is logged."""


class Probe:
    """Probes groups of rollouts along a direction with the model in its current state, and leaves it unchanged."""

    def __init__(
        self,
        model: nn.Module,
        direction: Direction,
        settings: Objective | None = None,
        *,
        eps: float | None = None,
        rank: int | None = None,
        n_check: int = 4,
        token_budget: int | None = None,
        share_prompts: bool = True,
    ) -> None:
        """settings: the objective, default the preset `gradalign`. eps: the step, default calibrated on the first
        groups. rank: move along the direction truncated to this rank, as a branch beside each layer, and keep the
        weights unchanged (see `LowRankBranch`); needed for weights coarser than float32. n_check: number of problems to
        calibrate the step on and to check against exact dots. token_budget: tokens of a micro-batch, padding included;
        None: as memory allows.

        Under FSDP2 every rank makes a Probe, and all call its methods together, each with its own groups.
        RequestError for invalid settings; on use, for a direction of another model.
        """
        if eps is not None:
            check_number("eps", eps, above=0)
        check_number("n_check", n_check, least=1)
        if settings is not None and settings.kl_beta:
            raise RequestError(
                "a probe says how rewards go with a direction, which a KL term has no part in: use an objective with "
                "kl_beta = 0, or sketches, or exact_dots"
            )
        self.model, self.direction, self.n_check = model, direction, n_check
        self.settings = settings or objective("gradalign")
        spec = GradientSpec(objective=self.settings, token_budget=token_budget, share_prompts=share_prompts)
        self._pass = GradientPass(model, spec)
        self._eps = eps
        self._branch = None if rank is None else LowRankBranch(model, direction, rank)
        self._knows_base = False
        self.calibration: Calibration | None = None
        """The calibration of the step; None before the first use."""

    def probe(
        self, groups: Sequence[Group], base_logprobs: TokenLogprobs | None = None, *, run_all: bool = False
    ) -> ProbeBatch:
        """Derivatives with their statistics, in the order of the groups. Arguments and errors as in `derivatives`."""
        derivatives = self.derivatives(groups, base_logprobs, run_all=run_all)
        return ProbeBatch.of(groups, derivatives, self.settings, self.calibration)

    def derivatives(
        self, groups: Sequence[Group], base_logprobs: TokenLogprobs | None = None, *, run_all: bool = False
    ) -> list[np.ndarray]:
        """d_ij of every rollout, float64 [G] for each group, such that <g_i, V> = mean_j A_ij d_ij exactly.

        d_ij is the derivative along V of the rollout's log-probability, weighted by the objective's aggregation: the
        mean over its tokens (`seq-mean-token-mean`), their sum (`seq-mean-token-sum`), or the sum divided by the mean
        length of the group's responses (`token-mean`). Only tokens that the policy wrote count. With importance weights
        each token is multiplied by its ratio, and is zero where PPO's surrogate is flat.

        base_logprobs: log-probabilities of all response tokens under the current model (those of the rollouts, if this
        policy sampled them at the objective's temperature); then one forward is run instead of two. run_all: also run
        groups with equal rewards, whose rewards may be corrected later; otherwise their derivatives are nan. The first
        call calibrates the step. RequestError for a group that the model cannot run, or for base log-probabilities of
        other shapes or of another policy.
        """
        self._check(groups, base_logprobs)
        calibration = self.calibration
        if calibration is None or (base_logprobs is not None and not self._knows_base):
            calibration = self.calibrate(groups, base_logprobs)
        run = np.array([run_all or group.has_signal for group in groups], dtype=bool)
        chosen = [group for group, runs in zip(groups, run, strict=True) if runs]
        with self._moving() as move:
            if base_logprobs is None:
                eps = calibration.central
                move(eps)
                above = self._logprobs(chosen)
                move(-eps)
                below = self._logprobs(chosen)
                middle: TokenLogprobs = [
                    [(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(above, below, strict=True)
                ]
                step = 2 * eps
            else:
                step = calibration.one_sided
                move(step)
                above = self._logprobs(chosen)
                below = _written(chosen, [base for base, runs in zip(base_logprobs, run, strict=True) if runs])
                middle = below
        found = iter(self._weigh(chosen, above, below, middle))
        return [
            next(found) / step if runs else np.full(group.n_rollouts, np.nan)
            for group, runs in zip(groups, run, strict=True)
        ]

    def logprobs(self, groups: Sequence[Group]) -> list[list[np.ndarray]]:
        """Log-probability of every response token under the current model; for use as `base_logprobs`."""
        self._check(groups, None)
        with evaluating(self.model):
            found = response_logprobs(self._pass, groups)
            reshard(self.model)
        return found

    def calibrate(
        self, groups: Sequence[Group], base_logprobs: TokenLogprobs | None = None, like: Calibration | None = None
    ) -> Calibration:
        """Choose the steps on a few evenly spaced groups with signal, and check the probe against exact dots there.

        Starting from a step that moves a token's log-probability by FIRST_STEP nats, measure the truncation error of
        a derivative there (Richardson: the central difference at twice the step is off by four times as much) and the
        rounding noise (the second difference at a tiny step, where nothing else is left). A difference of order p
        with truncation e_t and rounding e_r at step h is best at h (e_r / (p e_t))^(1 / (p + 1)); no step exceeds
        LARGEST_STEP nats. If the best step is far smaller, the errors are measured again near it. The result is kept as
        `calibration`; a relative error above CHECK_TOLERANCE is logged.

        like: the calibration of an earlier policy or direction. Its steps, scaled to change a token by as many nats,
        are then only checked on the first group; above CHECK_TOLERANCE they are chosen anew.
        """
        self._check(groups, base_logprobs)
        any_live = total(self.model, [sum(group.has_signal for group in groups)])[0] > 0
        pilot = self._spaced(groups, any_live)
        chosen = [groups[i] for i in pilot]
        given = None if base_logprobs is None else _written(chosen, [base_logprobs[i] for i in pilot])
        if like is not None and self._eps is None:
            calibration = self._carried(like, chosen[:1], None if given is None else given[:1])
            if calibration is not None:
                self.calibration, self._knows_base = calibration, given is not None
                return calibration
        with self._moving() as move:
            base = self._logprobs(chosen)
            at = self._at(move, chosen, base)
            first, nats = self._first_step(move, chosen, base)
            offset = 0.0
            if given is not None:
                offset = self._base_noise(chosen, given, base)
                self._knows_base = True
            tiny = first / (2e6 if self._fine else 200)
            noise = self._rms(at(tiny) + at(-tiny)) / np.sqrt(6)
            for _ in range(3):
                up, down, up_2, down_2 = at(first), at(-first), at(2 * first), at(-2 * first)
                slope = self._rms((up - down) / (2 * first)) or 1.0
                truncation = self._rms((up_2 - down_2) / (4 * first) - (up - down) / (2 * first)) / 3
                curvature = self._rms(up + down) / (2 * first)
                most = LARGEST_STEP / nats
                scale, error = best_step(truncation, noise / (np.sqrt(2) * first), 2, most)
                scale_1, error_1 = best_step(curvature, np.sqrt(2 * noise**2 + offset**2) / first, 1, most)
                if scale > 1 / 10:
                    break
                first, nats = first * 4 * scale, nats * 4 * scale
                scale, scale_1 = 1 / 4, scale_1 / (4 * scale)
            if self._eps is not None:
                scale = scale_1 = self._eps / first
            eps = first * scale
            sums = (at(eps) - at(-eps)) / (2 * eps)
        exact, found = self._compare(chosen, sums)
        self.calibration = Calibration(
            eps,
            first * scale_1,
            nats * scale,
            nats * scale_1,
            error / slope,
            error_1 / slope,
            noise,
            exact,
            found,
            self._branch.truncation if self._branch else 0.0,
            self.direction.norm,
        )
        if self.calibration.relative_error > CHECK_TOLERANCE:
            log.warning(
                "probe scores of %d problems are %.1f %% off their exact values (step %.2e)",
                len(exact),
                100 * self.calibration.relative_error,
                eps,
            )
        return self.calibration

    def pilots(self, groups: Sequence[Group]) -> list[int]:
        """Positions of the groups that the step is calibrated on: evenly spaced ones with a signal, if any has one."""
        return self._spaced(groups, any(group.has_signal for group in groups))

    def _spaced(self, groups: Sequence[Group], only_live: bool) -> list[int]:
        # without a signal every dot is zero, but derivatives can still be measured
        usable = [i for i, group in enumerate(groups) if group.has_signal or not only_live]
        places = np.linspace(0, len(usable) - 1, min(self.n_check, len(usable)))
        return [usable[i] for i in np.unique(places.astype(int))]

    @property
    def _fine(self) -> bool:
        """Whether the model runs in float64, where rounding is left alone only at much smaller steps."""
        return next(self.model.parameters()).dtype == torch.float64

    def _carried(self, like: Calibration, groups: Sequence[Group], given: TokenLogprobs | None) -> Calibration | None:
        """An earlier calibration, scaled to this direction and checked; None if its error is too large here."""
        like = replace(like.along(self.direction.norm), truncation=self._branch.truncation if self._branch else 0.0)
        first, expected = (like.central, like.nats_central) if given is None else (like.one_sided, like.nats_one_sided)
        eps, nats = first, 0.0
        with self._moving() as move:
            base = self._logprobs(groups) if given is None else given
            for _ in range(_TRIES):
                move(eps)
                above = self._logprobs(groups)
                nats = self._moved(above, base)
                if expected / 2 < nats < expected * 2 or not 0 < nats < np.inf:
                    break
                eps *= expected / nats
            if not expected / 2 < nats < expected * 2:
                return None
            below, distance = base, eps
            if given is None:
                move(-eps)
                below, distance = self._logprobs(groups), 2 * eps
            changes = self._weigh(groups, above, below, base)
        exact, found = self._compare(groups, np.concatenate([np.zeros(0), *changes]) / distance)
        checked = replace(like.along(like.norm, eps / first * expected / nats), exact=exact, found=found)
        return checked if checked.relative_error <= CHECK_TOLERANCE else None

    def _first_step(self, move: Move, groups: Sequence[Group], base: TokenLogprobs) -> tuple[float, float]:
        """A step that moves tokens by about FIRST_STEP nats, and the measured nats."""
        eps, low, high = 1e-3 / self.direction.norm, 0.0, np.inf
        nats = 0.0
        for _ in range(16):
            move(eps)
            nats = self._moved(self._logprobs(groups), base)
            if FIRST_STEP / 1.5 < nats < FIRST_STEP * 1.5:
                break
            low, high = (eps, high) if nats < FIRST_STEP else (low, eps)
            if low and high < np.inf:
                eps = float(np.sqrt(low * high))
            else:
                eps *= (
                    min(max(FIRST_STEP / nats, 1e-3), 1e3) if nats > 0 and np.isfinite(nats) else 1e-3 if nats else 1e3
                )
        return eps, nats if np.isfinite(nats) and nats > 0 else FIRST_STEP

    def _moved(self, above: TokenLogprobs, base: TokenLogprobs) -> float:
        """Root mean square change of a token's log-probability over all ranks; FIRST_STEP if there are no tokens."""
        groups = zip(above, base, strict=True)
        pairs = [(np.asarray(a, np.float64), b) for own in groups for a, b in zip(*own, strict=True)]
        # A token that is not finite at the base belongs to a problem that will fail; elsewhere, the step is too large.
        moves_N = np.concatenate([np.zeros(0), *((a - b)[np.isfinite(b)] for a, b in pairs)])
        squares, n = total(self.model, [float(moves_N @ moves_N), float(len(moves_N))])
        return float(np.sqrt(squares / n)) if n else FIRST_STEP

    def _at(self, move: Move, groups: Sequence[Group], base: TokenLogprobs) -> Callable[[float], np.ndarray]:
        """Function eps -> change from theta of every rollout's weighted log-probability, concatenated, float64."""

        def at(eps: float) -> np.ndarray:
            move(eps)
            changes = self._weigh(groups, self._logprobs(groups), base, base)
            return np.concatenate(changes) if changes else np.zeros(0)

        return at

    def _compare(self, groups: Sequence[Group], derivatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """<g_i, V> of at most n_check groups of all ranks, by autograd and from their derivatives. One group is run at
        a time, while the other ranks idle."""
        ends = np.cumsum([group.n_rollouts for group in groups])[:-1]
        found_P = [
            probe_statistics.dot_and_error(group.rewards, d_G, group.n_written_of_rollouts, self.settings)[0]
            for group, d_G in zip(groups, np.split(derivatives, ends), strict=bool(len(groups)))
        ]
        own = torch.distributed.get_rank() if n_shards(self.model) > 1 else 0
        counts = of_all_ranks(self.model, len(groups))
        turns = sorted((place, rank) for rank, n in enumerate(counts) for place in range(n))[: self.n_check]
        exact = [
            dot_along(self._pass, groups[place : place + 1] if rank == own else [], self.direction)
            for place, rank in turns
        ]
        shared = total(self.model, [found_P[place] if rank == own else 0.0 for place, rank in turns])
        return np.array(exact), np.array(shared)

    def _base_noise(self, groups: Sequence[Group], given: TokenLogprobs, own: TokenLogprobs) -> float:
        """Difference of the rollouts' given log-probabilities from the model's own, weighted as in the objective."""
        differences = [np.asarray(a) - b for pair in zip(given, own, strict=True) for a, b in zip(*pair, strict=True)]
        squares, n = total(
            self.model, [float(sum((d**2).sum() for d in differences)), float(sum(map(len, differences)))]
        )
        if n and not np.sqrt(squares / n) < BASE_TOLERANCE:
            raise RequestError(
                f"the base log-probabilities differ from the model's by {np.sqrt(squares / n):.2g} nats a token: they "
                "are of another policy, temperature or precision; leave them out for central differences"
            )
        changes = self._weigh(groups, given, own, own)
        return self._rms(np.concatenate(changes) if changes else np.zeros(0))

    def _rms(self, values: np.ndarray) -> float:
        """Root mean square over the finite values of all ranks."""
        values = values[np.isfinite(values)]
        squares, n = total(self.model, [float(values @ values), float(len(values))])
        return float(np.sqrt(squares / n)) if n else 0.0

    def _check(self, groups: Sequence[Group], base_logprobs: TokenLogprobs | None) -> None:
        for group in groups:
            self._pass.check(group)
        if base_logprobs is None:
            return
        if len(base_logprobs) != len(groups):
            raise RequestError(f"base log-probabilities of {len(base_logprobs)} groups for {len(groups)}")
        for group, base in zip(groups, base_logprobs, strict=True):
            lengths, given = [len(response) for response in group.responses], [len(tokens) for tokens in base]
            if lengths != given:
                raise RequestError(
                    f"problem {group.problem_id!r}: base log-probabilities of {given} tokens, "
                    f"the responses have {lengths}"
                )

    @contextmanager
    def _moving(self) -> Iterator[Move]:
        """Yield the move along the direction, in evaluation mode."""
        way: AbstractContextManager[Move] = (
            displaced(self.model, self.direction) if self._branch is None else self._branch.attached()
        )
        with evaluating(self.model), torch.no_grad(), way as move:
            yield move

    def _logprobs(self, groups: Sequence[Group]) -> TokenLogprobs:
        """Log-probabilities, where the model has been moved to, of the tokens that the policy wrote."""
        return _written(groups, response_logprobs(self._pass, groups))

    def _weigh(
        self, groups: Sequence[Group], above: TokenLogprobs, below: TokenLogprobs, middle: TokenLogprobs
    ) -> list[np.ndarray]:
        """Differences of log-probabilities of the policy's tokens, summed with the objective's weights."""
        found = []
        for group, high, low, mid in zip(groups, above, below, middle, strict=True):
            lengths_R = group.n_written
            factors_R = _token_factors(lengths_R, self.settings)
            signs_R = rollout_weights(group.rewards, lengths_R, self.settings, group.rollout_of)
            d_R = np.zeros(len(lengths_R))
            for j in np.flatnonzero(lengths_R).tolist():
                difference_N = np.asarray(high[j], np.float64) - low[j]
                if self.settings.importance and group.logprobs is not None:
                    difference_N *= _ratios(mid[j], group.written(j, group.logprobs[j]), signs_R[j], self.settings)
                d_R[j] = factors_R[j] * difference_N.sum()
            found.append(_of_rollouts(group, d_R))
        return found


def _written(groups: Sequence[Group], logprobs: TokenLogprobs) -> TokenLogprobs:
    """Of log-probabilities of every response token, those of the tokens that the policy wrote."""
    return [
        [group.written(j, np.asarray(tokens)) for j, tokens in enumerate(own)]
        for group, own in zip(groups, logprobs, strict=True)
    ]


def _of_rollouts(group: Group, d_R: np.ndarray) -> np.ndarray:
    """From the responses' derivatives, those of rollouts: mean_j A_j d_j over rollouts equals the responses' mean."""
    if group.rollout_of is None:
        return d_R
    return np.bincount(group.rollout_of, d_R, group.n_rollouts) * (group.n_rollouts / len(d_R))


def _token_factors(lengths_R: np.ndarray, settings: Objective) -> np.ndarray:
    """R times the aggregation's weight per token: the objective's token weight is A times this, divided by R."""
    if settings.aggregation == "seq-mean-token-sum":
        return np.ones(len(lengths_R))
    if settings.aggregation == "seq-mean-token-mean":
        return 1 / np.maximum(lengths_R, 1)
    return np.full(len(lengths_R), len(lengths_R) / max(int(lengths_R.sum()), 1))


def _ratios(logprobs_N: np.ndarray, behaviour_N: np.ndarray, sign: float, settings: Objective) -> np.ndarray:
    """Importance ratios as the objective's rule bounds them, for an advantage of this sign; zero where it is flat."""
    signs_1N = torch.full((1, len(logprobs_N)), float(np.sign(sign)) or 1.0, dtype=torch.float64)
    ratios_1N = importance_weights(
        torch.from_numpy(np.asarray(logprobs_N, np.float64))[None],
        torch.from_numpy(np.asarray(behaviour_N, np.float64))[None],
        signs_1N,
        torch.ones_like(signs_1N, dtype=torch.bool),
        settings,
    )
    return (ratios_1N * signs_1N)[0].numpy()
