"""The selectors by name: the built-in ones, then those registered by other packages.

Users add their own through the entry-point group `gradstore.selectors`; an entry names an `engine.Selector`.
docs/selectors.md shows a complete package.
"""

from gradstore.engine.selecting.candidates import Selector
from gradstore.engine.selecting.registry import Registry
from gradstore.engine.selecting.scores_by_gradient import BY_GRADIENT
from gradstore.engine.selecting.scores_by_pass_rate import BY_PASS_RATE, acc_of
from gradstore.engine.selecting.scores_by_probe import BY_PROBE

GROUP = "gradstore.selectors"
ALIASES = {"sim": "cosine", "align": "chunk_mean", "random": "rand"}
"""GradAlign's mode names that differ from ours."""

SELECTORS: Registry[Selector] = Registry(
    Selector,
    (*BY_GRADIENT, *BY_PASS_RATE, *BY_PROBE),
    kind="selector",
    group=GROUP,
    aliases=ALIASES,
    forbidden="+:",
    spelled=acc_of,
)
"""By name or alias; `acc(LOW..HIGH)` is `acc` with another window."""
