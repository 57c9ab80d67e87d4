"""What a ranking does not say by itself: a step without rows, an old target, negative scores, too little signal.

Each notice is one sentence with what to do about it. `query`, `select` and the report show them.
"""

from collections.abc import Sequence

import numpy as np

from gradstore import State, View
from gradstore.engine.searching.targets import Target

MUCH = 0.5
"""Share of problems without signal from which it is said."""


def notices(view: View, targets: Sequence[Target], best_score: float | None = None) -> list[str]:
    """Sentences on a ranking of a view by some targets; empty if there is nothing to say.

    best_score: the largest score of all ranked problems, if it is known and the largest come first.
    """
    said = []
    newest = int(view.steps.max()) if len(view) else 0
    if view.at is not None:
        asked = {view.collection, *(goal.benchmark for goal in targets)}
        there = sorted({step for name in asked for step in view.store.steps(name)})
        if view.at not in there:
            few = ", ".join(map(str, [*there[:3], "…", *there[-3:]] if len(there) > 6 else there))
            said.append(f"nothing is of step {view.at}: these are the newest rows before it, of steps {few}")
    for goal in targets:
        age = newest - goal.steps[1]
        if age > 0:
            said.append(
                f"the target of {goal.benchmark} is {age} steps older than the rows of {view.collection}: collect "
                f"{goal.benchmark} at step {newest}"
            )
        if goal.n_live < MUCH * goal.n_problems:
            said.append(
                f"only {goal.n_live} of {goal.n_problems} problems of {goal.benchmark} have a gradient; the others' "
                "rollouts are all rewarded alike: more rollouts each would help"
            )
    silent = int(np.count_nonzero(view.states == State.NO_SIGNAL))
    if len(view) and silent >= MUCH * len(view):
        said.append(
            f"{silent} of {len(view)} problems of {view.collection} have no signal and are not ranked: their rollouts "
            "are all rewarded alike"
        )
    if best_score is not None and best_score < 0 and targets:
        names = " and ".join(goal.benchmark for goal in targets)
        said.append(f"all scores are below 0: none of these problems is expected to help {names}")
    return said
