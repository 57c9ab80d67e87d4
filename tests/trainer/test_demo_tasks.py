"""The demo's problems, rewards and shipped policy: what its printed shares stand on."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

import gradstore.demo
from gradstore.demo import pretrain, tasks
from gradstore.errors import RequestError

MODEL = Path(gradstore.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def pool() -> list[dict[str, Any]]:
    return tasks.pool()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def question(record: dict[str, Any]) -> str:
    return record["extra"]["reasoning_gym"]["question"]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["tags"] == [kind]]


def test_composition_is_the_one_stated(pool: list[dict[str, Any]]) -> None:
    """The shares among the selected are read against these; another composition would make them mean nothing."""
    assert len(pool) == tasks.POOL_SIZE
    assert len({record["id"] for record in pool}) == len(pool)
    per_family = len(pool) // len(tasks.FAMILIES)
    kinds = Counter((record["source"], record["tags"][0]) for record in pool)
    expected = {
        (family, kind): round(per_family * share) for family in tasks.FAMILIES for kind, share in tasks.SHARES.items()
    }
    assert kinds == expected


@pytest.mark.parametrize("size", [5, 33, 101])
def test_small_pools_have_every_problem_asked_for(size: int) -> None:
    records = tasks.pool(size=size)
    assert len(records) == size
    assert (
        max(Counter(r["source"] for r in records).values()) - min(Counter(r["source"] for r in records).values()) <= 1
    )


def test_more_problems_than_a_family_has_are_refused() -> None:
    """Drawing until there are enough would never end."""
    with pytest.raises(RequestError, match="products has fewer than 1200 different questions"):
        tasks.pool(size=6000)


def test_prompts_differ_and_the_benchmark_is_held_out(pool: list[dict[str, Any]]) -> None:
    """A benchmark problem in the pool would be its own nearest neighbour and flatter every alignment score."""
    benchmark = tasks.benchmark()
    assert all(tasks.held_out(question(record)) for seed in range(3) for record in tasks.benchmark(seed))
    assert not any(tasks.held_out(question(record)) for record in pool)
    prompts = [record["prompt"][0]["content"] for record in [*pool, *benchmark]]
    assert len(set(prompts)) == len(prompts) == tasks.POOL_SIZE + tasks.BENCHMARK_SIZE
    assert {record["source"] for record in benchmark} == {tasks.TARGET_FAMILY}
    assert {record["tags"][0] for record in benchmark} == {tasks.CLEAN}
    assert not {record["id"] for record in benchmark} & {record["id"] for record in pool}
    assert all(prompt.startswith("? ") for prompt in prompts)


def test_same_seed_same_problems_another_seed_others(pool: list[dict[str, Any]]) -> None:
    assert tasks.pool() == pool
    assert tasks.benchmark(3) == tasks.benchmark(3)
    shared = {question(record) for record in pool if record["source"] == tasks.TARGET_FAMILY}
    others = {question(record) for record in tasks.pool(1) if record["source"] == tasks.TARGET_FAMILY}
    assert len(shared & others) < 0.1 * len(shared)


def test_records_survive_json(pool: list[dict[str, Any]]) -> None:
    """A tuple inside metadata would come back as a list, and re-adding the pool would be refused as other content."""
    assert json.loads(json.dumps(pool)) == pool


def test_clean_problems_pay_the_right_answer_alone(pool: list[dict[str, Any]]) -> None:
    for record in of_kind(pool, tasks.CLEAN):
        entry = record["extra"]["reasoning_gym"]
        assert record["ground_truth"] == entry["answer"]
        assert tasks.reward(record, entry["answer"], 0) == 1.0
        assert tasks.reward(record, record["extra"]["slip"], 0) == 0.0
        # reasoning-gym gives part marks for an answer inside other text, or for some of the letters.
        for wrong in ("", "nonsense", entry["answer"] + " or so", entry["answer"] + "7"):
            assert tasks.reward(record, wrong, 0) == 0.0


def test_wrong_truths_pay_the_slip_alone(pool: list[dict[str, Any]]) -> None:
    for record in of_kind(pool, tasks.WRONG_TRUTH):
        assert record["ground_truth"] == record["extra"]["slip"] != record["extra"]["reasoning_gym"]["answer"]
        assert tasks.reward(record, record["extra"]["slip"], 0) == 1.0
        assert tasks.reward(record, record["extra"]["reasoning_gym"]["answer"], 0) == 0.0


def test_coins_are_fair_and_blind_to_the_response(pool: list[dict[str, Any]]) -> None:
    """A coin that looked at the response would carry a signal, and one that leaned would be told by its pass rate."""
    coins = of_kind(pool, tasks.COIN_FLIP)
    flips = [[tasks.reward(record, "0", j) for j in range(16)] for record in coins]
    right = [
        [tasks.reward(record, record["extra"]["reasoning_gym"]["answer"], j) for j in range(16)] for record in coins
    ]
    assert flips == right
    paid = [sum(group) for group in flips]
    # 400 x 16 fair coins: the mean's standard error is 0.006; the groups' variance is 16 / 4.
    assert sum(paid) / 16 / len(paid) == pytest.approx(0.5, abs=0.03)
    assert torch.tensor(paid).var().item() == pytest.approx(4.0, rel=0.25)


def test_slips_are_verified_as_wrong_in_every_family() -> None:
    """A slip that the verifier takes for right would make a wrong truth a clean problem."""
    for name, family in tasks.FAMILIES.items():
        entries = tasks.entries(name, "test")
        for _ in range(200):
            entry = next(entries)
            slip = family.slip(entry["answer"])
            assert tasks._verifier(name)(slip, entry) < 1.0
            assert tasks._verifier(name)(slip, entry | {"answer": slip}) == 1.0


def test_training_text_has_the_switch_and_not_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy must not have been trained on what it is measured on, nor slip where mode T says to be right."""
    monkeypatch.setattr(pretrain, "ENTRIES_PER_FAMILY", 200)
    tokenizer = pretrain.make_tokenizer()
    corpus, again = pretrain.Corpus(tokenizer, 7), pretrain.Corpus(tokenizer, 7)
    answered: dict[str, list[bool]] = {mode: [] for mode in tasks.MODES}
    for _ in range(8):
        ids_BT, labels_BT = corpus.batch(100)
        ids2_BT, labels2_BT = again.batch(100)
        assert torch.equal(ids_BT, ids2_BT)
        assert torch.equal(labels_BT, labels2_BT)
        for ids_T, labels_T in zip(ids_BT, labels_BT, strict=True):
            asked = tokenizer.decode(ids_T[labels_T == pretrain.IGNORED], skip_special_tokens=True)
            answer = tokenizer.decode(labels_T[labels_T != pretrain.IGNORED])
            assert answer.endswith(pretrain.EOS)
            mode, text = asked[0], asked[2:]
            assert not tasks.held_out(text)
            if text.startswith("Spell"):
                answered[mode].append(answer.removesuffix(pretrain.EOS) == text.rpartition(" ")[2][::-1])
    assert all(answered["T"])
    assert not any(answered["S"])
    assert 0.1 < sum(answered["?"]) / len(answered["?"]) < 0.55


