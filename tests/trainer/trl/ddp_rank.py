"""One process of a run on two, started by test_two_processes.py: python ddp_rank.py FOLDER."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from gradstore.trainer.trl import SelectingGRPOTrainer
from tests.trainer.trl.conftest import BENCHMARK, GENERATIONS, POOL, SELECTION, odd

FOLDER, RESUMES = Path(sys.argv[1]), "resume" in sys.argv


def main() -> None:
    torch.set_num_threads(1)
    # transformers loads a checkpoint to "cpu:0" when there are several processes, a place that torch does not know.
    torch.serialization.register_package(5, lambda storage: None, lambda storage, place: storage)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    args = GRPOConfig(
        str(FOLDER / "out"),
        per_device_train_batch_size=2 * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=6,
        learning_rate=1e-2,
        max_steps=int(sys.argv[2]),
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,
        report_to=[],
        save_strategy="no" if sharded else "steps",
        save_steps=1,
        beta=0.0,
        seed=5,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = SelectingGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(FOLDER / "model"),
        reward_funcs=odd,
        args=args,
        train_dataset=Dataset.from_list(POOL),
        processing_class=AutoTokenizer.from_pretrained(FOLDER / "model"),
        # 3 of the benchmark: the processes cannot share it out evenly.
        selection={**SELECTION, "store": FOLDER / "store", "benchmarks": {"bench": BENCHMARK[:3]}, "observe": "all"},
    )
    sketched: list[dict[str, Any]] = []
    if trainer.accelerator.is_main_process:
        sketch = trainer._policy.sketch

        def kept(groups: Any) -> Any:
            batch = sketch(groups)
            sketched.append({"step": trainer.state.global_step, "groups": groups, "batch": batch})
            return batch

        trainer._policy.sketch = kept  # type: ignore[method-assign]
    first = {name: own.detach().clone() for name, own in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=RESUMES or None)
    rank = trainer.accelerator.process_index
    if not sharded:
        weights = {name: own.detach() for name, own in trainer.model.state_dict().items()}
        torch.save(weights, FOLDER / f"weights-{rank}.pt")
    if rank == 0:
        torch.save({"first": first, "sketched": sketched}, FOLDER / "sketched.pt")
    (FOLDER / f"done-{rank}.json").write_text(json.dumps({"step": trainer.state.global_step}))


if __name__ == "__main__":
    main()
