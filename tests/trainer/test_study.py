"""The study in miniature, through its public entry points; and that its problems are what its page says they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.study.ablations import PARTS, table, without
from benchmarks.study.accuracy import expected_accuracy
from benchmarks.study.bed import EASY, UNSOLVABLE, Bed
from benchmarks.study.findings import findings
from benchmarks.study.methods import method
from benchmarks.study.report import difference_at, differing, write_page
from benchmarks.study.results import alone, append_result, key, numbers, plan, read_results
from benchmarks.study.running import run_one
from benchmarks.study.statistics import accuracy_within, estimate, selection_rollouts, spent, steady
from benchmarks.study.toy import ARMS, TOY
from benchmarks.study.words import words
from gradstore import LockedError, RequestError
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.forecasting import forecast
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend

SHORT, DEFAULT_METHODS = TOY.short, TOY.methods
FIGURES = ("accuracy", "picks")


def _kinds(records: list[dict[str, Any]], family: str | None = None) -> dict[str, int]:
    tags = [record["tags"][0] for record in records if family in (None, record["source"])]
    return {tag: tags.count(tag) for tag in set(tags)}


def test_pools_are_made_as_the_page_says() -> None:
    """A pool with another mixture answers another question."""
    pools = {arm: TOY.problems(arm, 3, replace(SHORT, pool=320, validation=8, test=20)).pool for arm in ARMS}
    assert {len(pool) for pool in pools.values()} == {320}
    assert _kinds(pools["wrong_truths"]) == {tasks.CLEAN: 160, tasks.WRONG_TRUTH: 160}
    assert _kinds(pools["coin_flips"], tasks.TARGET_FAMILY) == {tasks.CLEAN: 32, tasks.COIN_FLIP: 128}
    assert _kinds(pools["imbalance"]) == {tasks.CLEAN: 320}
    assert sum(record["source"] == tasks.TARGET_FAMILY for record in pools["imbalance"]) == 32
    assert _kinds(pools["low_utility"], tasks.TARGET_FAMILY) == {tasks.CLEAN: 40, EASY: 80, UNSOLVABLE: 80}
    assert sum(map(TOY.is_useful, pools["low_utility"])) == 40
    assert sum(TOY.is_bad("low_utility", record) for record in pools["low_utility"]) == 280
    assert sum(TOY.is_bad("coin_flips", record) for record in pools["coin_flips"]) == 256
    assert len({record["id"] for record in pools["low_utility"]}) == 320


def test_methods_share_problems_and_none_is_tested_on_what_it_aims_at() -> None:
    """Otherwise their difference is one of problems, or of memory."""
    one, again = (TOY.problems("coin_flips", 1, replace(SHORT, validation=10, test=30)) for _ in range(2))
    assert one == again
    texts = [{record["prompt"][0]["content"] for record in own} for own in (one.pool, one.validation, one.test)]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_accuracy_is_what_sampling_would_find() -> None:
    """Computed from one forward pass, it must be the share of right answers among many samples."""
    model, tokenizer = load_model(MODEL, device="cpu"), load_tokenizer(MODEL)
    records = tasks.benchmark(0, 30)
    prompts = [
        tokenizer(tokenizer.apply_chat_template(record["prompt"], tokenize=False)).input_ids for record in records
    ]
    found = TransformersBackend(model, tokenizer).generate(
        prompts, 200, max_new_tokens=8, temperature=1.0, top_p=1.0, seed=0
    )
    right = [
        tasks.is_right(record, tokenizer.decode(response.token_ids, skip_special_tokens=True))
        for record, responses in zip(records, found, strict=True)
        for response in responses
    ]
    assert expected_accuracy(model, tokenizer, records) == pytest.approx(float(np.mean(right)), abs=0.03)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method once in one arm, the oracle and random picks in the others, and one method twice."""
    path = tmp_path_factory.mktemp("study") / "results.jsonl"
    wanted = plan(["wrong_truths"], DEFAULT_METHODS, [0]) + plan(list(ARMS)[1:], ["oracle", "random"], [0])
    for arm, name, seed in [*wanted, ("wrong_truths", "gradalign", 1), ("wrong_truths", "random", 1)]:
        append_result(path, run_one(TOY, arm, name, seed, SHORT))
    return path


