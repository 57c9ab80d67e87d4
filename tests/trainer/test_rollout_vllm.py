"""The vLLM back end keeps the conventions of the transformers one; run wherever vLLM is installed, else skipped.

On a machine without a GPU the CPU build of vLLM runs them too, in an environment of its own: it pins other packages
than the product needs.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore import RequestError
from gradstore.engine.rollouts import read_rollouts
from gradstore.trainer.sampling.backends import load_backend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[9], [30, 31, 32, 33, 34, 35, 36], [40, 41, 42], [50, 51]]
SAMPLING: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "top_p": 0.95, "seed": 11}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_absent_vllm_names_the_extra(tmp_path: Path) -> None:
    """The most likely first error of a new user: it must say what to install and what to use without."""
    with pytest.raises(
        RequestError, match=r"pip install 'gradstore\[gpu\]', or use the transformers back end"
    ) as refused:
        load_backend("vllm", tmp_path)
    assert refused.value.exit_status == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A model whose own sampling defaults are far from its policy, and with a second end token."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [1, 100], "pad_token_id": 0, "top_k": 1, "repetition_penalty": 1.9, "do_sample": true}'
    )
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path) -> Any:
    options: dict[str, Any] = {"dtype": "float32", "context": 64, "enforce_eager": True}
    patch = pytest.MonkeyPatch()
    if not torch.cuda.is_available():
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        options |= {"max_num_seqs": 32, "max_num_batched_tokens": 1024}
    else:
        options |= {"gpu_memory_utilization": 0.2}
    yield load_backend("vllm", folder, **options)
    patch.undo()


@pytest.mark.vllm
@pytest.mark.timeout(600)
@with_vllm
def test_vllm_keeps_the_conventions(backend: Any, tiny_model: Any) -> None:
    """Log-probabilities at temperature 1 of the policy itself, end tokens kept, every rollout its own."""
    groups = backend.generate(PROMPTS, 32, **SAMPLING)
    assert [len(group) for group in groups] == [32] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            ids_T = torch.tensor([*prompt, *response.token_ids.tolist()])
            with torch.no_grad():
                logprobs_TV = tiny_model(ids_T[None]).logits[0].log_softmax(-1)
            slow = logprobs_TV[len(prompt) - 1 : -1].gather(1, ids_T[len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(response.logprobs, slow.numpy(), atol=1e-4)
            ends = np.flatnonzero(np.isin(response.token_ids, [1, 100])).tolist()
            stopped = response.finish_reason == "stop"
            assert ends == ([len(response.token_ids) - 1] if stopped else [])
            assert stopped or len(response.token_ids) == SAMPLING["max_new_tokens"]
    reasons = [response.finish_reason for group in groups for response in group]
    last = {int(r.token_ids[-1]) for group in groups for r in group if r.finish_reason == "stop"}
    assert last == {1, 100}
    assert reasons.count("length") >= 5
    assert len({tuple(r.token_ids.tolist()) for group in groups for r in group}) > 120


@pytest.mark.vllm
@pytest.mark.timeout(600)
@with_vllm
def test_vllm_same_seed_same_rollouts(backend: Any) -> None:
    """What resuming rests on."""

    def ids(seed: int) -> list[list[list[int]]]:
        groups = backend.generate(PROMPTS, 4, **SAMPLING | {"seed": seed})
        return [[response.token_ids.tolist() for response in group] for group in groups]

    assert ids(11) == ids(11)
    assert ids(11) != ids(12)


@pytest.mark.vllm
@pytest.mark.timeout(600)
@with_vllm
def test_vllm_rollout_file(tmp_path: Path, backend: Any, tiny_tokenizer: Any) -> None:
    """From problems to a file and back, resumed in the middle; and the context is the one asked for."""
    problems = [{"id": f"p{j}", "prompt": f"{j}+1="} for j in range(6)]
    reward = Reward("length", lambda record, response, rollout_index: len(response))

    def run(path: Path) -> bytes:
        rollout(problems, backend, reward, path, n=3, max_new_tokens=12, chunk=2)
        return path.read_bytes()

    whole = run(tmp_path / "r.jsonl")
    source = read_rollouts(tmp_path / "r.jsonl", tokenizer=tiny_tokenizer)
    assert (source.n_rollouts, source.has_logprobs) == (18, True)
    (tmp_path / "r.jsonl").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / "r.jsonl") == whole
    with pytest.raises(RequestError, match=r"problem 'long'.* do not fit in the model's context of 64"):
        rollout([{"id": "long", "prompt": "x" * 60}], backend, reward, tmp_path / "long.jsonl", max_new_tokens=12)
