"""Peak memory of the commands that run a model, compared with the memory of its weights.

    python -m benchmarks.memory --model FOLDER [--problems 20] [--rollouts 8]

Each row is a separate process with the default settings. `load`: only the model. `collect`: into a new store, with a
fitted projection. `train`: two rounds that train all weights with probes, so Adam's moments, a benchmark's gradient and
a displaced copy of the weights are in memory together. Problems and responses are artificial, and rewards are coin
flips, so that nearly every problem has a gradient. On a GPU, the peak is the host's.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.peaks import outcome
from gradstore.cli.show import print_table, say
from gradstore.durable import canonical_json
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.write import write_rollouts

LOAD = "import sys; from gradstore.engine.gradients.models import load_model; load_model(sys.argv[1])"
COLLECT = ["--accept-coverage", "0"]
TRAIN = [
    *("candidates=16", "selected=8", "train_batch=8", "steps=1", "rounds=2", "rollouts=4", "target_rollouts=4"),
    *("selector=lcb", "refresh=16", "fit_problems=8", "accept_coverage=0"),
]
"""Settings of the rounds: all candidates are probed, and one training step per round uses all of them."""


def coin(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """A reward that does not depend on correctness, but is deterministic."""
    return float(sum(map(ord, solution_str)) % 2)


def problems(n: int, first: int = 0) -> list[dict[str, str]]:
    """Make n problem records."""
    text = "A box holds {a} pens. {b} children take {c} each. How many pens are left in the box? Think step by step."
    return [
        {"id": f"p{i}", "prompt": text.format(a=50 + 7 * i, b=2 + i % 5, c=1 + i % 7), "ground_truth": str(i)}
        for i in range(first, first + n)
    ]


def rollouts(records: Sequence[dict[str, str]], n: int, tokenizer: Any) -> Iterator[Rollout]:
    """Responses of about fifty tokens, with random rewards."""
    rng = np.random.default_rng(0)
    for record in records:
        prompt_ids = np.array(tokenizer(record["prompt"])["input_ids"])
        for _ in range(n):
            a, b, c = rng.integers(100, size=3).tolist()
            text = f" The children take {a} times {b} pens, which is {c}. " * 3 + f"So {a} pens are left in the box."
            yield Rollout(
                problem_id=record["id"],
                reward=float(rng.integers(2)),
                prompt=record["prompt"],
                prompt_ids=prompt_ids,
                response_ids=np.array(tokenizer(text)["input_ids"]),
                ground_truth=record["ground_truth"],
            )


def main(
    model: Annotated[str, typer.Option(help="Folder or name of a transformers causal LM.")],
    problems_: Annotated[int, typer.Option("--problems", min=16, help="Problems of `collect`.")] = 20,
    rollouts_: Annotated[int, typer.Option("--rollouts", min=2, help="Responses to each of them.")] = 8,
) -> None:
    tokenizer = load_tokenizer(model)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in load_model(model).parameters())
    python, ours = sys.executable, [sys.executable, "-m", "gradstore"]
    with tempfile.TemporaryDirectory() as folder:
        pool, bench, rolled = (str(Path(folder, name)) for name in ("pool.jsonl", "bench.jsonl", "rollouts.jsonl"))
        for path, records in ((pool, problems(64)), (bench, problems(8, first=64))):
            Path(path).write_bytes(b"\n".join(map(canonical_json, records)))
        with write_rollouts(Path(rolled)) as writer:
            writer.append(rollouts(problems(problems_), rollouts_, tokenizer))
        where = ["--model", model, "--pool", pool, "--benchmark", f"b={bench}", "--out", f"{folder}/run"]
        how = ["--reward", f"{__spec__.name if __spec__ else __name__}:coin", "--train-rollouts", "8"]
        commands = {
            "load": [python, "-c", LOAD, model],
            "collect": [*ours, "collect", f"{folder}/store", "pool", rolled, "--model", model, *COLLECT],
            "train": [*ours, "train", *where, *how, "--max-new-tokens", "48", *TRAIN],
        }
        rows = []
        for name, command in commands.items():
            done = outcome(command)
            if done.status:
                say(f"{name} ended with exit status {done.status}: {done.said[-2000:]}")
                raise typer.Exit(1)
            rows.append([name, f"{done.peak / 1e9:.2f}", f"{done.peak / weights:.1f}", f"{done.seconds:.0f}"])
            say(f"{name}: {done.peak / 1e9:.2f} GB")
    columns = ["process", "peak GB", "x weights", "seconds"]
    print_table(f"{model}: weights of {weights / 1e9:.2f} GB", columns, rows, right=columns[1:])


if __name__ == "__main__":
    typer.run(main)
