"""The transformers back end samples from the policy itself and tells each token's log-probability under it.

Dimension suffixes: T tokens, V vocabulary.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore import RequestError
from gradstore.engine.gradients.budget import sampled_tokens
from gradstore.trainer.sampling.backends import Response, decoding, hugging_face, load_backend
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend, weights_digest
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

PROMPTS = [[9], [30, 31, 32, 33, 34, 35, 36], [40, 41, 42], [50, 51], [9, 9, 9, 9]]
SAMPLING: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "top_p": 0.95, "seed": 11}


@pytest.fixture
def backend(tiny_model: Any, tiny_tokenizer: Any) -> TransformersBackend:
    return TransformersBackend(tiny_model, tiny_tokenizer, batch_tokens=400)


def _equal(a: list[list[Response]], b: list[list[Response]]) -> bool:
    return all(
        np.array_equal(x.token_ids, y.token_ids) and np.array_equal(x.logprobs, y.logprobs)
        for group_a, group_b in zip(a, b, strict=True)
        for x, y in zip(group_a, group_b, strict=True)
    )


def _slow_logprobs(model: Any, prompt: list[int], response: np.ndarray) -> np.ndarray:
    """log_softmax of one full forward pass over the sequence alone, without padding or cache."""
    ids_T = torch.tensor([*prompt, *response.tolist()])
    with torch.no_grad():
        logits_TV = model(ids_T[None], use_cache=False).logits[0]
    logprobs_TV = logits_TV.double().log_softmax(-1)
    return logprobs_TV[len(prompt) - 1 : -1].gather(1, ids_T[len(prompt) :, None])[:, 0].numpy()


def test_logprobs_equal_a_full_forward_pass(backend: TransformersBackend, tiny_model: Any) -> None:
    """Importance weights divide by these: padding, cache, temperature or top-p leaking in would bias every gradient."""
    for prompt, group in zip(PROMPTS, backend.generate(PROMPTS, 3, **SAMPLING), strict=True):
        assert len(group) == 3
        for response in group:
            assert response.logprobs.dtype == np.float32
            slow = _slow_logprobs(tiny_model, prompt, response.token_ids)
            np.testing.assert_allclose(response.logprobs, slow, atol=1e-4)


def test_responses_end_in_the_end_token_or_at_the_limit(backend: TransformersBackend, tiny_tokenizer: Any) -> None:
    """The end token is sampled like any other and is paid for: without it no policy learns when to stop."""
    responses = [r for group in backend.generate(PROMPTS, 40, **SAMPLING) for r in group]
    reasons = [r.finish_reason for r in responses]
    assert reasons.count("stop") >= 5
    assert reasons.count("length") >= 5
    for response in responses:
        ends = np.flatnonzero(response.token_ids == tiny_tokenizer.eos_token_id).tolist()
        if response.finish_reason == "stop":
            assert ends == [len(response.token_ids) - 1]
        else:
            assert ends == []
            assert len(response.token_ids) == SAMPLING["max_new_tokens"]
        assert len(response.logprobs) == len(response.token_ids)


def test_same_seed_same_rollouts(backend: TransformersBackend) -> None:
    """A resumed run repeats a chunk; a study repeats a run. And torch's own randomness is left as it was."""
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = backend.generate(PROMPTS, 3, **SAMPLING)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert _equal(first, backend.generate(PROMPTS, 3, **SAMPLING))
    assert not _equal(first, backend.generate(PROMPTS, 3, **SAMPLING | {"seed": 12}))
    texts = {tuple(r.token_ids.tolist()) for group in first for r in group}
    assert len(texts) == 15


def test_responses_belong_to_their_prompts(backend: TransformersBackend, tiny_model: Any) -> None:
    """Sorted by length for speed, responses must come back in the order asked."""
    groups = backend.generate(PROMPTS, 2, **SAMPLING | {"temperature": 0.0, "max_new_tokens": 5})
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(tiny_model(torch.tensor([ids])).logits[0, -1].argmax()))
        for response in group:
            assert response.token_ids.tolist() == ids[len(prompt) :]


