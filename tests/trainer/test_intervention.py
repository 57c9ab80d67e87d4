"""Interventions of the study: what is trained on, what is measured, and that a stopped experiment goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from benchmarks.study.intervention import SHORT_SIZES, Interventions, correlations, section, set_gains
from benchmarks.study.results import read_results
from benchmarks.study.toy import TOY
from gradstore.engine.gradients.directions import summed_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.sketches.spec import SketchSpec

GROUPS, AGES, DRAWS = SHORT_SIZES.groups, SHORT_SIZES.ages, SHORT_SIZES.draws
KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    **{f"Adam, age {age}": lambda row, age=age: row.get("age") == age and "plain" not in row for age in AGES},
    "plain, age 0": lambda row: row.get("age") == 0 and "plain" in row,
}


def experiment(path: Path) -> Interventions:
    return Interventions(TOY, TOY.short, SHORT_SIZES, 0, path, read_results(path), lambda line: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interventions") / "rows.jsonl"
    experiment(path).run(["dot"])
    return path


def test_each_measurement_is_a_row(path: Path) -> None:
    rows = read_results(path)
    names = [row["name"] for row in rows]
    assert names[0] == "scores"
    assert len(names) == len(set(names)) == 1 + GROUPS * (len(AGES) + 1) + DRAWS * 3
    for own in KINDS.values():
        ids = [one for row in rows if own(row) for one in row["ids"]]
        assert sorted(ids) == sorted(rows[0]["ids"])  # each problem in one group
    of_adam, plain = ([row for row in rows if KINDS[kind](row)] for kind in ("Adam, age 0", "plain, age 0"))
    assert [row["ids"] for row in of_adam] == [row["ids"] for row in plain]
    assert [row["gain"] for row in of_adam] != [row["gain"] for row in plain]
    dots = dict(zip(rows[0]["ids"], rows[0]["scores"]["dot"], strict=True))
    sums = [sum(dots[one] for one in row["ids"]) for row in rows if KINDS["Adam, age 0"](row)]
    assert sums == sorted(sums, reverse=True)
    sets = {row["name"]: row["ids"] for row in rows if " draw " in row["name"]}
    assert min(dots[one] for one in sets["dot top draw 0"]) >= max(dots[one] for one in sets["dot bottom draw 0"])
    assert sets["dot top draw 0"] == sets["dot top draw 1"]
    assert sets["random draw 0"] != sets["random draw 1"]
    gains = {row["name"]: row["gain"]["test"] for row in rows if " draw " in row["name"]}
    assert gains["dot top draw 0"] != gains["dot top draw 1"]  # other rollouts


def test_a_plain_step_follows_the_gradient(path: Path) -> None:
    """The weights move by the learning rate times the mean of the problems' gradients, however faint it is."""
    made = experiment(path)
    model = made.policy.model
    groups = made.policy.roll_out(made.problems.pool[:6], 8, seed=3)
    assert any(group.has_signal for group in groups)
    update = GradientPass(model, SketchSpec(objective=objective(made.settings.objective)))
    sums = {name: value.clone() for name, value in summed_gradient(update, groups).items()}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    made._learner(plain=True).step(groups)
    for name, value in model.named_parameters():
        moved = made.sizes.plain_lr * sums[name] / len(groups)
        assert torch.allclose(value, before[name] + moved, atol=1e-6), name


def test_a_stopped_experiment_goes_on_with_the_same_rows(path: Path, tmp_path: Path) -> None:
    """Without its last rows, and with one of the middle gone: the same gains come again."""
    rows = read_results(path)
    lines = path.read_bytes().splitlines(keepends=True)
    gone = ("group 1 age 1", rows[-1]["name"])
    left = [line for line, row in zip(lines, rows, strict=True) if row["name"] not in gone]
    again = tmp_path / "again.jsonl"
    again.write_bytes(b"".join(left))
    experiment(again).run(["dot"])
    assert gains_of(read_results(again)) == gains_of(rows)
    before = again.read_bytes()
    experiment(again).run(["dot"])
    assert again.read_bytes() == before


def gains_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["name"]: row.get("gain") for row in rows}


def test_tables_are_what_a_slow_loop_finds(path: Path) -> None:
    rows = read_results(path)
    found = {(name, steps): value for name, steps, value, *_ in correlations(rows)}
    assert len(found) == len(KINDS) * (len(SHORT_SIZES.dims) * len(SHORT_SIZES.rollouts) + 1)
    place = {one: p for p, one in enumerate(rows[0]["ids"])}
    for (name, steps), value in found.items():
        predicted, measured = [], []
        for row in rows:
            if KINDS[steps](row):
                predicted.append(sum(rows[0]["scores"][name][place[one]] for one in row["ids"]))
                measured.append(row["gain"]["test"])
        assert value == pytest.approx(spearmanr(predicted, measured)[0])
    gains = set_gains(rows)
    assert list(gains) == ["random", "dot top", "dot bottom"]
    assert all(len(own) == DRAWS for own in gains.values())
    text = section(rows)
    assert f"{np.mean(gains['dot top']):+.4f}" in text
    assert "| exact, 4 rollouts | Adam, age 1 |" in text
