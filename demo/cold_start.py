"""Cold start: supervised fine-tuning of a pretrained model on ground truths, so that it answers in their form only.

    python -m gradstore.demo.cold_start MODEL PROBLEMS OUT --steps 60 --batch 16

RL strengthens answers that a model already gives sometimes. Some of the truths used here are wrong, so the model learns
to give both right and wrong answers, and rewards differ. Do not use these problems in a pool or a benchmark.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import typer

from gradstore.demo.pretrain import padded, train
from gradstore.durable import whole_folder
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts.tokens import prompt_ids, response_ids
from gradstore.errors import GradstoreError, RequestError
from gradstore.problems import read_problems


class Taught:
    """Training text: repeated passes over the problems in random order, each answered with its ground truth."""

    def __init__(self, tokenizer: Any, records: Sequence[Mapping[str, Any]], seed: int) -> None:
        self._random = Random(f"cold start {seed}")
        self._pad = tokenizer.pad_token_id
        self._lines = [
            (
                prompt_ids(tokenizer, record["prompt"], f"problem {record['id']!r}").tolist(),
                response_ids(tokenizer, record["ground_truth"], append_eos=True).tolist(),
            )
            for record in records
        ]
        self._waiting: list[tuple[list[int], list[int]]] = []

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, int64 [B, T] each, padded on the right."""
        while len(self._waiting) < size:
            self._waiting += self._random.sample(self._lines, len(self._lines))
        lines, self._waiting = self._waiting[:size], self._waiting[size:]
        return padded(lines, self._pad)


def cold_start(
    source: Path,
    records: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    steps: int,
    batch: int,
    peak: float = 1e-4,
    seed: int = 0,
    notes: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train the model of folder `source` on the records' ground truths and write it to `out` atomically.

    peak: highest learning rate. notes: text files (name -> text) to write next to the weights. tell: called with a line
    of progress every few seconds. RequestError if `out` already exists.
    """
    if not records:
        raise RequestError("a cold start needs at least one problem")
    tokenizer = load_tokenizer(str(source))
    with whole_folder(out) as unfinished:
        model = load_model(str(source), device="cpu", dtype="float32")
        model.requires_grad_(True)
        train(model, Taught(tokenizer, records, seed), steps=steps, batch=batch, peak=peak, tell=tell)
        model.save_pretrained(unfinished)  # type: ignore[operator]
        tokenizer.save_pretrained(unfinished)
        for name, text in (notes or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
    return out


def main(
    model: Path, problems: Path, out: Path, steps: int = 60, batch: int = 16, peak: float = 1e-4, seed: int = 0
) -> None:
    """Train MODEL on the ground truths of PROBLEMS (JSONL or Parquet), BATCH a step, and write it to the folder OUT."""

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    try:
        cold_start(model, read_problems(problems), out, steps=steps, batch=batch, peak=peak, seed=seed, tell=tell)
    except GradstoreError as error:
        tell(f"cold start: {error}")
        sys.exit(error.exit_status)


if __name__ == "__main__":
    typer.run(main)