def test_every_path_runs_and_is_counted(results: Path) -> None:
    """One row a run with all that the page needs; rollouts are those the settings ask for."""
    rows = {key(row): row for row in read_results(results, SHORT)}
    assert len(rows) == len(DEFAULT_METHODS) + 6 + 2
    full = SHORT.rounds * (SHORT.pool + SHORT.validation) * SHORT.rollouts
    fixed = SHORT.rounds * SHORT.validation * SHORT.budget_target + SHORT.pool * SHORT.first_look
    budget = SHORT.rounds * SHORT.budget * SHORT.rollouts
    for (_, name, _), row in rows.items():
        assert len(row["accuracy"]) == SHORT.rounds + 1
        assert len(row["bad"]) == SHORT.rounds
        if name in ("oracle", "random"):
            assert selection_rollouts(row) == 0
        elif name.startswith("budgeted"):
            share = {"budgeted-lcb": 1, "budgeted/2-lcb": 2, "budgeted/4-lcb": 4}[name]
            assert fixed < selection_rollouts(row) <= fixed + budget // share
        elif name in ("gradalign", "lcb"):
            assert selection_rollouts(row) == full
    oracle, random = (rows["wrong_truths", name, 0] for name in ("oracle", "random"))
    assert oracle["accuracy"][0] == random["accuracy"][0]
    assert oracle["accuracy"][-1] > random["accuracy"][-1]
    assert oracle["bad"] == [0.0] * SHORT.rounds
    assert np.mean(rows["wrong_truths", "gradalign", 0]["useful"]) > np.mean(random["useful"])


def test_an_oracle_with_rounds_of_its_own_is_one() -> None:
    row = run_one(TOY, "wrong_truths", "oracle*2", 0, SHORT)
    assert row["bad"] == [0.0, 0.0]
    assert row["selection_rollouts"] == [0, 0]


def test_a_run_repeats(results: Path) -> None:
    """A study that goes on after a kill must not differ from one that did not stop."""
    row = next(row for row in read_results(results, SHORT) if key(row) == ("wrong_truths", "budgeted-lcb", 0))
    again = json.loads(json.dumps(run_one(TOY, "wrong_truths", "budgeted-lcb", 0, SHORT)))
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in row.items() if "seconds" not in k
    }


def test_a_torn_line_is_done_again(results: Path, tmp_path: Path) -> None:
    """Killed while writing, the file must neither lose a whole row nor keep half of one."""
    path = tmp_path / "torn.jsonl"
    whole = results.read_bytes()
    path.write_bytes(whole[:-20])
    rows = read_results(path, SHORT)
    assert len(rows) == len(read_results(results, SHORT)) - 1
    append_result(path, read_results(results, SHORT)[-1])
    assert path.read_bytes() == whole
    assert read_results(path, replace(SHORT, lr=1.0)) == []
    path.write_bytes(b"{}\n")
    with pytest.raises(RequestError, match="line 1"):
        read_results(path, SHORT)
    with alone(path), pytest.raises(LockedError), alone(path):
        pass


def test_seeds_are_given_as_numbers_and_ranges() -> None:
    """Seeds that settings were chosen on can be left out."""
    assert numbers("7, 0-2,1") == [0, 1, 2, 7]
    for wrong in ("", "1-", "-1", "3-2", "a", "1,,2"):
        with pytest.raises(RequestError, match="list of numbers"):
            numbers(wrong)


def test_the_page_tells_what_the_rows_say(results: Path, tmp_path: Path) -> None:
    """Every figure on it comes from the rows; the same rows give the same page."""
    rows = read_results(results, SHORT)
    page = tmp_path / "study.md"
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "notes.md").write_text("## Notes\n\nBy hand.\n")
    write_page(TOY, rows, page, SHORT)
    text = page.read_text()
    assert all(f"| `{name}` | {method(name, SHORT.budgeted).title} |" in text for name in DEFAULT_METHODS)
    assert "By hand." in text
    finals = [row["accuracy"][-1] for row in rows if row["arm"] == "wrong_truths" and row["method"] == "gradalign"]
    value = estimate(finals)
    assert f"| `gradalign` | {value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]" in text
    figures = {path.name: path.read_bytes() for path in (tmp_path / "study").glob("*.svg")}
    assert set(figures) == {"accuracy.svg", "picks.svg"}
    write_page(TOY, rows, page, SHORT)
    assert {path.name: path.read_bytes() for path in (tmp_path / "study").glob("*.svg")} == figures
    with pytest.raises(RequestError, match="no results"):
        write_page(TOY, [], page, SHORT)


