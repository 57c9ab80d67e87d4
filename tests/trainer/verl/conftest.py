"""What a run of verl on the processor needs: an environment, a pool and a benchmark of sums, and verl's settings.

Tests marked `verl` need verl 0.9, which has an environment of its own: `make test-verl`.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

CPU = Path(__file__).parent / "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("verl") is None:
        for item in items:
            if item.get_closest_marker("verl"):
                item.add_marker(pytest.mark.skip(reason="needs verl: make test-verl"))


def save_sums(path: Path, pairs: list[tuple[int, int]], first: int = 0) -> None:
    """verl's records of sums, numbered from `first`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"index": first + i},
        }
        for i, (a, b) in enumerate(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def environment() -> dict[str, str]:
    """verl on the processor, whatever process of Ray's it runs in."""
    return {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "PYTHONPATH": os.pathsep.join([str(CPU), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


@pytest.fixture(scope="session")
def verl_environment() -> dict[str, str]:
    return environment()


@pytest.fixture(scope="session")
def task(tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a pool of 16 sums and a benchmark of 4."""
    folder = tmp_path_factory.mktemp("task")
    tiny_model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    save_sums(folder / "pool.parquet", [(a, b) for a in range(4) for b in range(4)])
    save_sums(folder / "benchmark.parquet", [(a, 9 - a) for a in range(4)], first=1000)
    return folder


@pytest.fixture(scope="session")
def verl_overrides(task: Path) -> list[str]:
    return overrides(task)


def overrides(task: Path, rollout: str = "transformers", n_ranks: int = 1) -> list[str]:
    """verl's settings for the task: float32 on the processor, 4 problems a step, 4 rollouts each."""
    model, actor, engine = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={task}/pool.parquet",
        f"data.val_files={task}/benchmark.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=12",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=False",
        f"{model}.path={task}/model",
        f"{model}.external_lib=transformers_rollout",
        f"{model}.use_remove_padding=False",
        f"{model}.enable_gradient_checkpointing=False",
        f"+{model}.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.dtype=float32",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        f"{actor}.use_kl_loss=False",
        f"{actor}.optim.lr=1e-2",
        f"{engine}.name={rollout}",
        f"{engine}.n=4",
        f"{engine}.tensor_model_parallel_size=1",
        f"{engine}.dtype=float32",
        f"{engine}.enforce_eager=True",
        f"{engine}.free_cache_engine=True",
        f"{engine}.log_prob_micro_batch_size_per_gpu=4",
        f"{engine}.max_model_len=128",
        f"{engine}.max_num_seqs=32",
        f"{engine}.max_num_batched_tokens=1024",
        f"{engine}.agent.num_workers=1",
        f"+{engine}.enable_sleep_mode=False",
        f"reward.custom_reward_function.path={CPU}/reward.py",
        "reward.custom_reward_function.name=compute_score",
        "reward.num_workers=1",
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={n_ranks}",
        "trainer.nnodes=1",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "ray_kwargs.ray_init.num_cpus=16",
        f"+ray_kwargs.ray_init.num_gpus={n_ranks}",
        "+ray_kwargs.ray_init.include_dashboard=False",
    ]
