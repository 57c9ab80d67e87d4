"""Targets of a round, and the forecast of its candidates toward them."""

from dataclasses import dataclass

from gradstore import Store
from gradstore.engine.forecasting.forecast import (
    CandidateForecast,
    ForecastSettings,
    ForecastTarget,
    forecast_candidates,
)
from gradstore.engine.searching.targets import Target, target
from gradstore.trainer.round.run import Scope


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """Targets of a round: one for each benchmark with a signal."""

    targets: list[Target]
    silent: list[str]
    """Benchmarks that are left out: none of their problems has a signal."""
    toward: ForecastTarget | None
    """The targets together, with a budget; None without a budget or a target."""

    @classmethod
    def at(cls, store: Store, scope: Scope) -> "Aim":
        """The targets at the round's step, from the stored rows of its benchmarks."""
        live = [name for name in scope.benchmarks if store.view(name, scope.step).live.any()]
        targets = [target(store, name, scope.step, scope.settings.aggregate) for name in live]
        toward = None
        if targets and scope.budget is not None:
            vectors = [own.vector for own in targets]
            toward = ForecastTarget.of(store, scope.run.pool, scope.benchmarks, vectors, scope.step)
        return cls(targets, [name for name in scope.benchmarks if name not in live], toward)

    def forecast(self, store: Store, scope: Scope) -> CandidateForecast:
        """Forecast the round's candidates from the rows that the store has now."""
        settings = scope.settings
        wanted = ForecastSettings(settings.rollouts, settings.forgetting, settings.by_source)
        return forecast_candidates(store, scope.run.pool, scope.candidates, scope.step, wanted, self.toward)
