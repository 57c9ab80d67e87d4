"""The report as it is shown: in a browser, as Markdown and as printed figures, whatever the texts in it."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import Store
from gradstore.analysis.report import write_report
from gradstore.analysis.report.colouring import GREY
from gradstore.analysis.report.pieces import Figure, Page, Series, Table, written
from gradstore.analysis.report.rendering import to_markdown

# Files ---------------------------------------------------------------------------------------------------------------


def test_markdown_links_its_figures(made: Any, course: Path, tmp_path: Path) -> None:
    """Every figure as SVG and PNG, each linked, none empty."""
    write_report(made.store, tmp_path / "report.md", format="md", figures=tmp_path / "figures")
    text = (tmp_path / "report.md").read_text()
    for one in made.page.figures:
        assert f"](figures/{one.key}.png)" in text
        assert (tmp_path / "figures" / f"{one.key}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "figures" / f"{one.key}.svg").read_bytes()[:2000]
    assert "35" in text
    assert f"## {made.page.sections[0].title}" in text


def test_figures_are_what_plotly_knows(made: Any) -> None:
    """plotly's own validation of every trace and layout."""
    from plotly.graph_objects import Figure as Plotly

    from gradstore.analysis.report.interactive import drawn

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


def test_both_languages_write_numbers_alike(made: Any, visit: Callable) -> None:
    """The page and Markdown must not tell two stories."""
    page = visit(made.path.as_uri())
    for kind in ("integer", "number", "signed", "percent", "seconds", "bytes"):
        values = [value for value in VALUES if kind != "seconds" or value is None or value >= 0]
        expected = [written(value, kind) for value in values]
        found = page.evaluate("([values, kind]) => values.map((value) => window.written(value, kind))", [values, kind])
        assert (kind, found) == (kind, expected)
        for digits in (-1, 0, 1, 3) if kind in ("number", "signed") else (0, 1):
            expected = [written(value, kind, digits) for value in values]
            script = "([values, kind, digits]) => values.map((value) => window.written(value, kind, digits))"
            assert (kind, digits, page.evaluate(script, [values, kind, digits])) == (kind, digits, expected)


def test_nothing_is_fetched_and_the_data_is_json(made: Any) -> None:
    """One file: no address of another is loaded, and nan is null."""
    text = made.path.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", text)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    parsed = json.loads(data.group(1), parse_constant=lambda name: pytest.fail(f"{name} in the page's data"))
    assert set(parsed["figures"]) == {one.key for one in made.page.figures}


# Texts that are made to break a page ---------------------------------------------------------------------------------


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


# In a browser --------------------------------------------------------------------------------------------------------


def see_everything(page: Any) -> None:
    """Scroll through, open whatever opens, and wait until every figure is drawn."""
    for number in range(page.locator("main > section").count()):
        page.locator("main > section").nth(number).scroll_into_view_if_needed()
    for host in page.locator("[data-figure]").all():
        host.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('[data-figure]:not([data-drawn])').length === 0")
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = true; })")


def test_every_view_works(made: Any, visit: Callable, keep_picture: Callable) -> None:
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
        page.wait_for_function("there => location.hash === there", arg=link.get_attribute("href"))


def test_narrow_and_dark(made: Any, visit: Callable, keep_picture: Callable, looks_right: Callable) -> None:
    """Nothing is cut, hidden or wider than the window, down to a phone, where a score is seen without scrolling."""
    page = visit(made.path.as_uri(), scheme="dark", width=1400)
    page.wait_for_selector("html[data-ready=yes]")
    see_everything(page)
    page.evaluate("document.querySelectorAll('main details').forEach((one) => { one.open = false; })")
    for width in (1400, 1024, 390):
        looks_right(page, width)
    for row in page.locator("[data-table=top-sums] tr.data").all():
        box = row.locator("[data-name=Score]").bounding_box()
        assert box["x"] + box["width"] <= 390
    assert page.locator("#theme").inner_text() == "Light"
    keep_picture(page, "report-narrow")


