"""The report: what it says is what the store holds.

Dimension letters: P problems, D sketch dimensions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gradstore import State, Store
from gradstore.analysis.report import write_report
from gradstore.analysis.report.assembly import assemble
from gradstore.analysis.report.findings import find
from gradstore.analysis.report.pieces import Figure, Page, Table, columns_of, written
from gradstore.analysis.report.rendering import to_html
from gradstore.analysis.report.transcripts import Transcripts, chosen
from gradstore.demo.course import ROLLOUTS
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.models import load_tokenizer
from gradstore.errors import RequestError


def figure(page: Page, key: str) -> Figure:
    return next(one for one in page.figures if one.key == key)


def table(page: Page, key: str) -> Table:
    blocks = [block for section in page.sections for block in section.blocks]
    return next(block for block in blocks if isinstance(block, Table) and block.key == key)


def column(one: Table, name: str) -> list[Any]:
    place = [each.name for each in one.columns].index(name)
    return [row[place] for row in one.rows]


def series(one: Figure, name: str) -> dict[Any, float]:
    found = next(each for each in one.series if each.name == name)
    return dict(zip(found.x, found.y, strict=True))


def rows_of(store: Store, name: str, step: int) -> dict[str, np.ndarray]:
    """Every live problem's row as of a step, decoded one by one: its gradient over the length of the whole gradient."""
    view = store.view(name, step)
    return {
        problem_id: np.asarray(view.rows(np.array([place]))[0], float)
        for place, problem_id in enumerate(view.ids)
        if view.states[place] == State.LIVE
    }


def target_of(store: Store, name: str, step: int) -> np.ndarray:
    """Mean gradient, problems without signal counting as zero."""
    view = store.view(name, step)
    norms = dict(zip(view.ids, view.norms.tolist(), strict=True))
    gradients = [norms[problem_id] * row for problem_id, row in rows_of(store, name, step).items()]
    return np.sum(gradients, axis=0) / int(sum(state != State.FAILED for state in view.states))


def cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
    return float(a_D @ b_D / np.linalg.norm(a_D) / np.linalg.norm(b_D))


# What it says --------------------------------------------------------------------------------------------------------


def test_sections_are_all_there(made: Any) -> None:
    """A run with rounds, two benchmarks and three steps has something for every section."""
    keys = [section.key for section in made.page.sections]
    assert keys == [
        "problems", "selections", "sources", "suspects", "turned", "conflicts", "clusters", "timeline", "drift",
        "layers", "costs", "holdings",
    ]  # fmt: skip
    missing = {section.key: section.missing for section in made.page.sections if section.missing}
    assert set(missing) <= {"turned", "suspects"}  # whether so short a run has any is chance
    assert all("none beyond" in text or "None of" in text for text in missing.values())
    assert all(section.blocks for section in made.page.sections if section.key not in missing)
    assert [section.key for section in made.page.sections if section.folded] == ["holdings"]


# What comes first ----------------------------------------------------------------------------------------------------


def answers(page: Page) -> dict[str, Any]:
    return {one.title: one for one in page.results}


def test_what_helps_and_what_harms_is_named_with_its_noise(make_history: Callable) -> None:
    """Sources that were planted along the benchmark, against it, and across it."""
    along_SP = np.tile([0.6, -0.6, 0.0], (1, 30))
    found = answers(assemble(find(make_history(along_SP).store)))
    assert found["What helps"].says.startswith("bench: s0 (+")
    assert found["What helps"].sign == "up"
    assert found["What harms"].says.startswith("bench: s1 (−")
    assert "s2" not in found["What helps"].says + found["What harms"].says


def test_nothing_helps_or_harms_where_all_is_noise(make_history: Callable) -> None:
    """Sources across the benchmark, with noise: none is named."""
    none = answers(assemble(find(make_history(np.zeros((1, 90)), seed=2).store)))
    assert none["What helps"].sign == none["What harms"].sign == "flat"
    assert none["What harms"].says.startswith("No source harms bench beyond chance")


