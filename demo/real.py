"""The demo on a real language model, with sizes for two cores: a cold start, then the stages of the small demo.

Stages: download and convert the model (real_model.py); a cold start, after which some answers are right and others are
slips (gradstore.demo.cold_start); the comparison of selectors (gradstore.demo.run); a few rounds of training
(gradstore.demo.course). After a kill, a restart skips finished stages and resumes rollouts, sketches and rounds.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gradstore.demo import tasks
from gradstore.demo.cold_start import cold_start
from gradstore.demo.course import CourseSettings
from gradstore.demo.real_model import DISK_BYTES, DOWNLOAD_BYTES, smollm2
from gradstore.demo.run import DemoSettings, Subject
from gradstore.engine.gradients.coverage import LEAST
from gradstore.engine.planning import costs, memory
from gradstore.engine.planning.costs import Work, Workload
from gradstore.engine.planning.devices import Hardware, hardware
from gradstore.engine.planning.plan import Request, Stage, plan
from gradstore.engine.planning.shapes import ModelShape, shape_of
from gradstore.errors import RequestError

N_PROMPT, N_RESPONSE = 56, 4
"""Estimated tokens of a prompt (with the template's system message) and of a response, for `foreseen`."""
_CONVERSION_SECONDS = 25.0
_COLD_START = "cold_start.json"
"""File in the cold-started model's folder with the settings it was made with."""


@dataclass(frozen=True, slots=True)
class RealSettings:
    """Sizes of the demo on a real model."""

    demo: DemoSettings
    course: CourseSettings
    n_taught: int = 960
    """Problems used for the cold start."""
    cold_steps: int = 60
    cold_batch: int = 16
    """Problems per step of the cold start."""
    cold_peak: float = 1e-4
    """Highest learning rate of the cold start."""
    families: tasks.Configs = field(default_factory=lambda: tasks.SMALL_NUMBERS)
    second_family: str = "basic_arithmetic"
    least_seen: float = LEAST
    """Minimum share of the gradient that sketches must see."""

    def subject(self, model: Path) -> Subject:
        """The cold-started model, with the families of problems it was trained on."""
        second = self.second_family
        return Subject(model, self.families, second, second, least_seen=self.least_seen, n_threads=None)

    def of(self, model: Path) -> tuple[DemoSettings, CourseSettings]:
        """(settings of the comparison, settings of the training run) for this model."""
        subject = self.subject(model)
        return replace(self.demo, subject=subject), replace(self.course, subject=subject)


FULL = RealSettings(
    DemoSettings(n_pool=160, n_benchmark=32, n_selected=32, n_fitted=64, chunk=16),
    CourseSettings(
        n_pool=48, n_benchmark=12, n_selected=12, n_updates=2, learning_rate=3e-5, dim=512, token_budget=None
    ),
)
"""Settings of `gradstore demo --real`."""

QUICK = RealSettings(
    DemoSettings(n_pool=48, n_benchmark=12, n_selected=12, n_rollouts=8, n_fitted=24, chunk=16),
    CourseSettings(
        n_pool=16, n_benchmark=6, n_rounds=2, n_selected=4, n_updates=1, learning_rate=3e-5, dim=256, token_budget=None
    ),
    n_taught=480,
    cold_steps=30,
)
"""The same stages in a quarter of the time; too short to compare selectors."""


def prepared(folder: Path, base: Path, settings: RealSettings, tell: Callable[[str], None]) -> Path:
    """Path of the cold-started model, `folder`/model; makes it, and the model in `base`, if they do not exist.

    RequestError if a model made with other settings is already there.
    """
    out = folder / "model"
    made = {
        "taught": settings.n_taught,
        "steps": settings.cold_steps,
        "batch": settings.cold_batch,
        "peak": settings.cold_peak,
        "families": {name: dict(config) for name, config in settings.families.items()},
    }
    if out.exists():
        record = out / _COLD_START
        if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != made:
            raise RequestError(f"{out}: another model, or made with other sizes; choose another folder or remove it")
        return out
    smollm2(base, tell)
    pool = tasks.pool(0, max(settings.demo.n_pool, settings.course.n_pool), settings.families)
    records = tasks.taught(0, settings.n_taught, settings.families, pool)
    cold_start(
        base,
        records,
        out,
        steps=settings.cold_steps,
        batch=settings.cold_batch,
        peak=settings.cold_peak,
        notes={_COLD_START: json.dumps(made)},
        tell=lambda line: tell(f"cold start: {line}"),
    )
    return out


def foreseen(folder: Path, base: Path, settings: RealSettings, seeds: int) -> tuple[list[Stage], int]:
    """Estimated cost of each stage on this machine, and bytes to download; includes a short speed measurement.

    An existing model or cold start is not counted. Other load on the processor, and reading and writing files, are not
    included.
    """
    there = (base / "config.json").is_file()
    if base.exists() and not there:
        raise RequestError(f"{base}: is there already, and holds no model; choose another folder, or remove it")
    shape = shape_of(str(base) if there else "SmolLM2-135M", dtype=torch.float32)
    device = hardware("cpu")
    stages = [] if there else [Stage("conversion", _CONVERSION_SECONDS, 2 * shape.weight_bytes, DISK_BYTES)]
    if not (folder / "model").exists():
        stages.append(_cold_start(shape, settings, device))
    stages += [_compared(shape, settings.demo, device, seeds), _trained(shape, settings.course, device)]
    return stages, 0 if there else DOWNLOAD_BYTES


def _cold_start(shape: ModelShape, settings: RealSettings, device: Hardware) -> Stage:
    load = Workload(settings.cold_steps * settings.cold_batch, 1, N_PROMPT, N_RESPONSE)
    updates = Work(0.0, 0.0, settings.cold_steps * 7.0 * memory.FLOAT32 * shape.n_parameters)
    work = costs.weight_gradients(shape, load, sharing=False, head_everywhere=True).plus(updates)
    # weights, gradients and Adam's moments; logits of every token and their gradient
    held = 4 * shape.weight_bytes + 12 * settings.cold_batch * (N_PROMPT + N_RESPONSE) * shape.vocabulary
    return Stage("cold start", work.seconds(device), held, shape.weight_bytes)


def _compared(shape: ModelShape, sizes: DemoSettings, device: Hardware, seeds: int) -> Stage:
    """Estimated cost of the comparison: rollouts, a fitted projection and sketches, for each seed."""
    found = _planned(shape, device, sizes.n_pool, sizes.n_benchmark, sizes.n_rollouts, sizes.n_selected)
    parts = [found[name] for name in ("rollouts, transformers", "fit and measure", "sketches")]
    seconds = seeds * sum(part.seconds for part in parts)
    disk = seeds * sum(part.disk_bytes for part in parts)
    return Stage("selectors compared", seconds, max(part.memory_bytes for part in parts), disk)


def _trained(shape: ModelShape, sizes: CourseSettings, device: Hardware) -> Stage:
    """Estimated cost of the training run.

    Each round measures the pool and both benchmarks, then rolls out and trains on its picks at every step.
    """
    measured = _planned(shape, device, sizes.n_pool, 2 * sizes.n_benchmark, sizes.n_rollouts, sizes.n_selected)
    picked = _planned(shape, device, sizes.n_selected, 1, sizes.n_rollouts, sizes.n_selected)
    step = picked["rollouts, transformers"].seconds + picked["training round"].seconds
    a_round = measured["rollouts, transformers"].seconds + measured["sketches"].seconds
    seconds = sizes.n_rounds * (a_round + sizes.n_updates * step) + measured["fit and measure"].seconds
    checkpoint = 3 * shape.weight_bytes  # weights and Adam's moments; a new file is written before the old one goes
    return Stage("training rounds", seconds, picked["training round"].memory_bytes, 2 * checkpoint)


def _planned(
    shape: ModelShape, device: Hardware, n_pool: int, n_benchmark: int, n_rollouts: int, n_picked: int
) -> Mapping[str, Stage]:
    request = Request(n_pool, n_rollouts, N_RESPONSE, N_PROMPT, n_benchmark, n_picked)
    return {stage.name: stage for stage in plan(shape, request, device).stages}
