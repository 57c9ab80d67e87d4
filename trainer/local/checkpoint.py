"""Checkpoint in one file, for an exact resume: trained weights, optimizer state, position in the rounds.

Saving replaces the whole file durably, so a kill at any moment leaves either the old or the new file. There is no
random state: every draw is seeded by the run's seed and the number of the step or round.
"""

import json
from pathlib import Path
from typing import Any

import torch

from gradstore.durable import reading, replacing_file
from gradstore.errors import GradstoreError, RequestError, first_line
from gradstore.trainer.local.grpo import Learner

FORMAT = 1


def save_checkpoint(path: Path, learner: Learner, progress: dict[str, Any]) -> None:
    """Save the trained weights, the optimizer state and `progress` (JSON-able)."""
    weights = {name: weight.detach() for name, weight in learner.parameters.items()}
    state = {"format": FORMAT, "weights": weights, "learner": learner.state_dict(), "progress": json.dumps(progress)}
    with replacing_file(path) as file:
        try:
            torch.save(state, file)  # writes one tensor at a time: the file is three times the size of the weights
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch wraps the error of a full disk in its own
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Load a checkpoint's weights and optimizer state into the learner; returns the saved progress.

    RequestError for a file that is not a checkpoint, or a checkpoint of other parameters.
    """
    try:
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except GradstoreError:
        raise
    except Exception as error:  # noqa: BLE001 (a broken pickle can raise anything)
        raise RequestError(f"{path}: not a checkpoint that can be read: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("weights"), dict):
        raise RequestError(f"{path}: not a checkpoint of format {FORMAT}")
    found = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
    wanted = {name: tuple(weight.shape) for name, weight in learner.parameters.items()}
    if found != wanted:
        name = next(iter(sorted(found.items() ^ wanted.items())))[0]
        raise RequestError(
            f"{path}: it trains other parameters than this run ({name}): use the same model and LoRA rank"
        )
    with torch.no_grad():
        for name, weight in learner.parameters.items():
            weight.copy_(state["weights"][name])
    learner.load_state_dict(state["learner"])
    return json.loads(state["progress"])
