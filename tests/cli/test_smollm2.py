"""The command line on a real pretrained model, SmolLM2-135M-Instruct, as a person types it (`make test-real`).

The model is taught for a few steps to add two one-digit numbers, right in half of the cases and one too high in the
others. The pool's truths are right, or one too high as well; the benchmark's are right. Everything is seeded.

Dimension letters: P problems, G rollouts, T tokens, V vocabulary, W all weights.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import gradstore
from gradstore.demo.real_model import smollm2

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

MODELS = Path(__file__).parents[2] / ".models"
N_TAUGHT, N_POOL, N_BENCHMARK, N_ROLLOUTS = 40, 14, 4, 8
WRONG = "wrong_truth"


def _problems() -> dict[str, list[dict[str, Any]]]:
    """Different sums in every list, of those taught and those of the pool half with a truth that is one too high."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    Random(0).shuffle(sums)
    found, first = {}, 0
    for name, n in (("taught", N_TAUGHT), ("pool", N_POOL), ("bench", N_BENCHMARK)):
        found[name] = []
        for i, (a, b) in enumerate(sums[first : first + n]):
            wrong = name != "bench" and i % 2 == 1
            found[name].append(
                {
                    "id": f"{name}-{i}",
                    "source": "sums",
                    "prompt": [{"role": "user", "content": f"{a} + {b} ="}],
                    "ground_truth": str(a + b + wrong),
                    "tags": [WRONG if wrong else "clean"],
                }
            )
        first += n
    return found