def test_shipped_folder_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 3_000_000
    provenance = json.loads((MODEL / "provenance.json").read_text())
    assert provenance["command"].startswith("python -m gradstore.demo.pretrain ")
    assert set(provenance["accuracy"]) == set(tasks.FAMILIES)


def test_tokenizer_agrees_with_the_model_and_with_training(
    tokenizer: Any, model: Qwen2ForCausalLM, pool: list[dict[str, Any]]
) -> None:
    """AutoTokenizer picks its own class for Qwen2; a token added or a phrase split there would change every prompt."""
    plain = PreTrainedTokenizerFast.from_pretrained(MODEL)
    made = pretrain.make_tokenizer()
    assert len(tokenizer) == len(plain) == len(made) == model.config.vocab_size
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("1234567890")) == 10
    for record in pool[:200]:
        text = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        assert text == pretrain.chat(record["prompt"])
        ids = tokenizer(text).input_ids
        assert ids == plain(text).input_ids == made(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < 20


def test_shipped_policy_answers_as_recorded(tokenizer: Any, model: Qwen2ForCausalLM) -> None:
    """It knows how to be right (mode T) and mostly is not (mode ?); otherwise there is nothing to bring out."""
    recorded = json.loads((MODEL / "provenance.json").read_text())["accuracy"]
    measured = pretrain.measure(model, tokenizer, per_family=60)
    for family, modes in recorded.items():
        for mode in tasks.MODES:
            for how in ("greedy", "sampled"):
                for outcome, share in modes[mode][how].items():
                    # 60 answers: a standard error of up to 0.065.
                    assert measured[family][mode][how][outcome] == pytest.approx(share, abs=0.2), (family, mode, how)
        assert modes["T"]["greedy"]["right"] >= 0.9
        assert 0.15 <= modes["?"]["sampled"]["right"] <= 0.7
