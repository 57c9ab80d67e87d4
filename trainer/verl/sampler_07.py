"""verl 0.7.x: picks from a store, through verl's own hook for samplers.

    data.sampler.class_path=pkg://gradstore.trainer.verl.sampler_07 data.sampler.class_name=StoreSampler
    data.dataloader_num_workers=0 +data.gradstore.store=run/store +data.gradstore.selected=256 ...

A sampler of verl 0.7 has no access to the policy or the workers, so sketches are made outside of the run. The sampler
writes each step's rollouts to a file, and `gradstore collect` sketches them with a saved checkpoint. When its picks are
used up, the sampler selects again from the store's current rows. verl 0.9 does not need this (trainer/verl).

verl 0.7 writes its checkpoint before it calls the sampler's `update`. This makes no difference: selections happen when
the loader draws, and the state is the number of draws.
"""

import logging
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from verl.experimental.dataset.sampler import AbstractCurriculumSampler

import gradstore
from gradstore.engine.rollouts import Rollout, write_rollouts
from gradstore.engine.searching.targets import target
from gradstore.engine.selecting.selection import select
from gradstore.errors import RequestError
from gradstore.problems import from_verl
from gradstore.settings import read
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.verl.sampler import RoundSampler, drawing_order

log = logging.getLogger(__name__)

NODE = "data.gradstore"


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The node `data.gradstore` of verl's configuration."""

    store: str
    """Path of the store to select from; it may grow during the run."""
    selected: int
    """Problems picked per selection."""
    steps: int = 10
    """Training steps per selection."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, or a mixture."""
    pool: str = "pool"
    """Collection of the store that holds the problems of data.train_files."""
    benchmarks: tuple[str, ...] = ("validation",)
    """Collections whose gradients are the targets."""
    seed: int = 0
    """Seed; every random draw depends only on it and the selection's number."""
    rollouts: str | None = None
    """Folder for each step's rollouts, step-000000.jsonl and so on; None: do not keep them."""

    @classmethod
    def of(cls, data_config: Mapping[str, Any]) -> "StoreSettings":
        """Read the settings; RequestError for a missing or unknown setting, and for a loader that draws ahead."""
        if data_config.get("dataloader_num_workers", 8) != 0:
            raise RequestError(
                "data.dataloader_num_workers must be 0: workers draw problems before they are picked; "
                "set data.dataloader_num_workers=0"
            )
        given = dict(data_config.get("gradstore") or {})
        if not isinstance(given.get("benchmarks", ""), str):
            given["benchmarks"] = tuple(given["benchmarks"])
        return read(cls, given, f"{NODE}.")


