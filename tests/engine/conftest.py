"""Small random models of each supported architecture, and groups of random rollouts for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import gradstore
from gradstore import State, Store
from gradstore.engine import PRESETS, ProbeBatch
from gradstore.engine.rollouts import Group

N_VOCABULARY = 61
ON_POLICY = {name: rule for name, rule in PRESETS.items() if not rule.importance}
"""Presets that need no log-probabilities; tests/engine/test_off_policy.py has the others."""


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=N_VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=N_VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=N_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _qwen2_lora() -> nn.Module:
    model = get_peft_model(_qwen2(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make every gradient of lora_A zero
            nn.init.normal_(parameter, std=0.1)
    return model


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen2": _qwen2,
    "llama": _llama,
    "gpt2": _gpt2,
    "qwen2-lora": _qwen2_lora,
}


def random_model(name: str) -> nn.Module:
    """A seeded random fp32 model of an architecture."""
    torch.manual_seed(3)
    model = ARCHITECTURES[name]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else None
    return model


def own_gradient(model: nn.Module, name: str) -> torch.Tensor:
    """What autograd left for the layer of a name, float [O, I]: a norm's weight is one row, a bias one column."""
    modules = dict(model.named_modules())
    if name not in modules:
        return modules[name.removesuffix(".bias")].bias.grad[:, None]
    gradient = modules[name].weight.grad
    if gradient.ndim == 1:
        return gradient[None]
    return gradient.T if isinstance(modules[name], Conv1D) else gradient


def random_groups(n: int, *, n_rollouts: int = 4, seed: int = 0, logprobs: bool = False) -> list[Group]:
    """Groups of random rollouts of random lengths with 0/1 rewards, at least one of each."""
    random = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        responses = [random.integers(0, N_VOCABULARY, random.integers(1, 12)) for _ in range(n_rollouts)]
        rewards = np.zeros(n_rollouts)
        rewards[: random.integers(1, n_rollouts)] = 1.0
        behaviour = [-random.exponential(3.0, len(r)).astype(np.float32) for r in responses] if logprobs else None
        groups.append(
            Group(
                f"problem-{i}",
                random.integers(0, N_VOCABULARY, random.integers(2, 10)),
                responses,
                random.permutation(rewards),
                behaviour,
            )
        )
    return groups


@pytest.fixture
def make_model() -> Callable[[str], nn.Module]:
    """An architecture's name -> a seeded random fp32 model of it, with weights large enough to matter."""

    return random_model


@pytest.fixture
def make_groups() -> Callable[..., list[Group]]:
    """Groups of random rollouts of random lengths with 0/1 rewards, at least one of each."""

    return random_groups


@pytest.fixture
def make_store(tmp_path) -> Callable[..., Store]:
    """A fp32 store with a pool of random rows, some without signal, some failed, and a benchmark of eight."""

    def make(n: int = 60, dim: int = 24, dtype: str = "fp32", seed: int = 0) -> Store:
        random = np.random.default_rng(seed)
        layout = [["a", 0, 10], ["b", 10, 16], ["c", 16, dim]]
        store = gradstore.create(tmp_path / "store", dim=dim, fingerprint={"layout": layout}, dtype=dtype)
        ids = [f"p{i:03d}" for i in range(n)]
        store.add_problems(
            "pool",
            [
                {"id": name, "prompt": f"What is {name}?", "source": f"s{i % 3}", "tags": ["even"] * (i % 2 == 0)}
                for i, name in enumerate(ids)
            ],
        )
        sketches = random.normal(size=(n, dim)).astype(np.float32) * random.lognormal(size=(n, 1)).astype(np.float32)
        states = [State.NO_SIGNAL if i % 7 == 3 else State.FAILED if i % 11 == 5 else State.LIVE for i in range(n)]
        rates = random.integers(0, 9, n).astype(np.float32) / 8
        with store.writer("pool", step=0) as writer:
            writer.append(
                ids,
                sketches,
                state=states,
                pass_rate=rates,
                n_rollouts=np.full(n, 8),
                reason=["broken" if state is State.FAILED else "" for state in states],
            )
        store.add_problems("bench", [{"id": f"v{i}", "prompt": "?"} for i in range(8)])
        with store.writer("bench", step=0) as writer:
            writer.append([f"v{i}" for i in range(8)], random.normal(size=(8, dim)).astype(np.float32))
        return store

    return make


def random_probes(ids: list[str], n_rollouts: int = 12, seed: int = 0) -> ProbeBatch:
    """Probes whose rewards and derivatives are related, each problem in its own degree; every fifth without signal."""
    random = np.random.default_rng(seed)
    groups, derivatives = [], []
    for i, name in enumerate(ids):
        d_G = random.normal(size=n_rollouts)
        rewards_G = (random.normal(size=n_rollouts) + (i % 7 - 2) / 2 * d_G > 0).astype(float)
        rewards_G[:2] = 0, 1
        if i % 5 == 4:
            rewards_G[:] = 1.0
        responses = [np.arange(3)] * n_rollouts
        groups.append(Group(name, np.arange(2), responses, rewards_G))
        derivatives.append(d_G * (1 + i % 3))
    return ProbeBatch.of(groups, derivatives, PRESETS["gradalign"])


@pytest.fixture
def make_probes() -> Callable[..., ProbeBatch]:
    """Ids -> probes of random derivatives and rewards; every fifth without signal."""

    return random_probes


@pytest.fixture
def weights_of() -> Callable[[nn.Module], dict[str, bytes]]:
    """A model -> the bytes of every tensor it would save, by name."""
    return lambda model: {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.fixture
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """write_rows(path, rows) -> the path, a file of rollouts in the container that its name asks for."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
        return path

    return write