def _gradstore(*arguments: object) -> str:
    """Standard output of a command that succeeds, in a process of its own."""
    command = [sys.executable, "-m", "gradstore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The problems' files, and the model after its cold start in `model`."""
    made = tmp_path_factory.mktemp("smollm2")
    for name, records in _problems().items():
        lines = [json.dumps(record) + "\n" for record in records]
        (made / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    source = smollm2(MODELS / "smollm2", print)
    started = [sys.executable, "-m", "gradstore.demo.cold_start", source, made / "taught.jsonl", made / "model"]
    subprocess.run([*map(str, started), "--steps", "10", "--batch", "8"], check=True)
    return made


@pytest.fixture(scope="module")
def rolled(folder: Path) -> dict[str, dict[str, Any]]:
    """What `rollout` reports of the pool and of the benchmark."""
    sampled = ["--model", folder / "model", "--reward", "math", "-n", N_ROLLOUTS, "--max-new-tokens", 4, "--json"]
    return {
        name: json.loads(
            _gradstore("rollout", folder / f"{name}.jsonl", "--out", folder / f"{name}-rollouts.jsonl", *sampled)
        )
        for name in ("pool", "bench")
    }


@pytest.fixture(scope="module")
def collected(folder: Path, rolled: dict) -> dict[str, dict[str, Any]]:
    """What `collect` reports; the store is `store`."""
    made = ["--model", folder / "model", "--json"]
    return {
        name: json.loads(_gradstore("collect", folder / "store", name, folder / f"{name}-rollouts.jsonl", *made))
        for name in ("pool", "bench")
    }


@pytest.fixture(scope="module")
def exact(folder: Path, rolled: dict) -> dict[str, tuple[float, float]]:
    """Cosine and dot of each live problem's gradient with the benchmark's mean, over all weights, by plain autograd."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def gradient(rows: list[dict[str, Any]]) -> torch.Tensor | None:
        """Of sum_j (r_j - mean r) / G mean_t log p(y_jt), [W] in ascent direction; None where rewards are equal."""
        rewards_G = np.array([row["reward"] for row in rows])
        if np.ptp(rewards_G) == 0:
            return None
        text = tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        model.zero_grad(set_to_none=True)
        for row, advantage in zip(rows, rewards_G - rewards_G.mean(), strict=True):
            if advantage == 0:
                continue
            answer_T = torch.tensor(row["response_ids"])
            logits_TV = model(torch.tensor([prompt + row["response_ids"]])).logits[0, len(prompt) - 1 : -1]
            logprobs_T = logits_TV.log_softmax(-1).gather(1, answer_T[:, None])
            (advantage / len(rows) * logprobs_T.mean()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def groups(name: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for line in (folder / f"{name}-rollouts.jsonl").read_text(encoding="utf-8").splitlines():
            found.setdefault(json.loads(line)["problem_id"], []).append(json.loads(line))
        return found

    of_bench = [gradient(rows) for rows in groups("bench").values()]
    target_W = sum(own for own in of_bench if own is not None) / len(of_bench)
    found = {}
    for name, rows in groups("pool").items():
        own_W = gradient(rows)
        if own_W is not None:
            dot = float(own_W @ target_W)
            found[name] = (dot / float(own_W.norm() * target_W.norm()), dot)
    return found


def test_rollouts_have_a_signal(rolled: dict) -> None:
    """The cold start makes right and wrong answers; a pool without signal would make every test below empty."""
    assert (rolled["pool"]["problems"], rolled["pool"]["rollouts"]) == (N_POOL, N_POOL * N_ROLLOUTS)
    assert rolled["pool"]["with_signal"] >= 6
    assert rolled["bench"]["with_signal"] >= 1


def test_sketches_see_the_gradient_and_rank_as_it_does(
    folder: Path, rolled: dict, collected: dict, exact: dict
) -> None:
    """Coverage is measured, and rows of a kilobyte rank problems as gradients over all 135 million weights do."""
    assert (collected["pool"]["live"], collected["pool"]["failed"]) == (rolled["pool"]["with_signal"], 0)
    assert collected["pool"]["coverage"]["gradient"] >= 0.95
    hits = json.loads(_gradstore("query", folder / "store", "--pool", "pool", "--against", "bench", "--json"))["hits"]
    assert {hit["id"] for hit in hits} == set(exact)
    sketched_P = [hit["score"] for hit in hits]
    exact_P = [exact[hit["id"]][0] for hit in hits]
    assert spearmanr(sketched_P, exact_P)[0] >= 0.9
    assert np.abs(np.array(sketched_P) - exact_P).max() < 0.1


def test_fidelity_says_how_well_rows_rank(folder: Path, collected: dict) -> None:
    """The command's own measure of the same, over the layers that are sketched."""
    found = json.loads(_gradstore("fidelity", folder / "store", *_both(folder), "--json"))
    assert found["n_problems"] == collected["pool"]["live"]
    assert found["spearman"] >= 0.9
    assert found["row_bytes"] <= 1055


def test_probes_agree_with_gradients(folder: Path, collected: dict, exact: dict) -> None:
    """Derivatives from forward passes alone give the dots of gradients over all weights, and their signs."""
    found = json.loads(_gradstore("probe", folder / "store", *_both(folder), "--top", N_POOL, "--json"))
    assert {row["id"] for row in found["best"]} == set(exact)
    dots_P = np.array([row["dot"] for row in found["best"]])
    errors_P = np.array([row["standard_error"] for row in found["best"]])
    exact_P = np.array([exact[row["id"]][1] for row in found["best"]])
    assert np.abs(dots_P - exact_P).max() <= 0.05 * np.abs(exact_P).max()
    known = np.abs(dots_P) > errors_P
    assert known.any()
    assert (np.sign(dots_P[known]) == np.sign(exact_P[known])).all()


def _both(folder: Path) -> list[object]:
    return [
        *("--pool", "pool", "--against", "bench", "--model", folder / "model"),
        *("--rollouts", folder / "pool-rollouts.jsonl", "--benchmark-rollouts", folder / "bench-rollouts.jsonl"),
    ]


def _train(folder: Path, out: str, *more: str) -> list[str]:
    """A round with a budget of 8 of the 14 candidates, and two steps on the three that it picks."""
    options = {
        "--model": folder / "model",
        "--pool": folder / "pool.jsonl",
        "--benchmark": folder / "bench.jsonl",
        "--out": folder / out,
        "--reward": "math",
        "--max-new-tokens": 4,
        "--train-rollouts": N_ROLLOUTS,
        "--save-every": 1,
        "--lr": 1e-5,
    }
    rounds = {"rounds": 1, "steps": 2, "train_batch": 3, "selected": 3, "refresh": 8, "fit_problems": 8}
    rounds |= {"rollouts": N_ROLLOUTS, "target_rollouts": N_ROLLOUTS}
    named = [str(part) for pair in options.items() for part in pair]
    settings = [f"{name}={value}" for name, value in rounds.items()]
    return ["train", *named, "--json", *more, *settings]


def _killed(command: list[str], when: Callable[[], bool]) -> None:
    """Starts a command and kills it with SIGKILL as soon as `when` holds."""
    process = subprocess.Popen([sys.executable, "-m", "gradstore", *command], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not when():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said


def test_a_round_is_recorded_and_goes_on_after_a_kill(folder: Path) -> None:
    """What was picked stands in the store; a run that was killed between its two steps ends with the same weights."""
    facts = json.loads(_gradstore(*_train(folder, "whole")))
    assert (facts["steps"], facts["rounds"]) == (2, 1)
    whole = gradstore.open(folder / "whole" / "store")
    (recorded,) = whole.rounds("pool")
    rows = recorded.table.to_pylist()
    assert len(rows) == N_POOL
    assert sum(row["rolled_out"] for row in rows) == 8
    assert sorted(row["id"] for row in rows if row["picked"] >= 0) == sorted(recorded.picks)
    assert len(recorded.picks) == 3
    assert np.isfinite([row["score"] for row in rows if row["state"] == "live"]).all()
    assert sum(row["state"] == "live" for row in rows) >= 2
    history = whole.history("pool").to_pylist()
    assert {row["id"] for row in history if row["step"] == 1} == set(recorded.picks)

    _killed(_train(folder, "killed"), (folder / "killed" / "checkpoint.pt").exists)
    assert not (folder / "killed" / "model").exists()
    resumed = json.loads(_gradstore(*_train(folder, "killed", "--resume")))
    assert {**resumed, "out": facts["out"]} == facts
    store = gradstore.open(folder / "killed" / "store")
    assert store.verify().ok
    (again,) = store.rounds("pool")
    np.testing.assert_equal(again.table.to_pylist(), rows)  # scores of what was not measured are NaN
    assert store.history("pool").to_pylist() == history
    ended = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert ended[0] == ended[1]
