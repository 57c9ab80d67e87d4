"""Settings of selection rounds, under this project's names and GradAlign's.

chunk_size -> candidates      n_samples_train -> rollouts         train_batch_size -> train_batch
k -> ratio = 1/k              n_samples_val -> target_rollouts    iters_per_select -> steps
mode -> selector              num_selections -> rounds
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from gradstore.engine.searching.targets import Aggregate
from gradstore.engine.selecting.diversity import Diversity
from gradstore.engine.selecting.mixture import parts_of
from gradstore.engine.selecting.quotas import parse_quotas
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError

GRADALIGN_NAMES = {
    "chunk_size": "candidates",
    "k": "ratio",
    "n_samples_train": "rollouts",
    "n_samples_val": "target_rollouts",
    "train_batch_size": "train_batch",
    "iters_per_select": "steps",
    "num_selections": "rounds",
    "mode": "selector",
}
"""What GradAlign's command line calls a setting, and its name here; `k` is one over the ratio."""


_SHARES = ("ratio", "confidence", "forgetting", "max_no_signal", "explore", "boundary", "accept_coverage")
Observe = Literal["last", "all", "none"]
"""Which training rollouts become rows: those of the last pass over a round's picks, of every step, or none."""


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """How each round chooses. Two runs with the same settings, policy and records pick the same problems."""

    candidates: int | None = None
    """Problems drawn from the pool for each round; None: the whole pool."""
    selected: int | None = None
    """Problems picked in a round; give this or `ratio`."""
    ratio: float | None = None
    """Share of the candidates that is picked."""
    train_batch: int = 128
    """Problems of a training step."""
    steps: int = 10
    """Training steps after each round, before the next."""
    rounds: int = 100
    """Rounds of the whole run."""
    rollouts: int = 32
    """Responses to each candidate that is rolled out."""
    target_rollouts: int = 16
    """Responses to each problem of the benchmarks."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, an alias of GradAlign's, or a mixture such as `cosine:0.7+rand:0.3`."""
    refresh: Literal["all"] | int = "all"
    """Candidates rolled out anew in a round: all of them (GradAlign), or a budget of so many problems."""
    refresh_first: Literal["all"] | int | None = None
    """Likewise in the first round that measures, when little is stored yet; None: as in the others."""
    first_look: int = 0
    """With a budget, responses to each candidate without a row, before the plan of the first round that measures."""
    warm_up: int = 0
    """Rounds at the start that pick at random and roll nothing out (LearnAlign's warm-up training)."""
    once: bool = False
    """Choose in the first round after the warm-up and keep that choice (LearnAlign's static use)."""
    confidence: float = 0.9
    """Of the intervals, and at which the top n counts as settled."""
    observe: Observe = "last"
    """Which of the training rollouts that follow become rows: `last`, each pick's newest of the round; `all`, those of
    every step; `none`."""
    forgetting: float = 0.98
    """What a rollout counts for less in the history of pass rates with each training step since."""
    max_no_signal: float = 0.9
    """With a budget, a problem this likely to have no signal is not rolled out."""
    explore: float = 0.1
    """With a budget, share of it kept for problems that were never measured."""
    boundary: float = 0.1
    """With a budget, share of it kept for more rollouts of problems whose interval straddles the cut."""
    aggregate: Aggregate = "mean"
    """How a benchmark's gradients become its target."""
    temperature: float | None = None
    """Soft sampling of the picks; None: the best ones."""
    quotas: Mapping[str, float] | None = None
    """Share of the picks by source."""
    diversity: Diversity | None = None
    """Spread of the picks."""
    by_source: bool = True
    """With a budget, expect of a problem what its source's problems show, until it is measured itself."""
    seed: int = 0
    """Everything drawn at random follows from it and the round's number."""
    spec: SketchSpec = field(default_factory=lambda: SketchSpec(basis="fitted"))
    """How gradients become sketches, for a store that is new."""
    accept_coverage: float | None = None
    """Least share of the gradient that a new store's sketches must see; None: 0.95, of chosen layers none."""
    window: int = 256
    """Problems rolled out and sketched at once: what an interruption can cost."""
    fit_problems: int = 200
    """Candidates of the first round that a fitted projection is fitted to, beside the benchmarks' problems."""

    def __post_init__(self) -> None:
        if (self.selected is None) == (self.ratio is None):
            raise RequestError(
                "give either `selected` (problems picked in a round) or `ratio` (share of the candidates)"
            )
        counts = ("candidates", "selected", "train_batch", "steps", "rounds", "rollouts", "target_rollouts", "window")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RequestError(f"{_spelled(name)} is {value!r}, expected a whole number of at least 1")
        for name in ("first_look", "warm_up", "fit_problems"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected a whole number of at least 0")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise RequestError(f"ratio is {self.ratio}, expected a share above 0 and at most 1 (k of at least 1)")
        for name in ("refresh", "refresh_first"):
            budget = getattr(self, name)
            if (
                budget != "all"
                and (type(budget) is not int or budget < 0)
                and (name, budget) != ("refresh_first", None)
            ):
                raise RequestError(f"{name} is {budget!r}, expected `all` or a number of problems of at least 0")
        if self.observe not in get_args(Observe):
            raise RequestError(f"observe is {self.observe!r}, expected one of {', '.join(get_args(Observe))}")
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
        if self.candidates is not None:
            self.n_selected(self.candidates)

    @classmethod
    def from_names(cls, values: Mapping[str, Any]) -> "RoundSettings":
        """Settings by name, GradAlign's names among them; texts are read as what the setting is.

        RequestError for a name that is not known, a setting given under two names, a value that cannot be.
        """
        known = {setting.name for setting in fields(cls)}
        found: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for given, value in values.items():
            name = GRADALIGN_NAMES.get(given, given)
            if name not in known:
                near = difflib.get_close_matches(given, [*known, *GRADALIGN_NAMES], n=1)
                raise RequestError(
                    f"round setting {given!r} is not known" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            if name in found:
                raise RequestError(f"round settings {spelled[name]!r} and {given!r} are the same; give one")
            spelled[name] = given
            value = _read(given, name, value)
            found[name] = 1 / value if given == "k" and value else value
        return cls(**found)

    def n_selected(self, n_candidates: int) -> int:
        """Problems picked from so many candidates, checked against the training that follows.

        RequestError unless the steps of a round go through the picks a whole number of times: train_batch * steps must
        be a multiple of them (GradAlign: (k * train_batch_size * iters_per_select) % chunk_size == 0).
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
        """These settings for a pool of so many problems, every count filled in and checked."""
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
        """Whether the rollouts of a step become rows, with which so many problems of the round's training are drawn.

        A last pass that begins within a step takes the whole step.
        """
        if self.observe == "last":
            return drawn > self.train_batch * self.steps - n_picks
        return self.observe == "all"

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def _read(given: str, name: str, value: Any) -> Any:
    """A text as the setting's type (`mmr`, `math=0.5,code=0.2`); other values as they are."""
    if not isinstance(value, str) or name in ("selector", "aggregate", "observe"):
        return value
    if name in ("refresh", "refresh_first") and value == "all":
        return value
    if name in (*_SHARES, "temperature"):
        kind, expected = float, "a number"
    elif name == "diversity":
        return Diversity(value)  # type: ignore[arg-type]
    elif name == "quotas":
        return parse_quotas(value.split(","))
    elif name == "spec":
        raise RequestError(f"round setting {given!r} is {value!r}, expected a SketchSpec")
    elif name in ("once", "by_source"):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise RequestError(f"round setting {given!r} is {value!r}, expected true or false")
    else:
        kind, expected = int, "a whole number"  # type: ignore[assignment]
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"round setting {given!r} is {value!r}, expected {expected}") from None


def _spelled(name: str) -> str:
    """A setting with GradAlign's name for it."""
    theirs = next((given for given, ours in GRADALIGN_NAMES.items() if ours == name), None)
    return f"{name} ({theirs})" if theirs else name
