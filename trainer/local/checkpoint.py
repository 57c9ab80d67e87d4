"""One file from which a run goes on exactly where it was: trained weights, optimizer, and where in the rounds it is.

The file is replaced whole and durably, so a kill at any moment leaves the old one or the new. There is no random state:
every draw of a run is seeded by the run's seed and the number of the step or round.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from gradstore.durable import reading, replacing_file
from gradstore.errors import RequestError
from gradstore.trainer.local.grpo import Learner

FORMAT = 1


def save_checkpoint(path: Path, learner: Learner, progress: dict[str, Any]) -> None:
    """Weights that train, optimizer state, and `progress` (JSON-able)."""
    weights = {name: weight.detach() for name, weight in learner.parameters.items()}
    state = {"format": FORMAT, "weights": weights, "learner": learner.state_dict(), "progress": json.dumps(progress)}
    with replacing_file(path) as file:
        try:
            torch.save(state, file)  # a tensor at a time: the file is three times the weights
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch reports as its own error
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state into the learner; the progress it was saved with.

    RequestError for a file that is no checkpoint, or one of other parameters.
    """
    try:
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RequestError(f"{path}: not a checkpoint that can be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
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
