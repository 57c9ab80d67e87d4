"""Strategies for spending a refresh budget, compared in a simulation of drifting scores without a model or a store.

    python -m benchmarks.refresh

The true scores of P problems drift (Ornstein-Uhlenbeck). Each round measures some problems, combines all measurements
so far by the staleness model, and picks n. Shown: the true mean score of the picks as a share of that of the best n,
mean over seeds and over the rounds after the third. `everything, newest` is GradAlign: measure all, remember nothing.
"""

from collections.abc import Callable

import numpy as np

from gradstore.engine.forecasting.cosine_model import Beliefs, Staleness
from gradstore.engine.forecasting.refresh_choice import Outlook, choose, quantile

P, N_PICKED, AGE, N_ROLLOUTS, ROUNDS, SEEDS = 1000, 100, 10, 16, 15, 8
Choice = Callable[[Outlook, int, np.random.Generator], np.ndarray]


def by_upper_bound(outlook: Outlook, budget: int, random: np.random.Generator) -> np.ndarray:
    """Choose the problems with the largest upper confidence bounds; ties at random."""
    order = random.permutation(P)
    upper_P = outlook.mean + quantile(0.9) * outlook.sd
    return order[np.argsort(-upper_P[order], kind="stable")][:budget]


CHOICES: dict[str, Choice] = {
    "at random": lambda outlook, budget, random: random.permutation(P)[:budget],
    "upper bound": by_upper_bound,
    "worth": lambda outlook, budget, random: choose(outlook, N_PICKED, budget, 0.1, 0.9, random),
}


def share_of_best(choice: Choice | None, budget: int, reliability: float, life: float, seed: int) -> float:
    """Mean share for one run. choice: None measures everything and remembers nothing."""
    random = np.random.default_rng(seed)
    model = Staleness(0.0, 1.0, (1 - reliability) / reliability * N_ROLLOUTS, life)
    error, kept = np.sqrt(model.noise / N_ROLLOUTS), np.exp(-AGE / life)
    truth_P, beliefs, shares = random.normal(size=P), Beliefs(model, P), []
    measured_P = np.zeros(P, bool)
    for number in range(ROUNDS):
        if choice is None:
            beliefs, places = Beliefs(model, P), np.arange(P)
        else:
            mean_P, sd_P = beliefs.at(number * AGE)
            outlook = Outlook(mean_P, sd_P, np.full(P, error), np.ones(P), measured_P, measured_P)
            places = choice(outlook, budget, random)
        measured_P[places] = True
        scores = truth_P[places] + random.normal(0, error, len(places))
        beliefs.measure(places, number * AGE, scores, np.full(len(places), N_ROLLOUTS))
        mean_P, _ = beliefs.at(number * AGE)
        picked = np.argsort(-(mean_P + 1e-9 * random.random(P)))[:N_PICKED]
        shares.append(truth_P[picked].mean() / np.sort(truth_P)[-N_PICKED:].mean())
        truth_P = kept * truth_P + np.sqrt(1 - kept**2) * random.normal(size=P)
    return float(np.mean(shares[3:]))


def main() -> None:
    print(f"| budget | reliability | life, steps | everything, newest | {' | '.join(CHOICES)} |")
    print("|---|---|---|---|" + "---|" * len(CHOICES))
    for budget in (P // 10, P // 5):
        for reliability, life in ((0.5, 20.0), (0.5, 50.0), (0.7, 100.0), (0.6, 300.0)):
            choices: list[Choice | None] = [None, *CHOICES.values()]
            found = [
                np.mean([share_of_best(choice, budget, reliability, life, seed) for seed in range(SEEDS)])
                for choice in choices
            ]
            cells = " | ".join(f"{share:.2f}" for share in found)
            print(f"| {budget} of {P} | {reliability} | {life:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
