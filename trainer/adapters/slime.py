"""A feed as slime's data source, and a rollout function that tells it what became of its samples.

    --data-source-path gradstore.trainer.adapters.slime.FeedDataSource
    --rollout-function-path gradstore.trainer.adapters.slime.generate_rollout
    --custom-config-path gradstore.yaml      # gradstore: {store: run/store, selected: 256, draws: 2560}

The settings are those of `StoreFeedSettings`. A problem's id is `id` of its metadata (`--metadata-key`). slime's own
data set reads the prompts; sketches are made beside the run, by `gradstore collect` from the files in `rollouts`.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.durable import write_text_file
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError, needing
from gradstore.settings import read
from gradstore.trainer.feed import Feed, StoreFeed, StoreFeedSettings

with needing("the adapter to slime", "slime"):
    from slime.rollout.data_source import RolloutDataSourceWithBuffer
    from slime.rollout.sglang_rollout import generate_rollout as generate


class FeedDataSource(RolloutDataSourceWithBuffer):
    """slime's data source, drawing the feed's problems; what slime puts back (aborted samples) is drawn first."""

    def __init__(self, args: Any, feed: Feed | None = None) -> None:
        """feed: default: a `StoreFeed` by `args.gradstore`. RequestError for samples without an id of their own."""
        super().__init__(args)
        self._samples = {str(one.metadata.get("id", "")): one for one in self.dataset.samples}
        if "" in self._samples or len(self._samples) < len(self.dataset.samples):
            raise RequestError("every problem needs an `id` of its own in its metadata (--metadata-key)")
        records = [
            {"id": name, "prompt": one.prompt, "ground_truth": str(one.label or "")}
            for name, one in self._samples.items()
        ]
        self.feed = feed or StoreFeed(read(StoreFeedSettings, args.gradstore, "gradstore."), records)

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        found: list[list[Any]] = self._get_samples_from_buffer(num_samples)
        for name in self.feed.draw(num_samples - len(found)):
            group = [copy.deepcopy(self._samples[name]) for _ in range(self.args.n_samples_per_prompt)]
            for sample in group:
                sample.group_index, sample.index = self.sample_group_index, self.sample_index
                self.sample_index += 1
            self.sample_group_index += 1
            found.append(group)
        return found

    def observe(self, groups: Sequence[Sequence[Any]], rollout_id: int) -> None:
        """Tell the feed of a step's samples, with their rewards."""
        made = [_group(group, self.args) for group in groups]
        self.feed.observe([group for group in made if group is not None], rollout_id)

    def save(self, rollout_id: int) -> None:
        super().save(rollout_id)
        path = _state_file(self.args.save, rollout_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_file(path, json.dumps(self.feed.state_dict()))

    def load(self, rollout_id: int | None = None) -> None:
        super().load(rollout_id)
        if self.args.load is not None and (path := _state_file(self.args.load, rollout_id)).exists():
            self.feed.load_state_dict(json.loads(path.read_text(encoding="utf-8")))


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """slime's own rollout function; training rollouts are then shown to the data source."""
    output = generate(args, rollout_id, data_source, evaluation=evaluation)
    if not evaluation:
        data_source.observe(output.samples, rollout_id)
    return output


def _state_file(folder: str, rollout_id: int | None) -> Path:
    return Path(folder) / "rollout" / f"gradstore_{rollout_id}.json"


def _group(samples: Sequence[Any], args: Any) -> Group | None:
    """The samples of one problem that are trained on; None if there are none."""
    kept = [one for one in samples if one.response_length and not one.remove_sample and one.status.value != "aborted"]
    if not kept:
        return None
    masks = [np.array(one.loss_mask or [1] * one.response_length, dtype=bool) for one in kept]
    return Group(
        str(kept[0].metadata["id"]),
        np.array(kept[0].tokens[: -kept[0].response_length], dtype=np.int64),
        [np.array(one.tokens[-one.response_length :], dtype=np.int64) for one in kept],
        np.array([float(one.get_reward_value(args)) for one in kept]),
        masks=None if all(mask.all() for mask in masks) else masks,
    )
