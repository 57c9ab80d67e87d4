"""The report: what it says is what the store holds, and a browser shows it without a fault.

Dimension letters: P problems, D sketch dimensions.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gradstore
from analysis.report import write_report
from analysis.report.assembly import assemble
from analysis.report.findings import find
from analysis.report.pieces import Figure, Page, Series, Table, written
from analysis.report.rendering import to_html, to_markdown
from analysis.report.transcripts import Transcripts, chosen
from engine.gradients.models import load_tokenizer
from gradstore import State, Store
from gradstore.errors import RequestError
from trainer.demo.course import ROLLOUTS
from trainer.demo.run import MODEL


@dataclass
class Made:
    """A report of the demo's short run, as values and as a file."""

    store: Store
    page: Page
    path: Path


@pytest.fixture(scope="module")
def made(course: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    store = gradstore.open(course / "store")
    path = tmp_path_factory.mktemp("report") / "report.html"
    page = write_report(store, path, rollouts=[course / ROLLOUTS], tokenizer=load_tokenizer(MODEL))
    return Made(store, page, path)


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


def test_sections_are_all_there(made: Made) -> None:
    """A run with rounds, two benchmarks and three steps has something for every section."""
    keys = [section.key for section in made.page.sections]
    assert keys == [
        "holdings", "timeline", "drift", "problems", "sources", "clusters", "layers", "selections", "conflicts",
        "turned", "suspects", "costs",
    ]  # fmt: skip
    assert [section.key for section in made.page.sections if section.missing] == []
    assert all(section.blocks for section in made.page.sections)


def test_states_are_counted(made: Made) -> None:
    """Shares of the pool in each state, from every row by itself."""
    shown = figure(made.page, "states")
    for step in (0, 4, 8):
        states = made.store.view("pool", step).states
        assert series(shown, "has a gradient")[str(step)] == pytest.approx(np.mean(states == State.LIVE))
        assert series(shown, "no signal")[str(step)] == pytest.approx(np.mean(states == State.NO_SIGNAL))


def test_alignment_is_the_median_cosine(made: Made) -> None:
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


def test_pass_rates_are_means(made: Made) -> None:
    shown = figure(made.page, "pass-rates")
    for name in ("pool", "sums", "spelling"):
        for step, rate in series(shown, name).items():
            assert rate == pytest.approx(float(np.mean(made.store.view(name, step).pass_rates)), abs=1e-6)


def test_target_drift_is_a_cosine(made: Made) -> None:
    shown = figure(made.page, "target-sums")
    targets = {step: target_of(made.store, "sums", step) for step in (0, 4, 8)}
    assert series(shown, "to the step before")[8] == pytest.approx(cosine(targets[8], targets[4]), abs=1e-3)
    assert series(shown, "to the first step")[8] == pytest.approx(cosine(targets[8], targets[0]), abs=1e-3)


def test_best_and_worst_are_the_ends_of_the_ranking(made: Made) -> None:
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


def test_picks_by_source_are_counted(made: Made) -> None:
    shown = figure(made.page, "picks-by-source")
    sources = {record["id"]: record["source"] for record in made.store.records("pool")}
    for one in made.store.rounds("pool"):
        picked = [sources[name] for name in one.picks]
        for name in set(sources.values()):
            assert series(shown, name)[str(one.about["step"])] == pytest.approx(picked.count(name) / len(picked))


def test_layer_shares_sum_to_one(made: Made) -> None:
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


def test_rounds_and_costs_are_those_recorded(made: Made) -> None:
    rounds = made.store.rounds("pool")
    shown = table(made.page, "rounds")
    assert column(shown, "Step") == [0, 4, 8]
    assert column(shown, "Picked") == [len(one.picks) for one in rounds]
    for one, mean in zip(rounds, column(shown, "Score, picked"), strict=True):
        scores = dict(zip(one.table["id"].to_pylist(), one.table["score"].to_pylist(), strict=True))
        assert mean == pytest.approx(np.mean([scores[name] for name in one.picks]))
    spent = table(made.page, "stages")
    assert column(spent, "Time")[-1] == pytest.approx(sum(sum(one.about["costs"].values()) for one in rounds))


def test_every_live_problem_is_on_the_map(made: Made) -> None:
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
    from analysis.drift import tells_noise

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
    assert set(missing) == {"drift", "selections", "conflicts", "turned", "costs"}
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
def test_wrong_requests_are_refused(made: Made, tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        write_report(made.store, tmp_path / "report.html", **settings)
    assert not list(tmp_path.iterdir())


EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"> | **bold** <b>'


@pytest.fixture
def hostile(tmp_path: Path) -> Store:
    """A store whose ids, texts and sources are made to break a page."""
    store = gradstore.create(
        tmp_path / "store", dim=8, fingerprint={"model": EVIL, "layout": [["a", 0, 4], ["b", 4, 8]]}
    )
    random = np.random.default_rng(0)
    for name in ("pool", "bench"):
        ids = [f"{name}-{p}-{EVIL}" for p in range(24)]
        records = [{"id": one, "source": f"{p % 3} {EVIL}", "prompt": f"{p} {EVIL}"} for p, one in enumerate(ids)]
        store.add_problems(name, [{**record, "tags": [EVIL], "ground_truth": EVIL} for record in records])
        for step in (0, 1):
            with store.writer(name, step=step) as writer:
                sketches = random.normal(size=(24, 8)).astype(np.float32)
                writer.append(ids, sketches, pass_rate=np.full(24, 0.5), n_rollouts=np.full(24, 4))
    return gradstore.open(tmp_path / "store")


def test_hostile_text_stays_text(hostile: Store, tmp_path: Path, visit: Callable) -> None:
    """A problem's text can hold anything, and is shown as it is: in tables, under rows, in hovers."""
    write_report(hostile, tmp_path / "report.html", pool="pool")
    page = visit((tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    see_everything(page)
    page.locator("[data-table=top-bench] td.open button").first.click()
    assert EVIL in page.locator("[data-table=top-bench] tr.detail pre").first.inner_text()
    point = page.locator("[data-figure=map] .points path").first
    point.hover(force=True)
    assert page.evaluate("window.hacked") is None


def test_hostile_text_stays_text_in_markdown(hostile: Store, tmp_path: Path) -> None:
    """No markup of a problem's own, and no broken table rows."""
    write_report(hostile, tmp_path / "report.md", format="md")
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "**bold**" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [re.sub(r"\\\|", "", line).count("|") for line in block.splitlines()]
        assert len(set(lines)) == 1, block


# How it is written ---------------------------------------------------------------------------------------------------


def test_markdown_links_its_figures(made: Made, course: Path, tmp_path: Path) -> None:
    """Every figure as SVG and PNG, each linked, none empty."""
    write_report(made.store, tmp_path / "report.md", format="md", figures=tmp_path / "figures")
    text = (tmp_path / "report.md").read_text()
    for one in made.page.figures:
        assert f"](figures/{one.key}.png)" in text
        assert (tmp_path / "figures" / f"{one.key}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "figures" / f"{one.key}.svg").read_bytes()[:2000]
    assert "35" in text
    assert f"## {made.page.sections[0].title}" in text


def test_figures_are_what_plotly_knows(made: Made) -> None:
    """plotly's own validation of every trace and layout."""
    from plotly.graph_objects import Figure as Plotly

    from analysis.report.interactive import drawn

    for one in made.page.figures:
        parts = drawn(one)
        Plotly(data=parts["data"], layout=parts["layout"])


def test_a_figures_table_has_its_numbers() -> None:
    """One row an x, gaps where a series has none."""
    one = Figure("f", "F", "", "lines", [Series("a", [2, 0], [0.2, 0.0]), Series("b", [1], [0.5])], "Step", "y")
    assert one.table().rows == [[0, 0.0, None], [1, None, 0.5], [2, 0.2, None]]
    assert [each.name for each in one.table().columns] == ["Step", "a", "b"]


VALUES = [
    0,
    1,
    -1,
    0.5,
    -0.1234,
    0.00012345,
    -3e-7,
    12345.678,
    1e9,
    999,
    1000,
    1e6,
    0.0996,
    0.625,
    0.0625,
    0.0005,
    2.5,
    0.094,
    59.94,
    3600,
    1e5,
    None,
]


def test_both_languages_write_numbers_alike(made: Made, visit: Callable) -> None:
    """The page and Markdown must not tell two stories."""
    page = visit(made.path.as_uri())
    for kind in ("integer", "number", "signed", "percent", "seconds", "bytes"):
        values = [value for value in VALUES if kind != "seconds" or value is None or value >= 0]
        expected = [written(value, kind) for value in values]
        found = page.evaluate("([values, kind]) => values.map((value) => window.written(value, kind))", [values, kind])
        assert (kind, found) == (kind, expected)


def test_nothing_is_fetched_and_the_data_is_json(made: Made) -> None:
    """One file: no address of another is loaded, and nan is null."""
    text = made.path.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", text)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    parsed = json.loads(data.group(1), parse_constant=lambda name: pytest.fail(f"{name} in the page's data"))
    assert set(parsed["figures"]) == {one.key for one in made.page.figures}


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


# In a browser --------------------------------------------------------------------------------------------------------


def see_everything(page: Any) -> None:
    """Scroll through, open whatever opens, and wait until every figure is drawn."""
    for number in range(page.locator("main > section").count()):
        page.locator("main > section").nth(number).scroll_into_view_if_needed()
    for host in page.locator("[data-figure]").all():
        host.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('[data-figure]:not([data-drawn])').length === 0")
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = true; })")


def test_every_view_works(made: Made, visit: Callable, keep_picture: Callable) -> None:
    """Figures drawn, numbers opened, rows opened, pages turned, sorted, searched, themes changed: no error anywhere."""
    page = visit(made.path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    see_everything(page)
    assert page.locator("[data-figure] .main-svg").count() >= len(made.page.figures)
    assert page.locator("main > section").count() == len(made.page.sections) + 1
    keep_picture(page, "report-light")
    titles = page.eval_on_selector_all(".modebar-btn", "all => all.map((one) => one.getAttribute('data-title') || '')")
    assert titles
    assert not [title for title in titles if "cloud" in title.lower() or "share" in title.lower()]
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = false; })")

    top = page.locator("[data-table=top-sums]")
    first = top.locator("tbody tr.data").first.inner_text()
    top.get_by_role("button", name="Next rows").click()
    assert top.locator("tbody tr.data").first.inner_text() != first
    assert top.locator(".where").inner_text().startswith("11–")
    top.get_by_role("button", name="Previous rows").click()
    assert top.locator("tbody tr.data").first.inner_text() == first
    top.get_by_role("button", name="Score", exact=True).click()
    assert top.locator("th[aria-sort]").inner_text().startswith("Score")
    best = top.locator("tbody tr.data").first.inner_text()
    top.get_by_role("button", name="Score", exact=True).click()
    assert top.locator("tbody tr.data").first.inner_text() != best
    top.get_by_role("searchbox").fill("no such text")
    assert top.locator("tbody").inner_text() == "Nothing matches."
    top.get_by_role("searchbox").fill("chain_sum")
    assert "chain_sum" in top.locator("tbody tr.data").first.inner_text()
    top.locator("td.open button").first.click()
    assert top.locator("td.open button").first.get_attribute("aria-expanded") == "true"
    assert "Rollout" in top.locator("tr.detail").first.inner_text()
    keep_picture(page, "report-opened")

    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.wait_for_timeout(200)
    keep_picture(page, "report-dark")
    for link in page.locator("nav a").all():
        link.click()
        assert page.url.endswith(str(link.get_attribute("href")))


def test_narrow_and_dark(made: Made, visit: Callable, keep_picture: Callable) -> None:
    """On a phone nothing is wider than the screen but tables, which scroll by themselves."""
    page = visit(made.path.as_uri(), scheme="dark", width=400)
    page.wait_for_selector("html[data-ready=yes]")
    see_everything(page)
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = false; })")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#theme").inner_text() == "Light"
    keep_picture(page, "report-narrow")


def test_keyboard_and_screen_reader(made: Made, visit: Callable) -> None:
    """Skip link first, one heading order, names on everything that can be pressed, a text for every picture."""
    page = visit(made.path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    unnamed = "all => all.filter((one) => !(one.getAttribute('aria-label') || one.innerText.trim())).length"
    assert page.eval_on_selector_all("main button, header button, nav a", unnamed) == 0
    for picture in page.locator("[role=img]").all():
        names = [picture.get_attribute("aria-labelledby"), picture.get_attribute("aria-describedby")]
        assert all(page.locator(f"[id='{name}']").inner_text().strip() for name in names)
    assert page.eval_on_selector_all("thead th", "all => all.every((one) => one.scope === 'col')")
    assert page.locator("main, nav, header, footer").count() == 4
    assert page.locator("html").get_attribute("lang") == "en"
    button = page.locator("[data-table=top-sums] td.open button").first
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"


def test_markdown_of_a_page_without_figures() -> None:
    """The smallest page there is."""
    text = to_markdown(Page("Title", "subtitle", [("n", "1")], ["be * warned"]))
    assert text.startswith("# Title\n\nsubtitle\n\n- **n**: 1\n")
    assert "- be \\* warned" in text