@pytest.mark.parametrize(("picked", "sign", "words"), [(0, "up", "better than"), (1, "down", "worse than")])
def test_picks_are_compared_with_chance(make_history: Callable, picked: int, sign: str, words: str) -> None:
    """Picks along the benchmark, or against it; the number is the mean of the next measurements."""
    along_SP = np.tile([0.6, -0.6, 0.0], (3, 20))
    places = list(range(picked, 60, 3))[:12]
    history = make_history(along_SP, picks=[places] * 3, steps=[0, 10, 20])
    page = assemble(find(history.store))
    found = answers(page)["Better than chance"]
    assert (found.sign, words in found.says) == (sign, True)
    gained = np.mean([history.cosine(s + 1, p, s) for s in (0, 1) for p in places])
    every = np.mean([history.cosine(s + 1, p, s) for s in (0, 1) for p in range(60)])
    shown = table(page, "selectors")
    assert column(shown, "Better than chance")[0] == pytest.approx(gained - every, abs=0.02)
    assert any("worse than" in line or "did worse" in line for line in page.warnings) == (sign == "down")


def test_chance_is_the_mean_of_random_draws(make_history: Callable) -> None:
    """Its mean and its error against ten thousand draws."""
    from gradstore.analysis.curricula import _chance

    random = np.random.default_rng(0)
    values_P = random.normal(0.3, 1, 40)
    means = [random.choice(values_P, 15, replace=False).mean() for _ in range(10_000)]
    assert _chance(values_P, 15) == pytest.approx((np.mean(means), np.std(means)), abs=0.01)


def test_a_list_without_anything_significant_says_so(make_history: Callable) -> None:
    """Noise alone: no problem turned beyond it, no reward is beyond the threshold, and no row is listed."""
    page = assemble(find(make_history(np.zeros((4, 60)), noise=1.0, source_strength=3.0).store))
    parts = {section.key: section for section in page.sections}
    assert "none beyond the noise" in parts["turned"].missing
    assert not parts["turned"].blocks
    assert "None of 60" in parts["suspects"].missing


def test_a_column_has_one_precision() -> None:
    """Three digits of its largest number; what is within its noise is marked, what rounds to zero has no sign."""
    columns = columns_of("Name | Score:signed | Share:percent")
    one = Table("t", "T", columns, [["a", 0.285, 0.5], ["b", -3.3e-8, 0.021]], errors={"Score": [0.01, 0.1]})
    digits = one.digits()
    assert [written(row[1], "signed", digits[1]) for row in one.rows] == ["+0.285", "0.000"]
    assert [written(row[2], "percent", digits[2]) for row in one.rows] == ["50.0\u202f%", "2.1\u202f%"]
    assert [one.within_noise(i) for i in (0, 1)] == [[], [1]]


# What it says in detail ----------------------------------------------------------------------------------------------


def test_states_are_counted(made: Any) -> None:
    """Shares of the pool in each state, from every row by itself."""
    shown = figure(made.page, "states")
    for step in (0, 4, 8):
        states = made.store.view("pool", step).states
        assert series(shown, "has a gradient")[str(step)] == pytest.approx(np.mean(states == State.LIVE))
        assert series(shown, "no signal")[str(step)] == pytest.approx(np.mean(states == State.NO_SIGNAL))


def test_alignment_is_the_median_cosine(made: Any) -> None:
    """Against gradients decoded and multiplied one at a time."""
    shown = figure(made.page, "alignment")
    for name in ("sums", "spelling"):
        one = next(each for each in shown.series if each.name == name)
        for place, step in enumerate(one.x):
            wanted = target_of(made.store, name, step)
            scores = [row @ wanted / np.linalg.norm(wanted) for row in rows_of(made.store, "pool", step).values()]
            assert one.y[place] == pytest.approx(np.median(scores), abs=2e-3)
            assert one.low[place] == pytest.approx(np.quantile(scores, 0.05), abs=2e-3)
            assert one.high[place] == pytest.approx(np.quantile(scores, 0.95), abs=2e-3)


def test_pass_rates_are_means(made: Any) -> None:
    shown = figure(made.page, "pass-rates")
    for name in ("pool", "sums", "spelling"):
        for step, rate in series(shown, name).items():
            assert rate == pytest.approx(float(np.mean(made.store.view(name, step).pass_rates)), abs=1e-6)