def test_a_colour_means_one_thing(made: Any) -> None:
    """Over all figures of the page, as drawn; grey is for what is no group."""
    figures = json.loads(re.search(r'id="data">(.*?)</script>', made.path.read_text(), re.S)[1])["figures"]
    kinds = {one.key: one.named or one.key for one in made.page.figures}
    meanings: dict[str, set] = {}
    colours: dict[tuple, set] = {}
    for key, one in figures.items():
        for trace in one["data"]:
            marker, line = trace.get("marker", {}), trace.get("line", {})
            colour = marker.get("color") or line.get("color")
            if "name" in trace and isinstance(colour, str) and colour != GREY:
                meanings.setdefault(colour, set()).add((kinds[key], trace["name"]))
                colours.setdefault((kinds[key], trace["name"]), set()).add(colour)
    assert len(meanings) > 10
    assert {colour: names for colour, names in meanings.items() if len(names) > 1} == {}
    assert {name: found for name, found in colours.items() if len(found) > 1} == {}


AS_DRAWN = """() => {
  const name = (plot, trace) => `${plot.dataset.figure} ${trace.name}`;
  const ground = getComputedStyle(document.documentElement).getPropertyValue("--card").trim();
  const colour = (trace) => trace.marker?.color ?? trace.line?.color;
  const plots = [...document.querySelectorAll("[data-figure]")];
  const named = (plot) => plot.data.filter((trace) => trace.name);
  return [ground, plots.flatMap((plot) => named(plot).map((trace) => [name(plot, trace), colour(trace)]))];
}"""


def test_colours_are_seen_on_the_dark_ground(made: Any, visit: Callable) -> None:
    """WCAG's contrast of every line, bar and point with the ground; lightened colours still mean one thing."""
    page = visit(made.path.as_uri(), scheme="dark", width=1400)
    page.wait_for_selector("html[data-ready=yes]")
    see_everything(page)
    ground, drawn = page.evaluate(AS_DRAWN)
    assert len(drawn) > 10
    for name, colour in drawn:
        assert _contrast(colour, ground) >= 2.5, (name, colour)
    figures = json.loads(re.search(r'id="data">(.*?)</script>', made.path.read_text(), re.S)[1])["figures"]
    plain = {
        f"{key} {trace['name']}": trace.get("marker", {}).get("color") or trace["line"]["color"]
        for key, one in figures.items()
        for trace in one["data"]
        if "name" in trace
    }
    shown: dict[str, set] = {}
    for name, colour in drawn:
        shown.setdefault(colour, set()).add(plain[name])
    assert {colour: found for colour, found in shown.items() if len(found) > 1} == {}
    page.locator("#theme").click()
    assert dict(page.evaluate(AS_DRAWN)[1]) == plain


def _contrast(one: str, other: str) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of two colours `#rrggbb`, WCAG 2.2, section 1.4.11."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05)
    return max(lights) / min(lights)


def test_on_paper_nothing_is_left_out(made: Any, visit: Callable) -> None:
    """Every row of every table and every figure, on sections of their own, in light colours; afterwards as before."""
    page = visit(made.path.as_uri(), scheme="dark", width=1024)
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 690, "height": 900})
    assert page.locator("[data-figure]:not([data-drawn])").count() == 0
    for section in made.page.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                assert page.locator(f"[data-table='{block.key}'] tr.data").count() == len(block.rows)
    wide = "all => all.filter((one) => one.scrollWidth > one.clientWidth + 1).map((one) => one.ariaLabel)"
    assert page.eval_on_selector_all(".scroll", wide) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details.folded").get_attribute("open") is not None
    page.emulate_media(media="screen", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("[data-table=top-sums] tr.data").count() == 10
    assert page.locator("details.folded").get_attribute("open") is None


def test_keyboard_and_screen_reader(made: Any, visit: Callable) -> None:
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