@pytest.fixture(scope="module")
def by_rollouts() -> dict[str, dict[str, Any]]:
    """Methods that weigh rollouts or spend few on selection, and random picks, once each."""
    names = ("random", "random+dtv_loo*4", "random+oppose_target", "refresh0-dot", "pilot")
    return {name: run_one(TOY, "wrong_truths", name, 0, SHORT) for name in names}


def test_rollouts_are_weighed_and_counted(by_rollouts: dict[str, dict[str, Any]]) -> None:
    """What each method spends is what its name promises; a rule by the batch alone spends nothing."""
    spent_on = {name: selection_rollouts(row) for name, row in by_rollouts.items()}
    benchmark = SHORT.rounds * SHORT.validation * SHORT.budget_target
    assert spent_on == {
        "random": 0,
        "random+dtv_loo*4": 0,
        "random+oppose_target": benchmark,
        "refresh0-dot": SHORT.pool * SHORT.first_look + benchmark,
        "pilot": SHORT.rounds * 64 * 4,
    }
    assert len(by_rollouts["random+dtv_loo*4"]["accuracy"]) == 4 + 1
    plain = by_rollouts["random"]
    for name in ("random+dtv_loo*4", "random+oppose_target"):
        row = by_rollouts[name]
        assert len(row["dropped"]) == (len(row["accuracy"]) - 1) * SHORT.steps
        assert 0 < np.mean(row["dropped"]) < 1
        assert row["weigh_tokens"] > 0
        assert row["accuracy"][0] == plain["accuracy"][0]
        assert row["accuracy"][1] != plain["accuracy"][1]


def test_methods_are_compared_at_equal_rollouts() -> None:
    """The last round within the total counts; a run that ended long before says nothing about it."""
    settings = {"steps": 2, "train_batch": 5, "rollouts": 10}
    row = {"settings": settings, "selection_rollouts": [50, 20, 20], "accuracy": [0.1, 0.2, 0.3, 0.4]}
    assert spent(row) == [0, 150, 270, 390]
    found = [accuracy_within(row, total) for total in (149, 150, 389, 390, 509, 510)]
    assert found == [0.1, 0.2, 0.3, 0.4, 0.4, None]


def test_findings_say_when_intervals_are_apart() -> None:
    """The one place where a claim is made: means with wide intervals are no finding."""

    def row(name: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {"arm": "wrong_truths", "method": name, "seed": seed, "accuracy": [0.3, accuracy]}

    near = [row("gradalign", s, 0.6 + 0.3 * (s % 2)) for s in range(4)] + [row("random", s, 0.5) for s in range(4)]
    far = [row("gradalign", s, 0.6 + 0.001 * s) for s in range(4)] + [row("random", s, 0.5) for s in range(4)]
    assert "above in 1 of 1 arms, intervals apart in 0" in findings(near, ["wrong_truths"])[0]
    assert (
        "intervals apart in 1, that of the difference seed by seed above 0 in 1" in findings(far, ["wrong_truths"])[0]
    )
    both = [row("gradalign", s, 0.6 + 0.3 * (s % 2)) for s in range(4)]
    both += [row("random", s, 0.5 + 0.3 * (s % 2) + 0.01 * s) for s in range(4)]  # hard seeds are hard for both
    assert (
        "intervals apart in 0, that of the difference seed by seed above 0 in 1" in findings(both, ["wrong_truths"])[0]
    )
    low = estimate([0.1, 0.2, 0.3])
    assert low.half == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)  # Student's t, 2 degrees of freedom


def test_every_part_of_the_forecast_can_be_taken_out_and_comes_back() -> None:
    """The replaced names exist in the forecast, are replaced while a run lasts, and are the product's afterwards."""
    for part, (_, replaced) in PARTS.items():
        before = {name: getattr(forecast, name) for name in replaced}
        with without(part):
            assert {name: getattr(forecast, name) for name in replaced} == dict(replaced)
        assert {name: getattr(forecast, name) for name in replaced} == before
    assert method("budgeted-lcb~norms", SHORT.budgeted).without == "norms"