def test_target_drift_is_a_cosine(made: Any) -> None:
    shown = figure(made.page, "target-sums")
    targets = {step: target_of(made.store, "sums", step) for step in (0, 4, 8)}
    assert series(shown, "to the step before")[8] == pytest.approx(cosine(targets[8], targets[4]), abs=1e-3)
    assert series(shown, "to the first step")[8] == pytest.approx(cosine(targets[8], targets[0]), abs=1e-3)


def test_best_and_worst_are_the_ends_of_the_ranking(made: Any) -> None:
    """Both tables against a sort of scores computed one at a time, with the whole text under each row."""
    wanted = target_of(made.store, "sums", 8)
    rows = rows_of(made.store, "pool", 8)
    scores = {name: float(row @ wanted / np.linalg.norm(wanted)) for name, row in rows.items()}
    order = sorted(scores, key=lambda name: -scores[name])
    top, bottom = table(made.page, "top-sums"), table(made.page, "bottom-sums")
    ids = column(top, "Problem")
    assert [scores[name] for name in ids] == pytest.approx([scores[name] for name in order[: len(ids)]], abs=2e-3)
    assert column(top, "Score") == pytest.approx([scores[name] for name in ids], abs=2e-3)
    assert [scores[name] for name in column(bottom, "Problem")] == pytest.approx(
        [scores[name] for name in order[::-1][: len(bottom.rows)]], abs=2e-3
    )
    texts = {record["id"]: record["prompt"][0]["content"] for record in made.store.records("pool")}
    assert top.details is not None
    assert [found["text"] for found in top.details] == [texts[name] for name in ids]
    assert all(found["rollouts"] for found in top.details)
    assert len(set(ids) | set(column(bottom, "Problem"))) == len(scores)


def test_picks_by_source_are_counted(made: Any) -> None:
    shown = figure(made.page, "picks-by-source")
    sources = {record["id"]: record["source"] for record in made.store.records("pool")}
    for one in made.store.rounds("pool"):
        picked = [sources[name] for name in one.picks]
        for name in set(sources.values()):
            assert series(shown, name)[str(one.about["step"])] == pytest.approx(picked.count(name) / len(picked))


def test_layer_shares_sum_to_one(made: Any) -> None:
    """Mean absolute term by layer, from rows and target cut at the layers' dimensions."""
    shown = table(made.page, "layers-table")
    assert sum(column(shown, "Share of the score")) == pytest.approx(1)
    wanted = target_of(made.store, "sums", 8)
    rows = list(rows_of(made.store, "pool", 8).values())
    terms = {
        name: np.mean([abs(row[start:stop] @ wanted[start:stop]) for row in rows])
        for name, start, stop in made.store.layers
    }
    largest = max(terms, key=lambda name: terms[name])
    assert column(shown, "Layer")[0] in largest or largest.endswith(column(shown, "Layer")[0].split(".")[-1])
    assert column(shown, "Share of the score")[0] == pytest.approx(terms[largest] / sum(terms.values()), abs=2e-3)


def test_rounds_and_costs_are_those_recorded(made: Any) -> None:
    rounds = made.store.rounds("pool")
    shown = table(made.page, "rounds")
    assert column(shown, "Step") == [0, 4, 8]
    assert column(shown, "Picked") == [len(one.picks) for one in rounds]
    for one, mean in zip(rounds, column(shown, "Score, picked"), strict=True):
        scores = dict(zip(one.table["id"].to_pylist(), one.table["score"].to_pylist(), strict=True))
        assert mean == pytest.approx(np.mean([scores[name] for name in one.picks]))
    spent = table(made.page, "stages")
    assert column(spent, "Time")[-1] == pytest.approx(sum(sum(one.about["costs"].values()) for one in rounds))


def test_every_live_problem_is_on_the_map(made: Any) -> None:
    shown = figure(made.page, "map")
    assert shown.n_points == int(made.store.view("pool").live.sum())
    assert sum(column(table(made.page, "clusters-table"), "Problems")) == shown.n_points


def test_warnings_are_plain_and_true(make_history: Callable) -> None:
    """The share in the sentence is the share in the store."""
    states_SP = np.full((3, 40), State.LIVE)
    states_SP[0, :11], states_SP[1, :12], states_SP[2, :3] = State.NO_SIGNAL, State.NO_SIGNAL, State.NO_SIGNAL
    store = make_history(np.random.default_rng(0).normal(size=(3, 40)), states_SP=states_SP).store
    expected = f"{written(0.3, 'percent')} of the problems had no signal at step 10 (and at least "
    assert assemble(find(store)).warnings[0].startswith(expected)


