"""Suspicious rewards: planted ones found, every number against a loop, and the demo's broken rewards."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

import gradstore
from gradstore.analysis import suspicion
from gradstore.analysis.suspicion import COLUMNS, WEIGHTS, auc, detection, suspicious
from gradstore.errors import RequestError


@pytest.fixture
def planted(make_history):
    """300 problems of three sources; a fifth with the sign of the rest turned round, a fifth with noise alone."""
    random = np.random.default_rng(0)
    signs = np.ones(300)
    kinds = random.permutation(300)
    signs[kinds[:60]], signs[kinds[60:120]] = -1.0, 0.0
    typical = np.where(signs == 0, 0.5, np.where(signs > 0, 0.3, 0.7))
    rates = np.clip(typical + 0.1 * random.normal(size=300), 0.05, 0.95)
    history = make_history(0.4 * signs[None], source_signs=signs, noise=0.15, rates_SP=rates[None])
    history.bad = {name for name, sign in zip(history.ids, signs, strict=True) if sign <= 0}
    return history


def test_planted_corruption_is_found(planted) -> None:
    frame = suspicious(planted.store, "pool", "bench")
    assert list(frame.columns) == COLUMNS
    found = detection(frame, planted.bad)
    assert found["auc"] > 0.97
    assert found["base"] == pytest.approx(0.4)
    bad = frame["id"].isin(planted.bad).to_numpy()
    assert found["auc"] == pytest.approx(roc_auc_score(bad, frame["suspicion"]))
    assert found["precision"] == pytest.approx(bad[:120].mean())
    assert found["precision_10"] == pytest.approx(bad[:30].mean())
    without = suspicious(planted.store, "pool")
    assert without["score"].isna().all()
    assert detection(without, planted.bad)["auc"] > 0.95


def test_every_number_is_that_of_a_loop(planted) -> None:
    frame = suspicious(planted.store, "pool", "bench").set_index("id")
    rows = planted.rows_SPD[0]
    own, coin, pull = {}, {}, {}
    for p, name in enumerate(planted.ids):
        same = [q for q in range(300) if planted.sources[q] == planted.sources[p]]
        mean = np.mean([rows[q] for q in same if q != p], axis=0)
        own[name] = rows[p] @ mean / np.linalg.norm(mean) / np.median([np.linalg.norm(rows[q]) for q in same])
        coin[name] = -abs(np.float32(planted.rates_SP[0, p]) - 0.5)
        pull[name] = planted.cosine(0, p) * np.linalg.norm(rows[p])
    assert frame["own"].to_dict() == pytest.approx(own, abs=1e-5)
    cosines = {name: planted.cosine(0, p) for p, name in enumerate(planted.ids)}
    assert frame["score"].to_dict() == pytest.approx(cosines, abs=1e-5)
    expected = {}
    for source in set(planted.sources):
        names = [name for p, name in enumerate(planted.ids) if planted.sources[p] == source]
        parts = [(1.0, [-own[n] for n in names]), (0.25, [coin[n] for n in names])]
        if sum(pull[n] for n in names) > 0:
            parts.append((0.25, [-pull[n] for n in names]))
        total = sum(weight * (rankdata(values) - 0.5) / len(names) for weight, values in parts)
        expected |= dict(zip(names, total / sum(weight for weight, _ in parts), strict=True))
    assert frame["suspicion"].to_dict() == pytest.approx(expected, abs=0.02)
    assert frame["rank"].tolist() == list(range(1, 301))
    assert frame["suspicion"].is_monotonic_decreasing


@pytest.mark.parametrize("dtype", ["int8", "fp32"])
def test_pulls_of_large_sources_are_those_of_a_loop(tmp_path, monkeypatch, dtype: str) -> None:
    """Products with stored rows replace decoded rows in large sources: also where one problem is most of its source,
    where a source has one problem, and where its gradients cancel out."""
    monkeypatch.setattr(suspicion, "_MANY", 2)
    random = np.random.default_rng(0)
    rows = random.standard_normal((60, 16))
    rows[0] *= 1e4
    rows[40], rows[41] = rows[42] * 2, -rows[42] * 3  # with 42 they cancel out
    sources = ["large"] * 40 + ["cancel"] * 3 + ["other"] * 16 + ["alone"]
    store = gradstore.create(tmp_path / "s", dim=16, fingerprint={}, dtype=dtype)
    store.add_problems("pool", [{"id": str(i), "prompt": "?", "source": name} for i, name in enumerate(sources)])
    with store.writer("pool", step=0) as writer:
        writer.append([str(i) for i in range(60)], rows.astype(np.float32))
    view = store.view("pool")
    found = suspicion.own_pull(view, view.live_positions)
    stored = view.rows(np.arange(60)).astype(np.float64) * view.norms[:, None]
    for i, name in enumerate(sources[:-1]):
        mine = [j for j, other in enumerate(sources) if other == name]
        others = stored[[j for j in mine if j != i]].sum(axis=0)
        wanted = stored[i] @ others / np.linalg.norm(others) / np.median(view.norms[mine])
        assert found[i] == pytest.approx(wanted, rel=1e-4, abs=1e-4 * np.linalg.norm(stored[i]))
    assert np.isnan(found[59])


def test_halves_and_p_values_count_where_probes_are_stored(planted) -> None:
    """Rewards unrelated to the derivatives: large p-values, and suspicion by them alone finds the planted ones."""
    random = np.random.default_rng(1)
    rewards = [np.float32(random.permutation(np.arange(16) % 2)) for _ in range(300)]
    slopes = [0.0 if name in planted.bad else 2.0 for name in planted.ids]
    derivatives = [slope * r + random.normal(size=16) for slope, r in zip(slopes, rewards, strict=True)]
    planted.store.probes("pool").add(
        planted.ids,
        derivatives,
        rewards,
        [np.full(16, 5)] * 300,
        step=0,
        target="bench",
        objective={"advantage": "mean", "aggregation": "seq-mean-token-mean"},
    )
    frame = suspicious(planted.store, "pool", "bench", weights={"p_value": 1.0})
    assert detection(frame, planted.bad)["auc"] > 0.9
    whole = suspicious(planted.store, "pool", "bench")
    assert whole["disagreement"].notna().all()
    assert whole["p_value"].between(0, 1).all()


def test_auc_is_the_textbook_one() -> None:
    random = np.random.default_rng(0)
    scores, bad = random.integers(0, 9, 200).astype(float), random.random(200) < 0.3
    assert auc(scores, bad) == pytest.approx(roc_auc_score(bad, scores))
    assert np.isnan(auc(scores, np.zeros(200, bool)))


def test_wrong_requests_are_named(planted) -> None:
    with pytest.raises(RequestError, match="colour"):
        suspicious(planted.store, "pool", "bench", weights={"colour": 1.0})
    with pytest.raises(RequestError, match="no evidence"):
        suspicious(planted.store, "pool", "bench", weights=dict.fromkeys(WEIGHTS, 0.0))
    with pytest.raises(RequestError, match="nothing"):
        suspicious(planted.store, "pool", "nothing")


@pytest.mark.slow
def test_the_demos_broken_rewards_are_found_at_16_rollouts(tmp_path: Path) -> None:
    """Wrong ground truths and coin flips of the demo's pool, from one step of 16 rollouts: AUC of 0.9 or more.

    A fifth of the pool, drawn with a seed other than those the weights were chosen on.
    """
    from benchmarks.suspicion import measure

    found = measure(tmp_path, seed=5, n_pool=400)
    assert found["all"]["auc"] >= 0.9
    assert found["wrong_truth"]["auc"] >= 0.95
    assert found["coin_flip"]["auc"] >= 0.8
