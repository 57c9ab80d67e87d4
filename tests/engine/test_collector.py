"""Collecting: resumable anywhere, refused when made another way, never losing what is stored."""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import gradstore
import gradstore.engine.sketches.collector
from gradstore import State
from gradstore.attachments import read_coverage
from gradstore.engine import Sketcher, SketchSpec, create_store, objective
from gradstore.engine.gradients.coverage import Coverage, measure
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.rollouts import Group, read_rollouts
from gradstore.engine.sketches.collector import windows
from gradstore.errors import FingerprintError, RequestError
from gradstore.inventory import INVENTORY

SPEC = SketchSpec(rank=4, token_budget=60)
collect = partial(gradstore.engine.collect, accept_coverage=0.0)
"""The tiny model's embedding, which is not sketched, holds much of its gradient."""


@pytest.fixture
def model(make_model):
    return make_model("qwen2")


@pytest.fixture
def store(tmp_path, model):
    sketcher = Sketcher(model, SPEC)
    return gradstore.create(tmp_path / "store", dim=sketcher.dim, fingerprint=sketcher.fingerprint)


def add(store, groups, collection="pool") -> None:
    store.add_problems(collection, [{"id": group.problem_id, "prompt": "?"} for group in groups])


def write_rows(path: Path, groups: list[Group], **fields: str) -> None:
    """A rollout file in JSON Lines, token ids given."""
    rows = [
        {
            "problem_id": group.problem_id,
            "prompt": "?",
            "prompt_ids": group.prompt_ids.tolist(),
            "response_ids": response.tolist(),
            "reward": float(reward),
            **fields,
        }
        for group in groups
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_rows_are_the_sketches(store, model, make_groups) -> None:
    """What comes out of the store is what the sketcher made, to the rounding of its rows."""
    groups = make_groups(30)
    groups[4] = Group(groups[4].problem_id, groups[4].prompt_ids, groups[4].responses, np.zeros(4))
    add(store, groups)
    report = collect(store, "pool", groups, model=model, step=3, spec=SPEC)
    assert (report.collected, report.live, report.no_signal, report.skipped) == (30, 29, 1, 0)
    view = store.view("pool")
    batch = Sketcher(model, SPEC).sketch(groups)
    np.testing.assert_allclose(view.norms, np.linalg.norm(batch.sketches, axis=1), rtol=1e-5)
    units = batch.sketches / np.maximum(np.linalg.norm(batch.sketches, axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(view.take(batch.ids), units, atol=0.01)
    assert view.states.tolist() == batch.states
    assert view.steps.tolist() == [3] * 30
    np.testing.assert_allclose(view.pass_rates, batch.pass_rates)
    assert view.n_rollouts.tolist() == [4] * 30


def test_a_second_run_skips_and_a_later_step_refreshes(store, model, make_groups) -> None:
    """The same command twice does the work once; another step is a new row, and the past stays."""
    groups = make_groups(9)
    add(store, groups)
    collect(store, "pool", groups, model=model, step=0, spec=SPEC)
    commit = store.commit("pool")
    again = collect(store, "pool", groups, model=model, step=0, spec=SPEC)
    assert (again.collected, again.skipped) == (0, 9)
    assert store.commit("pool") == commit
    assert collect(store, "pool", groups[:5], model=model, step=7, spec=SPEC).collected == 5
    assert store.view("pool").steps.tolist() == [7] * 5 + [0] * 4
    assert store.view("pool", at=6).steps.tolist() == [0] * 9


def test_another_fingerprint_is_refused_with_both_values(store, model, make_groups) -> None:
    """Rows of two projections in one store would be compared without an error."""
    groups = make_groups(2)
    add(store, groups)
    other = SketchSpec(rank=4, seed=8, token_budget=60)
    with pytest.raises(FingerprintError, match=r"projection\.seed: the store has 0, this run has 8"):
        collect(store, "pool", groups, model=model, step=0, spec=other)
    with pytest.raises(FingerprintError, match=r"projection\.seed: the store has 0, this run has 8"):
        gradstore.open(store.path, mode="a", fingerprint=Sketcher(model, other).fingerprint)
    assert len(store.view("pool")) == 0


def test_bad_rollouts_lose_nothing(store, model, make_groups, monkeypatch) -> None:
    """An error in the middle of a stream keeps every row published before it."""
    monkeypatch.setattr(gradstore.engine.sketches.collector, "_PUBLISH_SECONDS", 0.0)
    groups = make_groups(24)
    add(store, groups)
    long = Group("problem-20", groups[20].prompt_ids, [np.ones(90, np.int64)] * 2, np.array([0.0, 1.0]))
    with pytest.raises(RequestError, match="'problem-20': prompt and longest response have"):
        collect(store, "pool", [*groups[:20], long], model=model, step=0, spec=SPEC)
    kept = len(store.view("pool"))
    assert 0 < kept <= 20
    assert store.verify().ok
    assert collect(store, "pool", groups, model=model, step=0, spec=SPEC).skipped == kept


def test_unknown_problems_are_refused(store, model, make_groups) -> None:
    """A row without a problem could never be shown."""
    add(store, make_groups(2))
    with pytest.raises(RequestError, match="problem-2"):
        collect(store, "pool", make_groups(3), model=model, step=0, spec=SPEC)
    assert len(store.view("pool")) == 0


def test_windows_do_not_depend_on_where_a_run_starts(make_groups) -> None:
    """Resuming is bit-exact because windows are cut over the whole stream."""
    groups = make_groups(50)
    cut = list(windows(groups, 200, 8))
    assert [group for window in cut for group in window] == groups
    assert max(len(window) for window in cut) <= 8
    assert all(sum(g.n_tokens * 4 for g in window[:-1]) < 200 for window in cut)


def test_killed_collect_resumes_to_the_same_store(tmp_path, model, make_groups, tiny_tokenizer) -> None:
    """`gradstore collect`, killed at ten moments and started again, ends with an undisturbed run's bytes."""
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rows(rollouts, make_groups(400))
    context = multiprocessing.get_context("forkserver")
    preloaded = ["torch", "transformers.models.qwen2", "gradstore.engine.sketches.collector", "gradstore.cli.rollout"]
    context.set_forkserver_preload(preloaded)

    def start(store: Path) -> multiprocessing.Process:
        process = context.Process(target=_run_collect, args=(str(store), str(rollouts), str(tmp_path / "model")))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    while not _rows(tmp_path / "whole"):
        time.sleep(0.001)
    began = time.monotonic()
    whole.join()
    assert whole.exitcode == 0
    seconds = time.monotonic() - began
    random, kills, partial = np.random.default_rng(0), 0, 0
    while kills < 10:
        before = _rows(tmp_path / "killed")
        process = start(tmp_path / "killed")
        while process.is_alive() and _rows(tmp_path / "killed") == before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, seconds / 20))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        partial += 0 < _rows(tmp_path / "killed") < 400
        assert gradstore.open(tmp_path / "killed").verify().ok
        if process.exitcode == 0:
            break
    assert kills == 10, "the run finished before it was killed often enough"
    assert partial == 10
    last = start(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    one, two = (gradstore.open(tmp_path / name).view("pool") for name in ("whole", "killed"))
    assert one.ids.tolist() == two.ids.tolist()
    assert np.array_equal(one.rows(np.arange(400)), two.rows(np.arange(400)))
    for name in ("norms", "states", "steps", "pass_rates", "n_rollouts"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert (one.states == State.LIVE).all()


def _rows(path: Path) -> int:
    try:
        return len(gradstore.open(path).view("pool"))
    except gradstore.GradstoreError:
        return 0


def _run_collect(store: str, rollouts: str, model: str) -> None:
    import torch

    from gradstore.cli import main

    torch.set_num_threads(1)
    gradstore.engine.sketches.collector._PUBLISH_SECONDS = 0.0
    sys.argv = [
        "gradstore",
        "collect",
        store,
        "pool",
        rollouts,
        "--model",
        model,
        "--rank",
        "4",
        "--token-budget",
        "60",
        "--accept-coverage",
        "0",
    ]
    main()


def test_a_source_brings_its_problems(tmp_path, store, model, make_groups, tiny_tokenizer) -> None:
    """Rollout files name their problems; collecting them is enough."""
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, make_groups(3), source="sums")
    collect(store, "pool", read_rollouts(path, tokenizer=tiny_tokenizer), model=model, step=0, spec=SPEC)
    assert store.problems("pool").to_pylist()[0]["source"] == "sums"
    assert store.view("pool").ids.tolist() == ["problem-0", "problem-1", "problem-2"]


def test_a_new_store_keeps_its_coverage(store, model, make_groups) -> None:
    """Measured on the first window with a signal, before a row of it is kept; a store that has live rows is left."""
    silent = [replace(group, rewards=np.ones(4)) for group in make_groups(2)]
    groups = make_groups(12)
    add(store, groups)
    collect(store, "pool", silent, model=model, step=0, spec=SPEC)
    assert read_coverage(store.path) is None
    collect(store, "pool", groups, model=model, step=1, spec=SPEC)
    (window, *_) = windows(groups, 16 * 60)
    expected = measure(GradientPass(model, SPEC), window)
    assert Coverage.of(read_coverage(store.path)).gradient == pytest.approx(expected.gradient, rel=1e-6)
    assert read_coverage(store.path)["parameters"] == expected.parameters
    before = sorted((store.path / "attachments").iterdir())
    assert len(before) == 1
    collect(store, "pool", groups, model=model, step=2, spec=SPEC)
    assert sorted((store.path / "attachments").iterdir()) == before
    before[0].unlink()
    (store.path / INVENTORY).unlink()
    gradstore.engine.collect(store, "pool", groups, model=model, step=3, spec=SPEC, accept_coverage=1.0)
    assert read_coverage(store.path) is None
    assert store.verify().ok


def test_too_little_coverage_is_refused(tmp_path, model, make_groups) -> None:
    """No row is kept of gradients that are seen in part, until that is accepted; or where layers were chosen."""
    groups, sketcher = make_groups(6), Sketcher(model, replace(SPEC, modules=("mlp",)))
    for name in ("asked", "chosen"):
        add(create_store(tmp_path / name, sketcher), groups)
    store = gradstore.open(tmp_path / "asked", "a")
    with pytest.raises(RequestError, match=r"self_attn\.o_proj\.weight .*accept it: accept_coverage=0\.\d") as refused:
        gradstore.engine.collect(store, "pool", groups, sketcher=sketcher, step=0, accept_coverage=0.95)
    assert len(store.view("pool")) == 0
    assert read_coverage(store.path) is None
    least = float(str(refused.value).rpartition("=")[2])
    assert gradstore.engine.collect(store, "pool", groups, sketcher=sketcher, step=0, accept_coverage=least).live == 6
    chosen = gradstore.open(tmp_path / "chosen", "a")
    assert gradstore.engine.collect(chosen, "pool", groups, sketcher=sketcher, step=0).live == 6
    assert read_coverage(chosen.path) == read_coverage(store.path)
    assert least <= Coverage.of(read_coverage(store.path)).share < least + 0.01


def test_off_policy_rows_keep_their_effective_sample_size(tmp_path, make_model, make_groups) -> None:
    """A row made from a few rollouts that still count looks like any other unless it says so."""
    model, groups = make_model("qwen2"), make_groups(8, logprobs=True)
    spec = SketchSpec(rank=4, objective=objective("gradalign", importance=True, clip_high=0.2))
    sketcher = Sketcher(model, spec)
    store = create_store(tmp_path / "off", sketcher)
    store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in groups])
    collect(store, "pool", groups, sketcher=sketcher, step=4)
    view = gradstore.open(tmp_path / "off").view("pool")
    expected = sketcher.sketch(groups).ess
    assert np.allclose(view.ess, expected, rtol=1e-5)
    assert (view.ess <= view.n_rollouts + 1e-4).all()
    store.compact("pool", keep="newest")
    assert store.verify().ok
    assert np.allclose(store.view("pool").ess, expected, rtol=1e-5)
    on = Sketcher(model, SketchSpec(rank=4))
    plain = create_store(tmp_path / "on", on)
    plain.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in groups])
    collect(plain, "pool", groups, sketcher=on, step=4)
    assert np.isnan(plain.view("pool").ess).all()
    with plain.writer("pool", step=5) as writer, pytest.raises(RequestError, match="leave `ess` out"):
        writer.append([groups[0].problem_id], np.ones((1, plain.dim)), ess=[3.0])
