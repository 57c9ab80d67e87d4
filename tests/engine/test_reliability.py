"""How far a ranking repeats itself, and how faithful stored sketches are to the exact one."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr

import gradstore
from gradstore.engine import Sketcher, SketchSpec, collect
from gradstore.engine.assessing.fidelity import agreement, fidelity
from gradstore.engine.assessing.split_half import (
    exact_scores,
    permuted,
    reliability,
    sketch_scores,
    spearman_brown,
    split,
    split_half,
)
from gradstore.engine.gradients.exact import exact_dots, layer_gradients
from gradstore.engine.rollouts import Group, read_rollouts
from gradstore.errors import RequestError


def test_halves_are_the_even_and_the_odd_rollouts(make_groups) -> None:
    """A rollout in both halves, or in none, would make the reliability a number about something else."""
    (group,) = make_groups(1, n_rollouts=5, logprobs=True)
    (even,), (odd,) = split([group])
    for half, places in ((even, (0, 2, 4)), (odd, (1, 3))):
        assert half.problem_id == group.problem_id
        assert [r.tolist() for r in half.responses] == [group.responses[j].tolist() for j in places]
        assert half.rewards.tolist() == [group.rewards[j] for j in places]
        assert [x.tolist() for x in half.logprobs] == [group.logprobs[j].tolist() for j in places]


def test_spearman_brown_predicts_the_doubled_measurement() -> None:
    """True scores of variance 1, noise of variance 3 a half: halves correlate at 1/4, wholes at 1 / (1 + 3/2) = 0.4."""
    random = np.random.default_rng(0)
    truth = random.normal(size=200_000)
    even, odd = (truth + random.normal(0, 3**0.5, truth.shape) for _ in range(2))
    found = split_half(even, odd)
    assert found.pearson == pytest.approx(1 / 4, abs=0.01)
    assert found.reliability == pytest.approx(0.4, abs=0.01)
    again = [truth + random.normal(0, 1.5**0.5, truth.shape) for _ in range(2)]
    assert found.reliability == pytest.approx(np.corrcoef(*again)[0, 1], abs=0.01)
    assert found.spearman == pytest.approx(spearmanr(even, odd)[0])
    assert spearman_brown(1.0) == 1.0
    assert np.isnan(spearman_brown(-1.0))


def test_shuffled_rewards_keep_everything_but_their_order(make_groups) -> None:
    """The floor must have the same pass rates and responses, be drawn from a seed, and not depend on the neighbours."""
    groups = make_groups(20, n_rollouts=8)
    shuffled = permuted(groups, 7)
    for before, after in zip(groups, shuffled, strict=True):
        assert sorted(before.rewards) == sorted(after.rewards)
        assert after.responses is before.responses
    assert any((a.rewards != b.rewards).any() for a, b in zip(groups, shuffled, strict=True))
    alone = permuted([groups[11]], 7)
    assert alone[0].rewards.tolist() == shuffled[11].rewards.tolist()
    other = permuted(groups, 8)
    assert any((a.rewards != b.rewards).any() for a, b in zip(shuffled, other, strict=True))


def test_a_score_that_repeats_is_reliable_and_noise_is_not(make_groups) -> None:
    """The end points: a score of the prompt alone agrees with itself, one drawn at random does not."""
    groups = make_groups(60, n_rollouts=4)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(4))

    def of_the_prompt(parts):
        return np.array([np.nan if g.problem_id == "flat" else g.prompt_ids.sum() for g in parts], float)

    found = reliability(of_the_prompt, [*groups, flat], permutations=2)
    assert found.halves.reliability == pytest.approx(1.0)
    assert found.standard_error == 0.0
    assert np.isnan(found.scores[-1])
    assert np.isnan(found.standard_errors[-1])
    assert len(found.floor) == 120
    random = np.random.default_rng(0)
    noisy = reliability(lambda parts: random.normal(size=len(parts)), groups)
    assert abs(noisy.halves.spearman) < 0.4
    assert noisy.standard_error == pytest.approx(1 / 2**0.5, rel=0.25)  # half the difference of two unit normals
    assert noisy.noise_floor == pytest.approx(1.96, rel=0.4)
    json.dumps(noisy.describe())


def test_scores_of_sketches_and_exact_ones(make_model, make_groups) -> None:
    """With bases as wide as the layers both are the same cosines, so the reliabilities must agree too."""
    model, groups = make_model("llama"), make_groups(6)
    spec = SketchSpec(rank=64, modules=("q_proj", "down_proj"))
    sketcher = Sketcher(model, spec)
    target = layer_gradients(model, groups[:2], spec)
    vector = np.concatenate([matrix.numpy().ravel() for matrix in target.matrices])
    by_sketch = reliability(sketch_scores(sketcher, vector), groups)
    exactly = reliability(exact_scores(model, target, spec), groups)
    assert by_sketch.scores == pytest.approx(exactly.scores, abs=1e-5)
    assert by_sketch.halves.pearson == pytest.approx(exactly.halves.pearson, abs=1e-4)
    assert by_sketch.noise_floor == pytest.approx(exactly.noise_floor, abs=1e-5)
    dots = exact_scores(model, target, spec, "dot")(groups)
    assert dots == pytest.approx(sketch_scores(sketcher, vector, "dot")(groups), rel=1e-4)


def test_what_cannot_be_split_is_refused(make_groups) -> None:
    """One rollout has no halves; two problems have no correlation."""
    (single,) = make_groups(1, n_rollouts=2)
    with pytest.raises(RequestError, match="has one rollout"):
        reliability(lambda parts: np.zeros(len(parts)), [Group("x", single.prompt_ids, single.responses[:1], [1.0])])
    with pytest.raises(RequestError, match="at least 3 live problems"):
        reliability(lambda parts: np.zeros(len(parts)), make_groups(2))


def test_agreement_of_rankings() -> None:
    """Overlaps count the same problems, whatever their order within the top."""
    exact = np.arange(40.0)
    found = exact.copy()
    found[[39, 0]] = found[[0, 39]]
    ids = [f"p{i:02d}" for i in range(40)]
    same = agreement(exact, exact, ids)
    assert (same.spearman, same.top_5_percent, same.k, same.top_k) == (pytest.approx(1.0), 1.0, 4, 1.0)
    swapped = agreement(found, exact, ids, 3)
    assert swapped.top_5_percent == 0.5
    assert swapped.top_k == pytest.approx(2 / 3)


@pytest.fixture
def made(tmp_path, make_model, make_groups):
    """A store of a wide random sketch with what it was made from: model, rollout files of pool and benchmark."""
    model = make_model("qwen2")
    for name, seed in (("pool", 0), ("benchmark", 1)):
        rows = [
            {
                "problem_id": group.problem_id,
                "prompt": "?",
                "prompt_ids": group.prompt_ids.tolist(),
                "response_ids": response.tolist(),
                "reward": float(reward),
            }
            for group in make_groups(60, seed=seed)
            for response, reward in zip(group.responses, group.rewards, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sketcher = Sketcher(model, SketchSpec(rank=48))
    store = gradstore.create(tmp_path / "store", dim=sketcher.dim, fingerprint=sketcher.fingerprint, dtype="fp32")
    for name in ("pool", "benchmark"):
        rollouts = read_rollouts(tmp_path / f"{name}.jsonl")
        collect(store, name, rollouts, sketcher=sketcher, step=0, accept_coverage=0.0)
    return tmp_path, store, model


def test_fidelity_of_a_store(made, make_groups) -> None:
    """Sides kept whole but for the widest ones must rank nearly as exact scores do, on the sampled problems."""
    folder, store, model = made
    sources = [read_rollouts(folder / f"{name}.jsonl") for name in ("pool", "benchmark")]
    found = fidelity(store, "pool", "benchmark", model, *sources, sample=None)
    assert found.agreement.n_problems == 60
    assert found.agreement.spearman > 0.95
    assert found.row_bytes == store.row_bytes
    groups = list(sources[0].groups())
    target = layer_gradients(model, list(sources[1].groups()))
    even, odd = (np.nan_to_num(exact_dots(model, half, target, norms=True).cosines[:, 0]) for half in split(groups))
    assert found.halves.spearman == pytest.approx(spearmanr(even, odd)[0])
    fewer = fidelity(store, "pool", "benchmark", model, *sources, sample=5, halves=False)
    assert fewer.agreement.n_problems == 5
    assert fewer.halves is None


def test_fidelity_needs_the_pools_rollouts(made) -> None:
    """Rollouts of another pool would measure nothing."""
    folder, store, model = made
    rows = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    (folder / "other.jsonl").write_text(
        "".join(json.dumps({**r, "problem_id": "x" + r["problem_id"]}) + "\n" for r in rows)
    )
    sources = [read_rollouts(folder / f"{name}.jsonl") for name in ("other", "benchmark")]
    with pytest.raises(RequestError, match="'pool': 0 live problems have rollouts"):
        fidelity(store, "pool", "benchmark", model, *sources)


def test_the_command(made) -> None:
    """As a script would call it."""
    folder, _, model = made
    model.save_pretrained(folder / "model")
    from gradstore.demo.pretrain import make_tokenizer

    make_tokenizer().save_pretrained(folder / "model")
    command = "fidelity store --pool pool --against benchmark --model model"
    files = "--rollouts pool.jsonl --benchmark-rollouts benchmark.jsonl --json"
    found = subprocess.run(
        [sys.executable, "-m", "gradstore", *command.split(), *files.split()],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts["n_problems"] == 60
    assert facts["spearman"] > 0.95
    assert -1 <= facts["reliability"]["spearman"] <= 1
