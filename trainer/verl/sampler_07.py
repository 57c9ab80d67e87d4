"""verl 0.7.x: picks from a store, through verl's own hook for samplers.

    data.sampler.class_path=pkg://gradstore.trainer.verl.sampler_07 data.sampler.class_name=StoreSampler
    data.dataloader_num_workers=0 +data.gradstore.store=run/store +data.gradstore.selected=256 ...

verl 0.7 gives a sampler neither its policy nor its workers, so that sketches are made outside: the rollouts of every
step are left as a rollout file, `gradstore collect` sketches them with a saved checkpoint, and whenever its picks are
used up the sampler chooses anew from what the store holds by then. verl 0.9 needs none of this (trainer/verl).

verl 0.7 writes its checkpoint before it tells the sampler of the step. Nothing here depends on that: choices are made
when the loader draws, and what was drawn is the state.
"""

import logging
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, fields
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
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.verl.sampler import RoundSampler, drawing_order

log = logging.getLogger(__name__)

NODE = "data.gradstore"


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The node `data.gradstore` of verl's configuration."""

    store: str
    """The store that is chosen from; it may grow while the run goes on."""
    selected: int
    """Problems picked at a time."""
    steps: int = 10
    """Training steps on them."""
    selector: str = "cosine"
    """Any of engine.SELECTORS, or a mixture."""
    pool: str = "pool"
    """Collection of the store that data.train_files is in."""
    benchmarks: tuple[str, ...] = ("validation",)
    """Collections whose gradients are the targets."""
    seed: int = 0
    """Everything drawn at random follows from it and the number of the choice."""
    rollouts: str | None = None
    """Folder for the rollouts of every step, step-000000.jsonl and so on; None: they are not kept."""

    @classmethod
    def of(cls, data_config: Mapping[str, Any]) -> "StoreSettings":
        """RequestError for a setting that is missing or unknown, and for a loader that draws ahead."""
        given = dict(data_config.get("gradstore") or {})
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise RequestError(f"{NODE}.{name} is not known, expected one of {', '.join(known)}")
        for name in ("store", "selected"):
            if given.get(name) is None:
                raise RequestError(f"{NODE}.{name} is missing")
        if data_config.get("dataloader_num_workers", 8) != 0:
            raise RequestError(
                "data.dataloader_num_workers must be 0: workers draw problems before they are picked; "
                "set data.dataloader_num_workers=0"
            )
        if "benchmarks" in given:
            given["benchmarks"] = tuple(given["benchmarks"])
        return cls(**given)


class StoreSampler(RoundSampler, AbstractCurriculumSampler):
    """Draws what a selector picks from the store, and keeps each step's rollouts."""

    def __init__(self, data_source: Sized, data_config: Mapping[str, Any]) -> None:
        """Called by verl. data_source: its dataset; data_config: the `data` node of its configuration.

        RequestError for settings that cannot be, and for a store without the pool or without a benchmark.
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
        """Without end: verl counts the steps."""
        while True:
            yield from super().__iter__()
            self._choose()

    def update(self, batch: Any) -> None:
        """Called by verl after each step with its batch, one row a rollout: keeps the rollouts."""
        if self._settings.rollouts is None:
            return
        step = (self._choices - 1) * self._settings.steps + self._drawn // self._batch - 1
        folder = Path(self._settings.rollouts)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.jsonl"
        if path.exists():
            return  # of this step before an interruption, sampled by the same policy
        unfinished = path.with_name(f"unfinished-{path.name}")
        with write_rollouts(unfinished) as writer:
            writer.append(self._rows(batch, step))
        unfinished.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what was chosen, how far it is drawn, and how often was chosen."""
        return {**super().state_dict(), "choices": self._choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; RequestError for the state of another pool."""
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
        """The batch's rows as rollouts, a problem's together."""
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
    """As `from_verl` reads it."""
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
