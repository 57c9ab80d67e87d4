"""Every kind of wrong request: one line that names the place, exit status 2, and a store as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import FingerprintError, RequestError, State


def refused(error: pytest.ExceptionInfo[RequestError]) -> None:
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


ONES = np.ones((2, 24))


@pytest.mark.parametrize(
    ("ids", "sketches", "options", "message"),
    [
        (["p1", "nobody"], ONES, {}, "problem id 'nobody' is not in the collection; add its problem first"),
        (["p1", 2], ONES, {}, "problem id 2 is not in the collection"),
        (["p1", ["p2"]], ONES, {}, r"problem id \['p2'\] is not in the collection"),
        (["p1", "p1"], ONES, {}, "problem id 'p1' occurs twice in one append"),
        (
            ["p1", "p2"],
            np.ones((2, 23)),
            {},
            r"sketches have shape \(2, 23\), expected \(2, 24\): the store's dim",
        ),
        (["p1", "p2"], np.ones(24), {}, r"sketches have shape \(24,\)"),
        (["p1", "p2"], [[1.0] * 24, [1.0]], {}, "sketches are not an array of numbers"),
        (["p1", "p2"], np.ones((3, 24)), {}, "2 ids but 3 sketches"),
        (["p1", "p2"], np.ones((2, 24), complex), {}, "dtype complex128, expected real numbers"),
        (
            ["p1", "p2"],
            ONES * [[1], [np.nan]],
            {},
            "sketch of problem 'p2' is nan at dimension 0; a live row must be",
        ),
        (["p1", "p2"], ONES * [[np.inf], [1]], {}, "sketch of problem 'p1' is inf at dimension 0"),
        (["p1", "p2"], ONES * [[1], [1e300]], {}, "sketch of problem 'p2' is inf"),
        (
            ["p1", "p2"],
            ONES,
            {"norms": [1, np.nan]},
            "'p2': norms: value nan, expected a finite positive norm",
        ),
        (["p1", "p2"], ONES, {"norms": [-1, 1]}, "'p1': norms: value -1, expected a finite positive norm"),
        (
            ["p1", "p2"],
            ONES,
            {"norms": [1, 1e300]},
            "'p2': norms: value inf, expected a norm that float32 can hold",
        ),
        (
            ["p1", "p2"],
            ONES,
            {"norms": [1, 1e-300]},
            "'p2': norms: value 0, expected a norm that float32 can hold",
        ),
        (["p1", "p2"], ONES, {"norms": [1]}, r"2 ids but norms has shape \(1,\)"),
        (["p1", "p2"], ONES, {"norms": ["a", "b"]}, "norms must be numbers"),
        (
            ["p1", "p2"],
            ONES * [[1], [0]],
            {"norms": [1, 1]},
            "'p2': sketches: largest 0, expected a row that is not",
        ),
        (["p1", "p2"], ONES * [[1], [0]], {"state": State.LIVE}, "'p2': sketches: largest 0"),
        (["p1", "p2"], ONES, {"state": [0]}, "2 ids but 1 values of state"),
        (
            ["p1", "p2"],
            ONES,
            {"state": [0, 7]},
            r"problem 'p2': state 7 is not one of 0 \(live\), 1 \(no_signal\)",
        ),
        (["p1", "p2"], ONES, {"state": [0, 2]}, "problem 'p2' failed without a reason"),
        (["p1", "p2"], ONES, {"state": 2, "reason": ["x"]}, "2 ids but 1 values of reason"),
        (["p1", "p2"], ONES, {"reason": ["x", 3]}, "problem 'p2': reason 3 is not a string"),
        (
            ["p1", "p2"],
            ONES,
            {"pass_rate": [0.5, 1.5]},
            "'p2': pass_rate: value 1.5, expected a share between 0 and 1",
        ),
        (["p1", "p2"], ONES, {"n_rollouts": [1, -2]}, "'p2': n_rollouts: value -2, expected a whole number"),
        (
            ["p1", "p2"],
            ONES,
            {"n_rollouts": [1, 2.5]},
            "'p2': n_rollouts: value 2.5, expected a whole number",
        ),
    ],
)
def test_a_refused_append_appends_nothing(
    new_store: Callable, ids: list, sketches: np.ndarray, options: dict, message: str
) -> None:
    """And the writer goes on: what was appended before and after is published."""
    store = new_store()
    with store.writer("pool", step=0) as writer:
        writer.append(["p8"], np.ones((1, 24)))
        with pytest.raises(RequestError, match=f"collection 'pool'.*{message}") as caught:
            writer.append(ids, sketches, **options)
        refused(caught)
        writer.append(["p9"], np.ones((1, 24)))
    view = store.view("pool")
    assert list(view.ids) == ["p8", "p9"]
    assert store.verify().ok


def test_a_writer_outside_its_context(new_store: Callable) -> None:
    """Rows appended to a writer that is closed would never be published."""
    store = new_store()
    writer = store.writer("pool", step=0)
    with pytest.raises(RequestError, match="open the writer first"):
        writer.append(["p1"], np.ones((1, 24)))
    with writer:
        writer.append(["p1"], np.ones((1, 24)))
    with pytest.raises(RequestError, match="closed or failed earlier"):
        writer.append(["p1"], np.ones((1, 24)))
    with pytest.raises(RequestError, match="already open"), writer:
        pass
    assert len(store.view("pool")) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("p", "a problem must be a dict of fields, not str"),
        ({"prompt": "x"}, "field 'id' must be a non-empty string, not None"),
        ({"id": "", "prompt": "x"}, "field 'id' must be a non-empty string, not ''"),
        ({"id": 3, "prompt": "x"}, "field 'id' must be a non-empty string, not 3"),
        (
            {"id": "a"},
            "problem 'a': field 'prompt' must be a non-empty string or a list of chat messages, not None",
        ),
        ({"id": "a", "prompt": ""}, "problem 'a': field 'prompt'"),
        (
            {"id": "a", "prompt": [{"role": "user"}]},
            "field 'prompt', message 0, must be a dict with 'role' and",
        ),
        ({"id": "a", "prompt": "x", "tags": "easy"}, "field 'tags' must be a list of strings, not 'easy'"),
        ({"id": "a", "prompt": "x", "source": 1}, "field 'source' must be a string, not 1"),
        ({"id": "a", "prompt": "x", "ground_truth": 42}, "field 'ground_truth' must be a string, not 42"),
        ({"id": "a", "prompt": "x", "extra": [1]}, "field 'extra' must be a dict, not list"),
        ({"id": "a", "prompt": "x", "extra": {"a": {1, 2}}}, "field 'extra.a' is a value of type set"),
        ({"id": "a", "prompt": "x", "answer": "1"}, "field 'answer' is not known; put it into 'extra'"),
        ({"id": "p1", "prompt": "another"}, "problem 'p1' is stored with another 'source'"),
    ],
)
def test_a_wrong_problem_adds_nothing(new_store: Callable, tools: dict, record: object, message: str) -> None:
    """One wrong record among right ones leaves the collection as it was."""
    store = new_store()
    commit = store.commit("pool")
    with pytest.raises(RequestError, match=f"collection 'pool'.*{message}") as caught:
        store.add_problems("pool", [*tools["records"](1, first=50), record])
    refused(caught)
    assert store.commit("pool") == commit
    with pytest.raises(RequestError, match=message):
        store.add_problems("new", [record, {"id": "p1", "prompt": "first"}]) if "stored" not in message else (
            store.add_problems("pool", [record])
        )
    assert store.collections == ["pool"]


def test_problems_added_again(new_store: Callable, tools: dict) -> None:
    """Resuming adds the same problems again; a changed one must not pass as the same."""
    store = new_store()
    commit = store.commit("pool")
    assert store.add_problems("pool", tools["records"](10)) == 0
    assert store.commit("pool") == commit
    assert store.add_problems("pool", tools["records"](12)) == 2
    for field, value in [("prompt", "changed"), ("tags", ["x"]), ("extra", {}), ("ground_truth", "0")]:
        changed = {**tools["records"](1, first=3)[0], field: value}
        with pytest.raises(RequestError, match=f"problem 'p3' is stored with another '{field}'"):
            store.add_problems("pool", [changed])
    with pytest.raises(RequestError, match="problem id 'p3' occurs 2 times"):
        store.add_problems("pool", tools["records"](1, first=3) * 2)
    assert store.add_problems("pool", []) == 0


def test_names_and_settings(new_store: Callable, tmp_path: Path) -> None:
    """A name becomes a folder: it must not leave the store or hide in it."""
    store = new_store()
    for name in ("", ".hidden", "a/b", "..", "a b", "ä", "x" * 201, 3):
        message = "is named by its name, a text" if name == 3 else "is not possible: use letters, digits"
        with pytest.raises(RequestError, match=message) as caught:
            store.add_problems(name, [{"id": "a", "prompt": "x"}])
        refused(caught)
    for call in (
        store.view,
        store.steps,
        store.commit,
        store.problems,
        store.compact,
        lambda n: store.delete(n, []),
    ):
        with pytest.raises(RequestError, match="there is no collection 'nope'; the store has pool"):
            call("nope")
    with pytest.raises(RequestError, match="there is no collection 'nope'"), store.writer("nope", step=0):
        pass
    for step in (-1, 1.5, "3", None, True):
        with pytest.raises(RequestError, match="step must be a whole number of at least 0"):
            store.writer("pool", step=step)
    with pytest.raises(RequestError, match="at must be a step"):
        store.view("pool", at="newest")
    with pytest.raises(RequestError, match="problem id 'nobody' is not in the collection"):
        store.delete("pool", ["p1", "nobody"])
    assert store.deleted("pool") == []
    with pytest.raises(RequestError, match="keep 'some' is not known"):
        store.compact(keep="some")
    with pytest.raises(RequestError, match="mode 'w' is not known"):
        gradstore.open(store.path, mode="w")
    for dim in (0, -3, 2.5, "8", True):
        with pytest.raises(RequestError, match="dim must be a whole number"):
            gradstore.create(tmp_path / "new", dim=dim, fingerprint={})
        with pytest.raises(RequestError, match="chunk_rows must be a whole number"):
            gradstore.create(tmp_path / "new", dim=3, fingerprint={}, chunk_rows=dim)
    with pytest.raises(RequestError, match="dtype 'int2' is not one of int8, int4, 1bit, fp16, fp32"):
        gradstore.create(tmp_path / "new", dim=2, fingerprint={}, dtype="int2")
    for fingerprint in ({"a": object()}, {"a": float("nan")}, "model"):
        with pytest.raises(RequestError, match="fingerprint"):
            gradstore.create(tmp_path / "new", dim=2, fingerprint=fingerprint)
    assert not (tmp_path / "new").exists()


def test_creating_where_something_is(new_store: Callable, tmp_path: Path) -> None:
    """Neither a store nor anything else may be overwritten; an empty folder is free."""
    store = new_store()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (store.path, tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(RequestError, match="there is something here already") as caught:
            gradstore.create(path, dim=2, fingerprint={})
        refused(caught)
    with pytest.raises(RequestError):
        gradstore.create(tmp_path / "file/store", dim=2, fingerprint={})
    (tmp_path / "empty").mkdir()
    assert gradstore.create(tmp_path / "empty", dim=2, fingerprint={}).collections == []
    assert gradstore.create(tmp_path / "deep/down", dim=2, fingerprint={}).mode == "a"


def test_a_reader_does_not_write(new_store: Callable) -> None:
    """Mode "r" is a promise."""
    reader = gradstore.open(new_store().path)
    for call in (
        lambda: reader.add_problems("pool", []),
        lambda: reader.writer("pool", step=0),
        lambda: reader.delete("pool", []),
        lambda: reader.compact(),
    ):
        with pytest.raises(RequestError, match="opened for reading; open it with mode 'a'"):
            call()


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    """Rows of two models or two projections cannot be compared; both values of every difference are named."""
    stored = {"model": "a", "projection": {"seed": 1, "kind": "random"}, "modules": ["q", "v"], "extra": {}}
    gradstore.create(tmp_path / "store", dim=2, fingerprint=stored)
    same = {"model": "a", "projection": {"kind": "random", "seed": 1}, "modules": ("q", "v"), "extra": {}}
    assert gradstore.open(tmp_path / "store", mode="a", fingerprint=same).fingerprint == stored
    other = {
        "model": "b",
        "projection": {"seed": 2, "kind": "random"},
        "modules": ["q"],
        "lora": 8,
        "extra": {},
    }
    with pytest.raises(FingerprintError) as caught:
        gradstore.open(tmp_path / "store", mode="a", fingerprint=other)
    refused(caught)
    for part in (
        "model: the store has 'a', this run has 'b'",
        "projection.seed: the store has 1, this run has 2",
        "length of modules: the store has 2, this run has 1",
        "lora: the store has 'nothing', this run has 8",
    ):
        assert part in str(caught.value)
    assert "kind" not in str(caught.value)
    with pytest.raises(FingerprintError, match=r"extra: the store has \{\}"):
        gradstore.open(tmp_path / "store", fingerprint={name: stored[name] for name in stored if name != "extra"})


def test_too_many_reasons_do_not_swell_the_manifest(new_store: Callable) -> None:
    """Reasons with a number in them never repeat; the manifest that carries them is rewritten at every publication."""
    store = new_store(n=1200, dim=1, chunk_rows=256)
    with store.writer("pool", step=0) as writer:
        writer.append(
            [f"p{i}" for i in range(1200)],
            np.zeros((1200, 1)),
            state=State.FAILED,
            reason=[f"loss {i} " + "x" * 1000 for i in range(1200)],
        )
    reasons = store.view("pool").reasons
    assert reasons[7] == ("loss 7 " + "x" * 1000)[:500]
    assert reasons[-1] == "(not kept: the collection already has 1000 different reasons)"
    assert len(set(reasons)) == 1001


def test_importing_is_light() -> None:
    """The command line answers in half a second only if nothing heavy is imported before it is needed."""
    code = (
        "import sys, gradstore; heavy = {'torch', 'zarr', 'pyarrow', 'numpy', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "gradstore.open, gradstore.State, gradstore.read_problems; "
        "heavy = {'torch', 'zarr', 'pyarrow', 'transformers'} & set(sys.modules); assert not heavy, heavy; "
        "assert 'Store' in dir(gradstore)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = gradstore.nothing