def test_models_own_sampling_defaults_do_not_leak(backend: TransformersBackend) -> None:
    """Chat models ship a repetition penalty and top-k of their own: sampled with them, no log-probability is right."""
    before = backend.generate(PROMPTS, 3, **SAMPLING)
    model = copy.deepcopy(backend.model)
    model.generation_config.update(
        top_k=1, repetition_penalty=5.0, temperature=0.01, min_p=0.5, no_repeat_ngram_size=1, max_length=3
    )
    defaults = model.generation_config.to_dict()
    assert _equal(
        before, TransformersBackend(model, backend.tokenizer, batch_tokens=400).generate(PROMPTS, 3, **SAMPLING)
    )
    assert model.generation_config.to_dict() == defaults


def test_every_end_token_of_the_model_ends_a_response(backend: TransformersBackend) -> None:
    """Chat models end a turn with another token than a document: going on past it would sample the user's turn."""
    model = copy.deepcopy(backend.model)
    model.generation_config.eos_token_id = list(range(100, 180))
    groups = TransformersBackend(model, backend.tokenizer).generate(PROMPTS, 4, **SAMPLING)
    for response in (r for group in groups for r in group):
        within = [token for token in response.token_ids if 100 <= token < 180 or token == 1]
        assert response.finish_reason == "stop"
        assert within == [response.token_ids[-1]]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_probabilities_a_part_of_the_rows_at_a_time(monkeypatch: Any, temperature: float, top_p: float) -> None:
    """A vocabulary's probabilities in float64, several times over, are more than a model's keys and values; what is
    drawn must not depend on how many rows are held at once."""
    generator = torch.Generator().manual_seed(0)
    logits_UV = 3 * torch.randn(23, 50, generator=generator)
    row_R = torch.randint(0, 23, (200,), generator=generator).sort().values
    draw_R = torch.rand(200, generator=generator, dtype=torch.float64)
    whole = decoding.chosen(logits_UV, row_R, draw_R, temperature, top_p)
    for entries in (1, 150, 999):
        monkeypatch.setattr(decoding, "_ENTRIES", entries)
        for found, expected in zip(decoding.chosen(logits_UV, row_R, draw_R, temperature, top_p), whole, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("n_vocabulary", [1, 2, 7, 64, 100, 1000, 4099])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.7), (0.0, 1.0)])
def test_tokens_are_where_the_cumulative_distribution_says(n_vocabulary: int, temperature: float, top_p: float) -> None:
    """Against one sum after the other in float64, token by token; with impossible tokens, ties, and draws at both ends.

    A draw within rounding of a boundary may fall on either side, as it may in the model's own logits.
    """
    generator = torch.Generator().manual_seed(n_vocabulary)
    logits_UV = 4 * torch.randn(6, n_vocabulary, generator=generator)
    logits_UV[1, ::2] = float("-inf") if n_vocabulary > 1 else 0.0
    logits_UV[2] = 0.0
    logits_UV[3, n_vocabulary // 2 :] = float("-inf") if n_vocabulary > 1 else 0.0
    row_R = torch.arange(6).repeat_interleave(40)
    draw_R = torch.rand(240, generator=generator, dtype=torch.float64)
    draw_R[::40], draw_R[1::40] = 0.0, 1 - 2**-53
    token_R, logprob_R = decoding.chosen(logits_UV, row_R, draw_R, temperature, top_p)
    for row, draw, token, logprob in zip(
        row_R.tolist(), draw_R.tolist(), token_R.tolist(), logprob_R.tolist(), strict=True
    ):
        logits_V = logits_UV[row].double()
        assert logprob == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=2e-5)
        if not temperature:
            assert token == int(logits_V.argmax())
            continue
        probs_V = (logits_V / temperature).softmax(-1)
        if top_p < 1:
            kept, reached = torch.zeros_like(probs_V), 0.0
            for place in probs_V.argsort(descending=True, stable=True).tolist():
                if reached < top_p:
                    kept[place] = probs_V[place]
                reached += float(probs_V[place])
            if (logits_UV[row] == logits_UV[row, 0]).all():
                kept = probs_V  # which of equal tokens are in the nucleus is anyone's choice
            probs_V = kept / kept.sum()
        assert probs_V[token] > 0
        if top_p == 1 or not (logits_UV[row] == logits_UV[row, 0]).all():
            before = float(probs_V[:token].sum())
            assert before - 1e-6 <= draw <= before + float(probs_V[token]) + 1e-6


