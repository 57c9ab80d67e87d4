"""A store is begun from Python as `gradstore collect` begins one."""

from pathlib import Path

import pytest

from gradstore.engine import SketchSpec, collect, start_store
from gradstore.engine.rollouts import read_rollouts
from gradstore.errors import RequestError
from tests.engine.test_collector import write_rows


@pytest.fixture
def source(tmp_path: Path, make_groups):
    """Rollouts of ten problems."""
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, make_groups(10, seed=3))
    return read_rollouts(path)


def test_rows_of_the_fit_are_collected_as_they_are(tmp_path: Path, make_model, source) -> None:
    spec, said = SketchSpec(rank=4, basis="fitted", dim=16), []
    begun = start_store(tmp_path / "s", make_model("qwen2"), source, spec, accept_coverage=0.0, say=said.append)
    assert [line for line in said if line.startswith("projection fitted to")]
    begun.store.add_problems("pool", [{"id": name, "prompt": "?"} for name in source.problem_ids])
    known = sum(len(batch.ids) for batch in begun.rows)
    assert known >= 2
    report = collect(begun.store, "pool", source, sketcher=begun.sketcher, step=0, known=begun.rows)
    assert report.collected == len(source.problem_ids)


@pytest.mark.parametrize("asked", [True, False])
def test_the_embedding_is_added_and_said_only_where_nobody_asked(
    tmp_path: Path, make_model, source, asked: bool
) -> None:
    spec, said = SketchSpec(rank=4, embeddings=asked), []
    model = make_model("qwen2")
    begun = start_store(tmp_path / "s", model, source, spec, accept_coverage=0.9, say=said.append)
    assert begun.sketcher.spec.embeddings
    assert any("the input embedding is sketched too" in line for line in said) != asked
    if not asked:
        with pytest.raises(RequestError, match="accept_coverage="):
            start_store(tmp_path / "t", model, source, spec, accept_coverage=0.9, widen=False)
        assert not (tmp_path / "t").exists()
