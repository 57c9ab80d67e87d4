"""A tokenizer of bytes, a random model of 90,000 parameters that speaks it, and a small store."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from tests.s3 import S3, s3_server


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token per byte, four special tokens, a chat template; no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: j for j, symbol in enumerate(symbols)}, merges=[]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Any:
    """Qwen2 of 2 layers, hidden 64, with random weights of a fixed seed, in eval mode."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.eos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def small_store() -> Callable[[Path], Path]:
    """small_store(path) -> the path, where there is a store then: a pool of eight problems, a benchmark of two."""

    def make(path: Path) -> Path:
        random = np.random.default_rng(0)
        store = gradstore.create(path, dim=32, fingerprint={"objective": {"importance": False}})
        for name, n in (("pool", 8), ("bench", 2)):
            ids = [f"p{i}" for i in range(n)]
            store.add_problems(name, [{"id": problem, "prompt": "?"} for problem in ids])
            for step in (0, 1):
                with store.writer(name, step=step) as writer:
                    writer.append(ids, random.normal(size=(n, 32)).astype(np.float32))
        return path

    return make


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """An S3 server with an empty bucket, to which the environment leads; and a cache of its own."""
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
        yield server