def test_sampling_goes_on_after_running_out_of_memory(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rollouts do not depend on their batch: fewer at once are the same rollouts; a later batch does not fail again."""
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 2]]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    undisturbed = backend.generate(prompts, 8, **settings)
    smaller, sizes = TransformersBackend(backend.model, backend.tokenizer), []

    def limited(batch: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return TransformersBackend._decode(smaller, batch, *rest, **named)

    monkeypatch.setattr(smaller, "_decode", limited)
    limit = 7
    found = smaller.generate(prompts, 8, **settings)
    for one, other in zip(found, undisturbed, strict=True):
        assert [a.token_ids.tolist() for a in one] == [b.token_ids.tolist() for b in other]
    assert max(sizes) > limit
    assert "out of memory sampling" in caplog.text
    sizes.clear()
    smaller.generate(prompts, 8, **settings)
    assert max(sizes) <= limit
    limit = 0
    with pytest.raises(RequestError, match=r"one rollout of \d tokens of prompt and 6 of response does not fit"):
        smaller.generate(prompts, 8, **settings)


def test_batches_keep_to_the_token_budget(backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch over the budget is what runs out of memory, after the short ones went well."""
    batches = []
    sample = hugging_face.sample

    def watching(model: Any, prompts: Any, draws_RT: torch.Tensor, *rest: Any, **options: Any) -> Any:
        batches.append((len(draws_RT), max(map(len, prompts)) + SAMPLING["max_new_tokens"]))
        return sample(model, prompts, draws_RT, *rest, **options)

    monkeypatch.setattr(hugging_face, "sample", watching)
    backend.generate(PROMPTS, 7, **SAMPLING)
    assert sum(rollouts for rollouts, _ in batches) == 35
    assert all(rollouts * tokens <= 400 or rollouts == 1 for rollouts, tokens in batches)
    assert len(batches) <= 6


def test_responses_do_not_depend_on_the_batch(backend: TransformersBackend) -> None:
    """A budget chosen for another machine's memory must not change which problems a run picks."""
    whole = TransformersBackend(backend.model, backend.tokenizer).generate(PROMPTS, 5, **SAMPLING)
    for one, other in zip(backend.generate(PROMPTS, 5, **SAMPLING), whole, strict=True):
        for x, y in zip(one, other, strict=True):
            assert np.array_equal(x.token_ids, y.token_ids)
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)


def test_shared_beginnings_leave_the_distribution_as_it_is(backend: TransformersBackend, tiny_model: Any) -> None:
    """Rollouts that begin alike are computed once; each must still be a draw of its own from the policy."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # so sure of itself that most beginnings are shared
    n = 4000
    (group,) = TransformersBackend(model, backend.tokenizer).generate(
        [[9, 40]], n, max_new_tokens=2, temperature=1.0, top_p=1.0, seed=1
    )
    found: dict[tuple[int, ...], int] = {}
    for response in group:
        found[tuple(response.token_ids.tolist())] = found.get(tuple(response.token_ids.tolist()), 0) + 1
    assert len(found) < n / 4
    for ids, count in sorted(found.items(), key=lambda item: -item[1])[:10]:
        expected = float(np.exp(_slow_logprobs(model, [9, 40], np.array(ids)).sum()))
        assert abs(count / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


def test_temperature_and_top_p_are_followed(backend: TransformersBackend, tiny_model: Any) -> None:
    """Sampled from the wrong set of tokens, rollouts are those of another policy than the settings say."""
    with torch.no_grad():
        logits_V = tiny_model(torch.tensor([[9, 40]])).logits[0, -1].double()
    probs_V = (logits_V / 0.3).softmax(-1)
    order = probs_V.argsort(descending=True)
    n_kept = int((probs_V[order].cumsum(0) < 0.6).sum()) + 1
    kept = order[:n_kept].tolist()
    assert n_kept > 1
    (group,) = backend.generate([[9, 40]], 4000, max_new_tokens=1, temperature=0.3, top_p=0.6, seed=1)
    counts = np.bincount([int(r.token_ids[0]) for r in group], minlength=len(probs_V))
    assert set(np.flatnonzero(counts).tolist()) <= set(kept)
    for token in kept[:5]:
        expected = float(probs_V[token] / probs_V[kept].sum())
        assert abs(counts[token] / 4000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)


def test_models_with_other_state_go_through_generate(
    backend: TransformersBackend, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrent state cannot be split by row; such models are served by transformers' own loop, to the same rules."""
    monkeypatch.setattr(hugging_face, "decodes", lambda model: False)
    groups = backend.generate(PROMPTS, 3, **SAMPLING)
    assert _equal(groups, backend.generate(PROMPTS, 3, **SAMPLING))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            slow = _slow_logprobs(tiny_model, prompt, response.token_ids)
            np.testing.assert_allclose(response.logprobs, slow, atol=1e-4)


