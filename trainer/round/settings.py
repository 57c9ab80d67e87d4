"""Settings of selection rounds; GradAlign's names are accepted too.

chunk_size -> candidates      n_samples_train -> rollouts         train_batch_size -> train_batch
k -> ratio = 1/k              n_samples_val -> target_rollouts    iters_per_select -> steps
mode -> selector              num_selections -> rounds
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from gradstore.engine.searching.targets import Aggregate
from gradstore.engine.selecting.diversity import Diversity
from gradstore.engine.selecting.mixture import parts_of
from gradstore.engine.selecting.rollout_rules import ROLLOUT_RULES
from gradstore.engine.selecting.scores_by_pass_rate import acc
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError, check_known, check_number
from gradstore.settings import Aliases, check, read, spelled
from gradstore.trainer.round.drawing import Draw

GRADALIGN_NAMES = {
    "chunk_size": "candidates",
    "k": "1/ratio",
    "n_samples_train": "rollouts",
    "n_samples_val": "target_rollouts",
    "train_batch_size": "train_batch",
    "iters_per_select": "steps",
    "num_selections": "rounds",
    "mode": "selector",
}
"""GradAlign's command-line name -> name here; `k` is 1 / ratio."""

Observe = Literal["last", "all", "none"]
"""Training rollouts that become rows: those of the last pass over a round's picks, of every step, or none."""


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Settings of the selection rounds. Runs with the same settings, policy and records pick the same problems."""

    ALIASES: ClassVar[Aliases] = GRADALIGN_NAMES
    candidates: int | None = None
    """Problems drawn from the pool for each round; None: the whole pool."""
    draw: Draw = "chunks"
    """How they are drawn: `chunks`, the shuffled pool chunk by chunk (as in GradAlign), or `independent`, each round
    anew."""
    selected: int | None = None
    """Problems picked per round; give this or `ratio`."""
    ratio: float | None = None
    """Share of the candidates that is picked; give this or `selected`."""
    train_batch: int = 128
    """Problems per training step."""
    steps: int = 10
    """Training steps between a round and the next."""
    rounds: int = 100
    """Rounds of the whole run."""
    rollouts: int = 32
    """Rollouts per candidate that is rolled out."""
    target_rollouts: int = 16
    """Rollouts per benchmark problem."""
    target_every: int = 1
    """Rounds between two measurements of the benchmarks; rounds between them aim at the newest rows there are."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, an alias of GradAlign's, or a mixture such as `cosine:0.7+rand:0.3`."""
    acc_low: float | None = None
    """Lowest pass rate that the selector `acc` draws from; None: 0.2 (as in GradAlign). Kept in the selector's name."""
    acc_high: float | None = None
    """Highest pass rate that the selector `acc` draws from; None: 0.8."""
    refresh: Literal["all"] | int = "all"
    """Candidates rolled out again in each round: `all` (as in GradAlign), or a budget, the number of problems."""
    refresh_first: Literal["all"] | int | None = None
    """`refresh` for the first round that measures, when the store holds little; None: same as `refresh`."""
    first_look: int = 0
    """With a budget: rollouts per candidate without a row, before the first measuring round is planned; 0: none."""
    warm_up: int = 0
    """Number of first rounds that pick at random without rollouts (LearnAlign's warm-up training)."""
    once: bool = False
    """Select only once, in the first round after the warm-up, and reuse its picks (LearnAlign's static use)."""
    confidence: float = 0.9
    """Confidence level of the score intervals, and the level at which the top n counts as settled."""
    observe: Observe = "last"
    """Training rollouts that become rows: `last`, each pick's newest of the round; `all`, those of every step; or
    `none`."""
    forgetting: float = 0.98
    """Discount per training step of a rollout's weight in the pass-rate history; 1: no discount."""
    max_no_signal: float = 0.9
    """With a budget: problems with a higher probability of no signal are not rolled out."""
    explore: float = 0.1
    """Share of the budget reserved for problems that were never measured."""
    boundary: float = 0.1
    """Share of the budget reserved for more rollouts of problems whose interval straddles the cut."""
    aggregate: Aggregate = "mean"
    """How a benchmark's gradients are aggregated into its target."""
    temperature: float | None = None
    """Temperature for sampling the picks by score; None: take the best."""
    quotas: Mapping[str, float] | None = None
    """Share of the picks by source."""
    diversity: Diversity | None = None
    """Diversity rule for the picks; None: no rule."""
    by_source: bool = True
    """With a budget: predict an unmeasured problem from the other problems of its source."""
    seed: int = 0
    """Seed of the run; every random draw depends only on it and the round's number."""
    spec: SketchSpec = field(default_factory=lambda: SketchSpec(basis="fitted"))
    """How gradients become sketches; used when the store is created."""
    accept_coverage: float | None = None
    """Minimum share of the gradient that a new store's sketches must see. None: 0.95, or no minimum for chosen
    layers."""
    window: int = 256
    """Problems rolled out and sketched at once; an interruption loses at most this much work."""
    fit_problems: int = 200
    """Number of first-round candidates used to fit the projection, in addition to the benchmarks' problems."""
    rollout_rule: str | None = None
    """Rule that weighs or drops single rollouts of the training steps (engine.ROLLOUT_RULES); None: all count."""
    rollout_threshold: float = 0.0
    """How far a rollout may oppose the rule's direction before the rule acts, in root mean squares of the step's
    dots."""

    def __post_init__(self) -> None:
        if (self.selected is None) == (self.ratio is None):
            raise RequestError(
                "give either `selected` (problems picked in a round) or `ratio` (share of the candidates)"
            )
        check(self)
        if (self.acc_low, self.acc_high) != (None, None):
            self._name_window()
        least = dict.fromkeys(("first_look", "warm_up", "fit_problems", "refresh", "refresh_first"), 0)
        ones = ("candidates", "selected", "train_batch", "steps", "rounds", "rollouts", "target_rollouts", "window")
        ones += ("target_every",)
        for name, lowest in {**least, **dict.fromkeys(ones, 1)}.items():
            value = getattr(self, name)
            if value not in (None, "all") and value < lowest:
                other = "`all` or " if name.startswith("refresh") else ""
                raise RequestError(
                    f"{spelled(type(self), name)} is {value!r}, expected {other}a whole number of at least {lowest}"
                )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise RequestError(f"ratio is {self.ratio}, expected a share above 0 and at most 1 (k of at least 1)")
        for source, share in (self.quotas or {}).items():
            if not 0 <= share <= 1:
                raise RequestError(f"quotas.{source} is {share}, expected a share from 0 to 1")
        for name in ("confidence", "max_no_signal"):
            if not 0 < getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")
        if self.accept_coverage is not None and not 0 <= self.accept_coverage <= 1:
            raise RequestError(f"accept_coverage is {self.accept_coverage}, expected a share from 0 to 1")
        if not 0 < self.forgetting <= 1:
            raise RequestError(f"forgetting is {self.forgetting}, expected a number above 0 and at most 1")
        if self.explore < 0 or self.boundary < 0 or self.explore + self.boundary > 1:
            raise RequestError(
                f"explore is {self.explore} and boundary {self.boundary}, expected shares, together at most 1"
            )
        if self.spec.objective.kl_beta and any(part.selector.needs_probes for part in parts_of(self.selector)):
            raise RequestError(f"selector {self.selector!r} goes by probes, which have no KL term: leave kl_beta out")
        if self.target_every > 1 and any(part.selector.needs_probes for part in parts_of(self.selector)):
            raise RequestError(
                f"target_every is {self.target_every}, but selector {self.selector!r} goes by probes, which need the "
                "benchmarks' gradient under the policy of each round"
            )
        check_number("rollout_threshold", self.rollout_threshold, least=0)
        if self.rollout_rule is None and self.rollout_threshold:
            raise RequestError(f"rollout_threshold is {self.rollout_threshold}, but there is no rollout_rule")
        if self.rollout_rule is not None:
            check_known("rollout_rule", self.rollout_rule, ROLLOUT_RULES)
        if self.candidates is not None:
            self.n_selected(self.candidates)

    def _name_window(self) -> None:
        """Write the window of `acc` into the selector's name, the one place that has it from then on."""
        if self.selector != "acc":
            raise RequestError(f"acc_low and acc_high are for selector acc, not for {self.selector!r}")
        low, high = 0.2 if self.acc_low is None else self.acc_low, 0.8 if self.acc_high is None else self.acc_high
        object.__setattr__(self, "selector", acc(low, high).name)
        object.__setattr__(self, "acc_low", None)
        object.__setattr__(self, "acc_high", None)

    @classmethod
    def from_names(cls, values: Mapping[str, Any]) -> "RoundSettings":
        """Settings from names (ours or GradAlign's) and values, as `gradstore.settings.read` takes them."""
        return read(cls, values, "round settings: ")

    def n_selected(self, n_candidates: int) -> int:
        """Number of problems picked from `n_candidates` candidates, checked against the training that follows.

        RequestError unless the steps of a round make a whole number of passes over the picks: train_batch * steps must
        be a multiple of their number (GradAlign: (k * train_batch_size * iters_per_select) % chunk_size == 0).
        """
        if self.selected is not None:
            n = self.selected
        else:
            assert self.ratio is not None
            n = round(n_candidates * self.ratio)
            if not math.isclose(n, n_candidates * self.ratio, rel_tol=1e-9):
                raise RequestError(
                    f"{n_candidates} candidates (chunk_size) times ratio {self.ratio:g} (1/k) is "
                    f"{n_candidates * self.ratio:g} problems, expected a whole number: change one, or give `selected`"
                )
        if not 1 <= n <= n_candidates:
            raise RequestError(f"{n} problems selected of {n_candidates} candidates, expected 1 to {n_candidates}")
        batch, steps = self.train_batch, self.steps
        if batch * steps % n:
            raise RequestError(
                f"train_batch {batch} (train_batch_size) x steps {steps} (iters_per_select) is {batch * steps}, "
                f"not a multiple of the {n} selected: change one so that all picks are trained on equally often"
            )
        return n

    def for_pool(self, n_pool: int) -> "RoundSettings":
        """The settings for a pool of `n_pool` problems, with every count filled in; RequestError if they do not fit."""
        candidates = n_pool if self.candidates is None else self.candidates
        if candidates > n_pool:
            raise RequestError(f"candidates (chunk_size) is {candidates}, the pool has {n_pool} problems")
        for name in ("refresh", "refresh_first"):
            budget = getattr(self, name)
            if isinstance(budget, int) and budget > candidates:
                raise RequestError(f"{name} is {budget} problems, a round has {candidates} candidates: use `all`")
        return replace(self, candidates=candidates, selected=self.n_selected(candidates), ratio=None)

    def budget(self, number: int) -> int | None:
        """Problems that round `number` may roll out; None: all candidates."""
        first = number == self.warm_up and self.refresh_first is not None
        refresh = self.refresh_first if first else self.refresh
        return refresh if isinstance(refresh, int) else None

    def observes(self, drawn: int, n_picks: int) -> bool:
        """Whether the rollouts of a step become rows.

        drawn: problems drawn in the round's training, this step included. n_picks: picks of the round. If the last pass
        over the picks begins within a step, the whole step counts.
        """
        if self.observe == "last":
            return drawn > self.train_batch * self.steps - n_picks
        return self.observe == "all"

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-able values; without a rollout rule its settings are omitted, and `target_every` at its
        default, as in older stores."""
        unused = () if self.rollout_rule else ("rollout_rule", "rollout_threshold")
        unused += ("target_every",) if self.target_every == 1 else ()
        return {name: value for name, value in asdict(self).items() if name not in unused}
