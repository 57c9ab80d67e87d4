"""Rollout files of any supported format, checked row by row and read group by group."""

from gradstore.engine.rollouts.formats import FORMATS
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.row import text_id
from gradstore.engine.rollouts.solutions import solution_groups, solutions_of
from gradstore.engine.rollouts.source import RolloutSource, read_rollouts
from gradstore.engine.rollouts.write import RolloutWriter, write_rollouts

__all__ = [
    "FORMATS",
    "Group",
    "Rollout",
    "RolloutSource",
    "RolloutWriter",
    "read_rollouts",
    "solution_groups",
    "solutions_of",
    "text_id",
    "write_rollouts",
]
