"""Views, hits and selections in a notebook; and the tutorial, run from its first cell to its last."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import State, Store, engine

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.ipynb"
EVIL = "<script>alert(1)</script>&"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Forty problems whose ids would be markup, one of them without signal."""
    made = gradstore.create(tmp_path / "store", dim=8, fingerprint={"a": 1})
    random = np.random.default_rng(0)
    for name in ("pool", "bench"):
        ids = [f"{p:02d}{EVIL}" for p in range(40)]
        made.add_problems(name, [{"id": one, "prompt": EVIL} for one in ids])
        with made.writer(name, step=3) as writer:
            states = [State.NO_SIGNAL, *[State.LIVE] * 39]
            sketches = random.normal(size=(40, 8)).astype(np.float32) * (np.arange(40) > 0)[:, None]
            writer.append(ids, sketches, state=states, pass_rate=np.full(40, 0.25))
    return made


class Balanced(HTMLParser):
    """Fails on a tag that is not closed or not expected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert tag in {"div", "strong", "span", "table", "thead", "tbody", "tr", "th", "td"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def shown(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser.text


def test_what_a_notebook_shows(store: Store) -> None:
    """The first rows with their numbers, the rest counted, and nothing of a problem's own is markup."""
    view = store.view("pool")
    text = shown(view._repr_html_())
    assert "39 live, 1 no signal, 0 failed" in text
    assert EVIL in text
    assert "… 30 more" in text
    hits = engine.search(view, engine.target(store, "bench"), 12)
    text = shown(hits._repr_html_())
    assert "12 hits of 39 eligible problems" in re.sub(r"\s+", " ", text)
    assert f"{hits.scores[0]:.4g}" in text
    assert "… 2 more" in text
    chosen = engine.select(store, "pool", engine.target(store, "bench"), 3)
    text = shown(chosen._repr_html_())
    assert "3 chosen by cosine" in text
    assert "of 39 candidates of pool against bench" in text
    assert "more" not in text
    assert all(problem_id in text for problem_id in chosen.ids)


def test_what_is_empty_is_shown_too(store: Store) -> None:
    nothing = engine.search(store.view("pool"), engine.target(store, "bench"), 5, where=np.zeros(40, bool))
    assert "0 hits" in shown(nothing._repr_html_())
    assert "0 live" in shown(store.view("pool", at=0)._repr_html_())


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Every cell, in a fresh kernel, in an empty folder, without an error; its outputs and pictures are kept in it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(TUTORIAL, as_version=4)
    kept = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in kept) >= 4
    assert not [out for out in kept if out["output_type"] == "error"]
    said = str([{kind: data for kind, data in out.get("data", out).items() if kind != "image/png"} for out in kept])
    assert not re.search(r"/(?:home|root|tmp|var|Users)/\w", said)  # a path of the machine that made them
    assert str(TUTORIAL.parents[1]) not in said
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("text/html" in out.get("data", {}) for out in outputs)
