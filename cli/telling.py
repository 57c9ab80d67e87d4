"""How a training run goes, for `train` and the demo."""

from collections.abc import Callable, Mapping, Sequence

from gradstore.cli.show import say


class Told:
    """Says how the run goes: beside its bar at each step, and in one line at the end of each round.

    advance: the callback of `progress`.
    """

    def __init__(self, rounds: int, steps: int, advance: Callable[..., None]) -> None:
        self._rounds, self._steps, self._advance, self._done = rounds, steps, advance, 0
        self._round, self._of_round = -1, list[Mapping[str, float]]()
        self._words = "training steps"

    def values(self, number: int, values: Mapping[str, float]) -> None:
        """One step of the round with this number, from 0."""
        if number != self._round:
            self._round, self._of_round = number, []
        self._of_round.append(values)
        self._words = f"round {number + 1} of {self._rounds}, {_as_it_goes([values])}"
        if len(self._of_round) == self._steps:
            say(f"round {number + 1} of {self._rounds}: {_as_it_goes(self._of_round)}")

    def done(self, step: int) -> None:
        """The number of steps that are done, those of an earlier start too."""
        self._advance(step - self._done, description=self._words)
        self._done = step


def _as_it_goes(steps: Sequence[Mapping[str, float]]) -> str:
    """Means over steps. No loss: at the first pass over rollouts GRPO's is 0, whatever it learns."""
    reward, signal, norm = (
        sum(one[name] for one in steps) / len(steps) for name in ("reward", "with_signal", "grad_norm")
    )
    return f"reward {reward:.3f}, {100 * signal:.0f} % of the problems with a signal, gradient norm {norm:.2g}"
