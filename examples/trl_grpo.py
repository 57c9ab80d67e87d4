"""GRPO with TRL on the problems that push the policy toward a benchmark.

    pip install 'gradstore[cpu,trl,lora]'
    python examples/trl_grpo.py
    gradstore report trl-run/store

The only lines of gradstore's are the import, the class and `selection=`. With several GPUs: accelerate launch.
"""

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig
from trl.rewards import accuracy_reward

from gradstore.trainer.trl import SelectingGRPOTrainer


def rows(split: str, n: int):
    """GSM8K as prompts and solutions; any column is passed to the reward functions."""
    data = load_dataset("openai/gsm8k", "main", split=f"{split}[:{n}]")
    return data.map(
        lambda row, place: {
            "id": f"{split}-{place}",
            "prompt": [{"role": "user", "content": row["question"]}],
            "solution": f"${row['answer'].split('####')[-1].strip()}$",
        },
        with_indices=True,
        remove_columns=data.column_names,
    )


trainer = SelectingGRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    args=GRPOConfig("trl-run", per_device_train_batch_size=32, num_generations=8, max_steps=100, save_steps=10),
    train_dataset=rows("train", 2000),
    eval_dataset=rows("test", 64),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    # Every 10 generation batches of 4 problems: the 20 of 400 candidates that align best with the test problems.
    selection={"store": "trl-run/store", "candidates": 400, "selected": 20, "steps": 10, "refresh": 100},
)
trainer.train()
