"""The judges against slow definitions, and the digits task against plain autograd and plain training."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from benchmarks.digits import DigitsTask, folded
from gradstore.analysis.evaluation.brittleness import brittleness
from gradstore.analysis.evaluation.lds import lds, random_subsets
from gradstore.analysis.evaluation.mislabel import mislabel_auc
from gradstore.analysis.evaluation.scores import score_matrix, self_influence
from gradstore.analysis.evaluation.tail_patch import tail_patch
from gradstore.errors import RequestError

SMALL = DigitsTask(n_train=120, n_test=20, hidden=8, steps=30)


def plain_logits(task: DigitsTask, inputs: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    hidden = torch.tanh(inputs[:, :64] @ weights[0][:, :64].T + weights[0][:, 64])
    return hidden @ weights[1][:, : task.hidden].T + weights[1][:, task.hidden]


def test_batched_training_is_plain_training() -> None:
    """Each model of a batch equals a model trained alone by torch's SGD on its own images."""
    subsets = random_subsets(120, 3, 0.5)
    first, second = SMALL.train(subsets)
    start = SMALL.train(np.ones((1, 120), bool))
    images, labels, tests, truths = SMALL.data
    assert np.isfinite(start[0].numpy()).all()
    for m in range(3):
        weights = [weight[0].clone().requires_grad_() for weight in SMALL._start]
        optimizer = torch.optim.SGD(
            weights, lr=SMALL.learning_rate, momentum=SMALL.momentum, weight_decay=SMALL.weight_decay
        )
        inside = torch.tensor(subsets[m])
        for _ in range(SMALL.steps):
            optimizer.zero_grad()
            logits = plain_logits(SMALL, images[inside], weights)
            torch.nn.functional.cross_entropy(logits, labels[inside]).backward()
            optimizer.step()
        torch.testing.assert_close(first[m], weights[0].detach())
        torch.testing.assert_close(second[m], weights[1].detach())
        expected = torch.log_softmax(plain_logits(SMALL, tests, weights), dim=1)[torch.arange(20), truths]
        np.testing.assert_allclose(SMALL.outputs((first, second))[m], expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(SMALL.retrain(subsets, at_once=2), SMALL.outputs((first, second)), rtol=1e-9)


def test_gradients_are_those_of_autograd() -> None:
    cores = SMALL.cores("test")
    _, _, tests, truths = SMALL.data
    for q in (0, 7, 19):
        weights = [weight[0].clone().requires_grad_() for weight in SMALL.whole]
        torch.log_softmax(plain_logits(SMALL, tests[q : q + 1], weights), dim=1)[0, truths[q]].backward()
        expected = torch.cat([weight.grad.flatten() for weight in weights]).numpy()
        np.testing.assert_allclose(cores[q], expected, atol=1e-10)


def test_projection_keeps_products_and_layers_apart() -> None:
    """The count sketch is linear, and products of sketches are those of gradients up to its noise."""
    projection = SMALL.projection(512)
    cores = SMALL.cores()
    sketches = folded(projection, cores)
    np.testing.assert_allclose(folded(projection, 2 * cores[:1] - cores[1:2]), 2 * sketches[:1] - sketches[1:2])
    exact, found = cores @ cores.T, sketches @ sketches.T
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.97
    (_, start, stop), _ = projection.layout
    alone = cores.copy()
    alone[:, SMALL.hidden * 65 :] = 0
    np.testing.assert_allclose(folded(projection, alone)[:, start:stop], sketches[:, start:stop])


def test_scores_are_those_of_the_rows(tmp_path) -> None:
    store = SMALL.store(tmp_path / "store", dim=64)
    projection = SMALL.projection(64)
    train, test = (folded(projection, SMALL.cores(name)) for name in ("train", "test"))
    ids, queries, dot = score_matrix(store, "train", "test", "dot")
    assert (ids[3], queries[4]) == ("train-3", "test-4")
    np.testing.assert_allclose(dot, test @ train.T, rtol=1e-4, atol=1e-6 * np.abs(dot).max())
    moment = train.T @ train / len(train)
    damped = moment + 0.1 * np.trace(moment) / 64 * np.eye(64)
    solved = np.linalg.solve(damped, train.T)
    _, _, fisher = score_matrix(store, "train", "test", "fisher")
    np.testing.assert_allclose(fisher, test @ solved, rtol=1e-3, atol=1e-4 * np.abs(fisher).max())
    expected = np.einsum("pd,dp->p", train, solved)
    np.testing.assert_allclose(self_influence(store, "train"), expected, rtol=1e-3)


def test_lds_is_the_mean_rank_correlation() -> None:
    random = np.random.default_rng(0)
    scores, subsets = random.normal(size=(4, 50)), random_subsets(50, 12, 0.4, seed=2)
    outputs = random.normal(size=(12, 4))
    expected = [spearmanr([scores[q][row].sum() for row in subsets], outputs[:, q])[0] for q in range(4)]
    np.testing.assert_allclose(lds(scores, subsets, outputs), expected)
    assert lds(scores, subsets, subsets @ scores.T) == pytest.approx(1)
    assert (subsets.sum(axis=1) == 20).all()
    assert len({row.tobytes() for row in subsets}) == 12
    with pytest.raises(RequestError, match="do not fit"):
        lds(scores, subsets[:, :10], outputs)


def test_mislabel_auc_is_the_textbook_one() -> None:
    random = np.random.default_rng(0)
    scores, wrong = random.normal(size=80), random.random(80) < 0.2
    assert mislabel_auc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))
    with pytest.raises(RequestError, match="nothing to tell apart"):
        mislabel_auc(scores, np.ones(80, bool))


