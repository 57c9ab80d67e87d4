"""`gradstore train --backend local` from problem files to a trained model."""

import json
from pathlib import Path

import pytest

import gradstore
from gradstore.attachments import read_coverage
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Reference, objective
from gradstore.engine.gradients.coverage import Coverage, LeftOut
from gradstore.engine.gradients.models import load_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.strip() == ground_truth)
"""

SETTINGS = [
    *("chunk_size=30", "k=5", "train_batch_size=6", "iters_per_select=2", "num_selections=2"),
    *("n_samples_train=8", "n_samples_val=8", "mode=sim", "fit_problems=20"),
    "accept_coverage=0.8",  # a vocabulary this small leaves much to the embedding's lookup
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, records in {"pool": tasks.pool(0, 40), "sums": tasks.benchmark(0, 8)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def _arguments(files: Path, *more: str) -> list[str]:
    options = {
        "--model": MODEL,
        "--pool": files / "pool.jsonl",
        "--benchmark": files / "sums.jsonl",
        "--out": files / "run",
        "--reward": f"{files / 'reward.py'}:compute_score",
        "--max-new-tokens": 8,
        "--train-rollouts": 8,
        "--lr": 1e-4,
    }
    return ["train", *(str(part) for pair in options.items() for part in pair), *more]


def test_trains_and_goes_on(cli, files: Path) -> None:
    """What a person types: GradAlign's names, a second call that refuses to overwrite, --resume that finds it done."""
    first = cli(*_arguments(files, "--json"), *SETTINGS)
    assert first[0] == 0, first[2]
    facts = json.loads(first[1])
    assert (facts["steps"], facts["rounds"]) == (4, 2)
    store = gradstore.open(files / "run" / "store")
    assert facts["coverage"] == read_coverage(store.path)
    assert 0.8 < facts["coverage"]["gradient"] <= 1
    assert [len(found.picks) for found in store.rounds("pool")] == [6, 6]
    assert {2, 3} <= set(store.history("pool")["step"].to_pylist())  # the training rollouts were sketched too
    kinds = [json.loads(line)["kind"] for line in (files / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [kinds.count(kind) for kind in ("selection", "round", "step")] == [2, 2, 4]
    assert (files / "run" / "model" / "model.safetensors").exists()

    again = cli(*_arguments(files), *SETTINGS)
    assert again[0] == 2
    assert "--resume" in again[2]
    assert len(again[2].splitlines()) == 1
    done = cli(*_arguments(files, "--resume", "--json"), *SETTINGS)
    assert done[0] == 0, done[2]
    assert json.loads(done[1]) == facts


def test_too_little_coverage_is_refused(cli, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what is left out and the setting that accepts it; the same folder can be used again."""
    little = Coverage(0.5, 0.906, 8, (LeftOut("model.mystery.weight", 0.5, 0.094),))
    monkeypatch.setattr("gradstore.trainer.local.policy.measure", lambda *given: little)
    found = cli(*_arguments(files), *SETTINGS[:-1])
    assert found[0] == 2
    (line,) = [line for line in found[2].splitlines() if "accept" in line]
    assert "left out: model.mystery.weight (9.4%)" in line
    assert line.endswith("accept it: round setting accept_coverage=0.9")
    assert not (files / "run" / "store").exists()
    found = cli(*_arguments(files), *SETTINGS[:-1], "accept_coverage=0.9")
    assert found[0] == 0, found[2]
    assert little.sentence() in found[2]


def test_adapters(cli, files: Path) -> None:
    """With LoRA the base stays as it is on disk and only the adapter is written."""
    found = cli(*_arguments(files, "--lora-rank", "2"), *SETTINGS)
    assert found[0] == 0, found[2]
    assert (files / "run" / "model" / "adapter_model.safetensors").exists()
    assert not (files / "run" / "model" / "model.safetensors").exists()


def test_a_kl_term_in_updates_and_sketches(cli, files: Path) -> None:
    """LearnAlign in rounds: warm up, choose once, by gradients with a KL term to the model that training began from."""
    learnalign = [*SETTINGS[:-3], SETTINGS[-1], "mode=learnalign", "warm_up=1", "once=true", "fit_problems=20"]
    found = cli(*_arguments(files, "--kl-beta", "0.5", "--json"), *learnalign)
    assert found[0] == 0, found[2]
    store = gradstore.open(files / "run" / "store")
    rule = store.fingerprint["objective"]
    digest = Reference(load_model(MODEL, device="cpu")).digest
    assert rule == objective("grpo", kl_beta=0.5, reference=digest).as_dict()
    assert [found.about["warm_up"] for found in store.rounds("pool")] == [True, False]
    other = cli(*_arguments(files, "--kl-beta", "0.1", "--resume"), *learnalign)
    assert other[0] == 2
    probes = cli(*_arguments(files, "--kl-beta", "0.5", "--out", str(files / "other")), *SETTINGS[:-3], "mode=lcb")
    assert probes[0] == 2
    assert "leave kl_beta out" in probes[2]
    assert not (files / "other").exists()


def test_options_that_verl_would_not_see_are_refused(cli) -> None:
    """A seed that goes nowhere is worse than an error."""
    status, _, error = cli("train", "--backend", "verl", "--seed", "3", "--lr", "1e-5", "data.train_files=x")
    assert status == 2
    assert "--seed, --lr: only for --backend local" in error
