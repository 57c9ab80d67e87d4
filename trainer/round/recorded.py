"""The picks of a recorded round. Imports no torch, so that a process without a model can read them."""

from dataclasses import fields

import numpy as np

from gradstore import Round
from gradstore.engine.selecting.selection import Selection


def selection_of(found: Round) -> Selection:
    """The picks of a recorded round, identical for a new round and one read back."""
    ranks = found.table["picked"].to_numpy()
    rows = np.flatnonzero(ranks >= 0)
    rows = rows[np.argsort(ranks[rows], kind="stable")]
    columns = {name: found.table[name].to_numpy()[rows] for name in ("score", "low", "high", "weight", "rollouts")}
    kept = found.about["selection"]
    known = {field.name for field in fields(Selection)}
    return Selection(
        ids=found.picks,
        scores=columns["score"],
        low=columns["low"],
        high=columns["high"],
        weights=columns["weight"],
        rollouts=columns["rollouts"],
        picked_by=list(found.about["picked_by"]),
        **{name: value for name, value in kept.items() if name in known},
    )