def test_removal_and_steps_of_a_linear_task() -> None:
    """Where outputs are sums of known effects, the figures are those sums."""
    effects = np.random.default_rng(0).normal(size=(3, 40))
    frame = brittleness(effects, lambda sets: sets @ effects.T, [5], seed=1)
    out = np.random.default_rng([1, 5]).choice(40, 5, replace=False)
    for q, row in frame.iterrows():
        best = np.sort(effects[q])[-5:].sum()
        assert row["whole"] == pytest.approx(effects[q].sum())
        assert row["without_best"] == pytest.approx(effects[q].sum() - best)
        assert row["effect"] == pytest.approx(best - effects[q][out].sum())
    patched = tail_patch(effects, lambda places: effects[:, places].mean(axis=1), 5, repeats=3)
    for q, row in patched.iterrows():
        assert row["best"] == pytest.approx(np.sort(effects[q])[-5:].mean())
        assert row["worst"] == pytest.approx(np.sort(effects[q])[:5].mean())
        assert row["effect"] == pytest.approx(row["best"] - row["random"])
    with pytest.raises(RequestError, match="1 to 39"):
        brittleness(effects, lambda sets: sets @ effects.T, [40])
    with pytest.raises(RequestError, match="at least 1 and at most 40"):
        tail_patch(effects, lambda places: effects[:, places].mean(axis=1), 0)


def test_a_step_is_a_step_and_is_undone() -> None:
    """The gain of one small step on an image is the product of gradients; the trained model stays as it is."""
    before = SMALL.outputs(SMALL.whole)
    gain = SMALL.patch(np.array([5]), rate=1e-5)
    expected = 1e-5 * SMALL.cores("test") @ SMALL.cores()[5]
    np.testing.assert_allclose(gain, expected, rtol=1e-2, atol=1e-9)
    np.testing.assert_array_equal(SMALL.outputs(SMALL.whole), before)


def test_scores_know_what_training_did(tmp_path) -> None:
    """On a small task with exact retraining fisher beats dot, and both beat chance; wrong labels are found."""
    task = DigitsTask(n_train=300, n_test=40, hidden=16, steps=100)
    subsets = random_subsets(300, 24)
    outputs = task.retrain(subsets)
    store = task.store(tmp_path / "store", dim=128)
    found = {
        metric: lds(score_matrix(store, "train", "test", metric)[2], subsets, outputs).mean()
        for metric in ("dot", "fisher")
    }
    assert found["fisher"] > found["dot"] > 0.1
    wrong = DigitsTask(n_train=300, n_test=40, hidden=16, steps=100, wrong_labels=0.1)
    assert wrong.wrong.sum() == 30
    assert mislabel_auc(self_influence(wrong.store(tmp_path / "wrong", dim=128), "train"), wrong.wrong) > 0.93
