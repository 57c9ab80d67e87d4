"""Rows that hold a part of a gradient: cosines are those of the whole, dots those of the part."""

import numpy as np
import pytest

import gradstore
from gradstore import State
from gradstore.engine import search
from gradstore.errors import RequestError


@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit", "fp16", "fp32"])
def test_a_row_is_as_much_shorter_as_it_lacks(tmp_path, dtype: str) -> None:
    """A cosine over the sketch's own length ranks a problem high of which the sketch holds little."""
    random = np.random.default_rng(0)
    gradients_PC = random.normal(size=(12, 200)) * random.lognormal(size=(12, 1))
    sketches_PD, norms_P = gradients_PC[:, :80], np.linalg.norm(gradients_PC, axis=1)
    store = gradstore.create(tmp_path / "s", dim=80, fingerprint={}, dtype=dtype)
    ids = [f"p{i:02d}" for i in range(12)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    with store.writer("pool", step=0) as writer:
        writer.append(ids, sketches_PD, whole_norms=norms_P)
    view = store.view("pool")
    share_P = np.linalg.norm(sketches_PD, axis=1) / norms_P
    assert np.allclose(np.linalg.norm(view.rows(np.arange(12)), axis=1), share_P, rtol=1e-3)
    assert np.allclose(view.norms, norms_P, rtol=1e-6)
    query_D = random.normal(size=80)
    for metric, expected_P in {
        "cosine": sketches_PD @ query_D / norms_P / np.linalg.norm(query_D),
        "dot": sketches_PD @ query_D,
    }.items():
        hits = search(view, query_D, 12, metric=metric)
        found = dict(zip(hits.ids, hits.scores, strict=True))
        within = {"1bit": 0.7, "int4": 0.3}.get(dtype, 0.01) * np.abs(expected_P).max()
        assert np.allclose([found[name] for name in ids], expected_P, atol=within)
    assert store.verify().ok


def test_what_cannot_be_is_refused(tmp_path) -> None:
    store = gradstore.create(tmp_path / "s", dim=3, fingerprint={})
    store.add_problems("pool", [{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}])
    with store.writer("pool", step=0) as writer:
        with pytest.raises(RequestError, match="'b': whole_norms: value 1, expected a norm no less than"):
            writer.append(["a", "b"], np.ones((2, 3)), whole_norms=[2, 1])
        with pytest.raises(RequestError, match="give one"):
            writer.append(["a"], np.ones((1, 3)), norms=[2], whole_norms=[2])
        with pytest.raises(RequestError, match="finite positive norm"):
            writer.append(["a"], np.ones((1, 3)), whole_norms=[np.nan], state=State.LIVE)
        writer.append(["a", "b"], np.array([[1, 1, 1], [0, 0, 0]]), whole_norms=[np.sqrt(3), 0])
    assert store.view("pool").states.tolist() == [State.LIVE, State.NO_SIGNAL]
    assert np.allclose(np.linalg.norm(store.view("pool").take(["a"]), axis=1), 1)