def test_the_table_of_ablations_is_differences_of_the_same_seeds() -> None:
    """A row per part: accuracy without it minus accuracy with it, seed by seed, and their mean over the arms."""
    rows = [
        {"arm": arm, "method": name, "seed": seed, "accuracy": [0.0, 0.5 + 0.1 * seed + less]}
        for arm in ARMS
        for seed in range(3)
        for name, less in (("budgeted-lcb", 0.0), *((f"budgeted-lcb~{part}", -0.02) for part in PARTS))
    ]
    for line in table(rows, "budgeted-lcb").splitlines()[3:]:
        assert line.count("-0.020 [-0.020, -0.020]") == len(ARMS) + 1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="wrong_truths"):
        TOY.problems("nothing", 0, SHORT)
    with pytest.raises(RequestError, match="oracle"):
        method("best", SHORT.budgeted)
    with pytest.raises(RequestError, match="no part 'nothing'"):
        method("budgeted-lcb~nothing", SHORT.budgeted)
    with pytest.raises(RequestError, match="rollout rule 'dvt'"):
        method("random+dvt", SHORT.budgeted)
    with pytest.raises(RequestError, match="no number of rounds"):
        method("random*x", SHORT.budgeted)
    for name in ("budgeted/0-lcb", "budgeted/-lcb", "budgeted/4", "budgeted-"):
        with pytest.raises(RequestError, match=r"budgeted\[/N\]-SELECTOR"):
            method(name, SHORT.budgeted)


@pytest.mark.parametrize("bed", [TOY, words(None, Path("unused"))], ids=lambda bed: bed.name)
def test_the_page_is_what_the_rows_say(bed: Bed) -> None:
    """Every figure and number of docs/study.md and docs/study-toy.md comes from the stored rows, byte for byte."""
    assert differing(bed, read_results(bed.results, bed.settings), bed.page, bed.settings) == []


def test_a_change_of_the_page_is_found(results: Path, tmp_path: Path) -> None:
    rows, page = read_results(results, SHORT), tmp_path / "study.md"
    assert differing(TOY, rows, page, SHORT) == [str(page), *(str(tmp_path / "study" / f"{n}.svg") for n in FIGURES)]
    write_page(TOY, rows, page, SHORT)
    assert differing(TOY, rows, page, SHORT) == []
    page.write_text(page.read_text().replace("0.", "1.", 1))
    assert differing(TOY, rows, page, SHORT) == [str(page)]


def test_what_later_rounds_cost() -> None:
    """By hand: two rounds after the first, with a third each of what is told for the whole run."""
    row = {
        "settings": {"steps": 4, "train_batch": 8, "rollouts": 16},
        "selection_rollouts": [400, 96, 96],
        "selection_seconds": [50.0, 6.0, 4.0],
        "selection_rollout_seconds": [20.0, 3.0, 1.0],
        "observe_seconds": 3.0,
        "training_seconds": 300.0,
        "training_rollout_seconds": 90.0,
    }
    found = steady(row)
    assert found.seconds == pytest.approx((6 + 4 - 3 - 1 + 2) / 140)
    assert found.seconds_with_rollouts == pytest.approx((6 + 4 + 2) / 200)
    assert found.rollouts == pytest.approx(2 * 96 / (2 * 512))


def test_differences_are_of_the_same_seed_and_total() -> None:
    """Ours spends 100 rollouts a round on selection, theirs none; a seed that one lacks is left out."""

    def row(seed: int, selection: int, accuracy: list[float]) -> dict[str, Any]:
        settings = {"steps": 1, "train_batch": 10, "rollouts": 10}
        n = len(accuracy) - 1
        return {"seed": seed, "settings": settings, "selection_rollouts": [selection] * n, "accuracy": accuracy}

    ours = [row(0, 100, [0.1, 0.5, 0.6]), row(1, 100, [0.1, 0.4, 0.9]), row(2, 100, [0.1, 0.9, 0.9])]
    theirs = [row(1, 0, [0.1, 0.2, 0.3, 0.4]), row(0, 0, [0.1, 0.3, 0.4, 0.5])]
    assert difference_at(ours, theirs, 200).startswith("+0.100 [")  # 0.5 - 0.4 and 0.4 - 0.3
    assert difference_at(ours, theirs, 200).endswith("n = 2")
    assert difference_at(ours, [], 200) == ""