def test_training_mode_is_left_as_it_was(backend: TransformersBackend) -> None:
    """The embedded trainer hands in the policy it is training; dropout must be off while sampling and on after."""
    model = copy.deepcopy(backend.model).train()
    TransformersBackend(model, backend.tokenizer).generate([[9]], 1, **SAMPLING)
    assert model.training


def test_loaded_from_a_folder(tmp_path: Path, backend: TransformersBackend) -> None:
    backend.model.save_pretrained(tmp_path)
    backend.tokenizer.save_pretrained(tmp_path)
    loaded = load_backend("transformers", tmp_path, device="cpu", dtype="float32", batch_tokens=400)
    assert loaded.context == 128
    assert _equal(loaded.generate(PROMPTS, 2, **SAMPLING), backend.generate(PROMPTS, 2, **SAMPLING))
    settings = loaded.settings()
    assert settings["weights"] == weights_digest(backend.model)
    assert (settings["backend"], settings["dtype"], settings["model"]) == ("transformers", "float32", str(tmp_path))
    with pytest.raises(RequestError, match="there is no such folder"):
        load_backend("transformers", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"no config\.json in this folder"):
        load_backend("transformers", tmp_path / "empty")


def test_digest_tells_policies_apart(backend: TransformersBackend) -> None:
    """A step of training changes the weights and not their names; going on with them would mix two policies."""
    model = copy.deepcopy(backend.model)
    assert weights_digest(model) == weights_digest(backend.model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj" in name).add_(1e-3)
    assert weights_digest(model) != weights_digest(backend.model)


def test_resumed_file_equals_an_undisturbed_one(tmp_path: Path, backend: TransformersBackend) -> None:
    """With a real model, real batches and real random numbers, not only in principle."""
    problems = [{"id": f"p{j}", "prompt": f"{j}+1=" * (1 + j % 3)} for j in range(5)]
    reward = Reward("length", lambda record, response, rollout_index: len(response))

    def run(path: Path) -> bytes:
        rollout(problems, backend, reward, path, n=3, max_new_tokens=12, chunk=2)
        return path.read_bytes()

    whole = run(tmp_path / "r.jsonl")
    for share in (0.1, 0.5, 0.93):
        (tmp_path / "r.jsonl").write_bytes(whole[: int(len(whole) * share)])
        assert run(tmp_path / "r.jsonl") == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(backend: TransformersBackend) -> None:
    """The same properties where the work is really done."""
    model = copy.deepcopy(backend.model).cuda()
    on_gpu = TransformersBackend(model, backend.tokenizer)
    groups = on_gpu.generate(PROMPTS, 3, **SAMPLING)
    assert _equal(groups, on_gpu.generate(PROMPTS, 3, **SAMPLING))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            slow = _slow_logprobs(backend.model, prompt, response.token_ids)
            np.testing.assert_allclose(response.logprobs, slow, atol=1e-3)


def test_batches_as_memory_allows(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Without a setting the tokens follow from the model, and rows of logits are bounded for any vocabulary."""
    backend = TransformersBackend(tiny_model, tiny_tokenizer)
    assert backend.settings()["batch_tokens"] == sampled_tokens(tiny_model)
    most = hugging_face.LOGIT_BYTES // (4 * tiny_model.config.vocab_size)
    backend = TransformersBackend(tiny_model, tiny_tokenizer, batch_tokens=1 << 30)
    rollouts = [(1, 0, j) for j in range(2 * most + 5)]
    assert [len(batch) for batch in backend._batches(rollouts, 1)] == [most, most, 5]