def test_a_noise_floor_that_is_cut_off_is_not_drawn() -> None:
    """Extrapolated to full agreement from a few steps it would make anything look like drift."""
    from gradstore.analysis.drift import tells_noise

    frame = pd.DataFrame({"reliability": [0.7], "noise_from": ["repeats"]})
    assert tells_noise(frame)
    assert not tells_noise(frame.assign(reliability=1.0))
    assert tells_noise(frame.assign(reliability=1.0, noise_from="probes"))
    assert not tells_noise(frame.assign(reliability=np.nan, noise_from="none"))


# What is not there, and what should not be ---------------------------------------------------------------------------


def test_missing_parts_say_so_in_one_line(make_history: Callable) -> None:
    """One step, no rounds, one benchmark: nothing fails, and each empty section says why."""
    store = make_history(np.random.default_rng(0).normal(size=(1, 30))).store
    page = assemble(find(store))
    missing = {section.key: section.missing for section in page.sections if section.missing}
    assert set(missing) - {"suspects"} == {"drift", "selections", "conflicts", "turned", "costs"}
    assert not [one.key for one in page.figures if one.is_one_point]
    assert len(column(table(page, "alignment"), "")) == 1
    assert all(text and "\n" not in text for text in missing.values())
    assert "no signal" not in " ".join(page.warnings)
    to_html(page)


def test_a_store_without_a_target_is_told(make_history: Callable) -> None:
    """A benchmark without a live problem ranks nothing; asked for by name it is refused."""
    store = make_history(np.ones((1, 12)), states_SP=np.full((1, 12), State.NO_SIGNAL)).store
    page = assemble(find(store, pool="bench"))
    assert "nothing is ranked" in page.warnings[0]
    assert {section.key for section in page.sections if section.missing} >= {"drift", "problems", "layers", "conflicts"}
    with pytest.raises(RequestError, match="no live problem"):
        find(store, pool="bench", benchmarks=["pool"])
    to_html(page)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pool": "nobody"}, "nobody"),
        ({"benchmarks": ["nobody"]}, "nobody"),
        ({"metric": "best"}, "best"),
        ({"format": "pdf"}, "pdf"),
        ({"n_listed": 0}, "at least 1"),
        ({"rollouts": ["nowhere.jsonl"]}, "nowhere"),
    ],
)
def test_wrong_requests_are_refused(made: Any, tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        write_report(made.store, tmp_path / "report.html", **settings)
    assert not list(tmp_path.iterdir())


# Rollouts ------------------------------------------------------------------------------------------------------------


def test_transcripts_are_read_by_problem(course: Path) -> None:
    """Several files together, against the lines of the files themselves."""
    paths = sorted((course / ROLLOUTS).glob("*-pool-*.jsonl"))
    tokenizer = load_tokenizer(MODEL)
    found = Transcripts(paths, tokenizer)
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    name = lines[0]["problem_id"]
    mine = [line for line in lines if line["problem_id"] == name]
    assert [(one.text, one.reward, one.step) for one in found.of(name)] == [
        (tokenizer.decode(line["response_ids"]), line["reward"], line["step"]) for line in mine
    ]
    assert len(found) == len(lines)
    assert found.of("nobody") == []
    shown = chosen(found.of(name), 4, 2)
    assert len(shown) == 4
    assert {one["step"] for one in shown} == {8}
    assert shown[0]["reward"] >= shown[1]["reward"]


def test_token_shares_are_read(tmp_path: Path) -> None:
    """Shares beside the ids they belong to; a list of another length is no shares."""
    row = {"problem_id": "a", "prompt": "p", "response_ids": [1, 2], "reward": 1.0}
    rows = [{**row, "extra": {"token_shares": [0.5, -0.5]}}, {**row, "extra": {"token_shares": [1.0]}}, row]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = Transcripts([tmp_path / "r.jsonl"]).of("a")
    assert [one.shares for one in found] == [(0.5, -0.5), None, None]
    assert found[0].text == "[token ids] 1 2"