class StoreSampler(RoundSampler, AbstractCurriculumSampler):
    """Draws a selector's picks from the store, and writes each step's rollouts."""

    def __init__(self, data_source: Sized, data_config: Mapping[str, Any]) -> None:
        """verl calls this. data_source: verl's dataset. data_config: the `data` node of verl's configuration.

        RequestError for invalid settings, and for a store without the pool or a benchmark.
        """
        self._settings = StoreSettings.of(data_config)
        self._batch = int(data_config["train_batch_size"])
        self._dataset: Any = data_source
        records = list(_records(self._dataset))
        self._records = {record["id"]: record for record in records}
        super().__init__([record["id"] for record in records])
        self._choices = 0
        store = gradstore.open(self._settings.store)
        for name in (self._settings.pool, *self._settings.benchmarks):
            if name not in store.collections:
                raise RequestError(f"{store.path} has no collection {name!r}: make it with `gradstore collect`")
        drawing_order(["any"] * self._settings.selected, self._batch * self._settings.steps, 0)

    def __iter__(self) -> Iterator[int]:
        """Yield row numbers without end; verl counts the steps."""
        while True:
            yield from super().__iter__()
            self._choose()

    def update(self, batch: Any) -> None:
        """Write the rollouts of a step's batch, one row per rollout; verl calls this after each step."""
        if self._settings.rollouts is None:
            return
        step = (self._choices - 1) * self._settings.steps + self._drawn // self._batch - 1
        folder = Path(self._settings.rollouts)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.jsonl"
        if path.exists():
            return  # written before an interruption, by the same policy
        unfinished = path.with_name(f"unfinished-{path.name}")
        with write_rollouts(unfinished) as writer:
            writer.append(self._rows(batch, step))
        unfinished.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """State as plain values: that of `RoundSampler`, and the number of selections."""
        return {**super().state_dict(), "choices": self._choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`; RequestError if it is of another pool."""
        super().load_state_dict(state)
        self._choices = int(state["choices"])

    def _choose(self) -> None:
        settings = self._settings
        store = gradstore.open(settings.store)
        seed = derived_seed(settings.seed, self._choices)
        view = store.view(settings.pool)
        here = [name for name in view.ids.tolist() if name in self._records]
        targets = [target(store, name) for name in settings.benchmarks]
        picks = select(store, settings.pool, targets, settings.selected, settings.selector, candidates=here, seed=seed)
        if (picks.relative_weights != 1).any():
            log.warning("verl 0.7 tells a sampler of a step when it is done: the selector's weights are not used")
        self.feed(drawing_order(picks.ids, self._batch * settings.steps, seed))
        self._choices += 1

    def _rows(self, batch: Any, step: int) -> list[Rollout]:
        """The batch's rows as rollouts, grouped by problem."""
        tensors, others = batch.batch, batch.non_tensor_batch
        names = [_id_of(info, i) for i, info in enumerate(others["extra_info"])]
        width = tensors["prompts"].shape[1]
        reference = tensors["ref_log_prob"] if "ref_log_prob" in tensors.keys() else None  # noqa: SIM118 (TensorDict)
        rows = []
        for i in sorted(range(len(names)), key=lambda i: (names[i], str(others["uid"][i]), i)):
            prompt_mask = tensors["attention_mask"][i, :width].bool()
            response_mask = tensors["attention_mask"][i, width:].bool()
            if not bool((tensors["response_mask"][i].bool() == response_mask).all()):
                raise RequestError(
                    f"problem {names[i]!r}: a response has tokens that the policy did not write (tools, more turns); "
                    f"leave {NODE}.rollouts out, sketches are of single-turn rollouts"
                )
            response_ids = tensors["responses"][i][response_mask].numpy().astype(np.int64)
            record = self._records[names[i]]
            rows.append(
                Rollout(
                    problem_id=names[i],
                    prompt=record["prompt"],
                    prompt_ids=tensors["prompts"][i][prompt_mask].numpy().astype(np.int64),
                    response_ids=response_ids,
                    reward=float(tensors["token_level_scores"][i].sum()),
                    reference_logprobs=None if reference is None else reference[i][response_mask].float().numpy(),
                    source=record["source"],
                    ground_truth=record["ground_truth"],
                    tags=list(record["tags"]),
                    extra=dict(record["extra"]),
                    step=step,
                )
            )
        return rows


def _id_of(info: Mapping[str, Any], row: int) -> str:
    """Problem id of a row's extra_info, read as in `from_verl`."""
    value = info.get("index") if info.get("index") is not None else info.get("id")
    if value is None:
        raise RequestError(f"batch, row {row + 1}: extra_info has no `index`: its problem cannot be told")
    return str(int(value)) if isinstance(value, float | np.integer) else str(value)


def _records(dataset: Any) -> Iterator[dict[str, Any]]:
    for row, given in enumerate(dataset.dataframe):
        fields_of_row = dict(given)
        if dataset.prompt_key != "prompt":
            fields_of_row["prompt"] = fields_of_row.pop(dataset.prompt_key)
        yield from_verl(fields_of_row, f"data.train_files, row {row + 1}")
