"""Every view of the explorer in a browser, served as a person starts it."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradstore import engine
from gradstore.analysis.explorer.catalogue import Catalogue, Filter
from gradstore.demo.course import ROLLOUTS
from gradstore.demo.run import MODEL
from gradstore.engine.selecting.export import write_selection


def started(course: Path, *more: str) -> tuple[subprocess.Popen, str]:
    """`gradstore serve` as a person starts it, and the address it prints."""
    command = [sys.executable, "-m", "gradstore", "serve", str(course / "store"), "--port", "0", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"http://\S+", line)
        if found:
            return process, found.group()
    raise AssertionError(f"no address was printed; exit status {process.wait()}")


@pytest.fixture(scope="module")
def address(course: Path) -> Iterator[str]:
    against = ["--against", "sums", "--against", "spelling"]
    more = ["--rollouts", str(course / ROLLOUTS), "--tokenizer", str(MODEL), "--no-token"]
    process, found = started(course, *more, *against)
    yield found
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (0, 130)


def choose(page: Any, control: str, words: str) -> None:
    """Choose from a list as a person does."""
    page.locator(f"#{control}").click()
    page.get_by_role("option", name=words, exact=True).click()


def test_ranking_in_a_browser(address: str, trained: Catalogue, visit: Callable, keep_picture: Callable) -> None:
    """Choose, filter, search, turn pages: the table shows what the catalogue answers."""
    page = visit(address)
    page.wait_for_selector("#ranking-table tbody tr")
    page.wait_for_selector("#ranking-figure .main-svg")
    expected = trained.ranked("sums", None, "cosine", Filter())
    links = page.locator("#ranking-table tbody a")
    assert links.all_inner_texts() == expected["id"].tolist()[:20]
    keep_picture(page, "explorer-rank")
    page.locator("#ranking-on").click()
    page.wait_for_function("document.getElementById('ranking-where').innerText.startsWith('21')")
    assert links.all_inner_texts() == expected["id"].tolist()[20:40]
    choose(page, "order", "least aligned first")
    page.wait_for_function("document.getElementById('ranking-where').innerText.startsWith('1–')")
    page.locator("#text").fill("multiplication")
    expected = trained.ranked("sums", None, "cosine", Filter(text="multiplication"), largest=False)
    page.wait_for_function(f"document.getElementById('ranking-where').innerText.includes('of {len(expected)} ')")
    assert links.all_inner_texts() == expected["id"].tolist()
    choose(page, "step", "step 0")
    choose(page, "metric", "dot")
    choose(page, "benchmark", "spelling")
    expected = trained.ranked("spelling", 0, "dot", Filter(text="multiplication"), largest=False)
    page.wait_for_function(
        "(first) => document.querySelector('#ranking-table tbody a').innerText === first", arg=expected["id"].iloc[0]
    )
    choose(page, "metric", "fisher")
    page.wait_for_selector("caption:has-text('fisher')", state="attached")
    page.locator("#text").fill("no such text")
    page.wait_for_selector("text=Nothing to show: no problem of pool has “no such text” in its text or id.")


def test_a_view_can_be_shared(address: str, trained: Catalogue, visit: Callable) -> None:
    """Opened by somebody else, the address shows the same rows, sorted by the same header; the list leaves as CSV."""
    page = visit(address)
    page.wait_for_selector("#ranking-table tbody tr.data")
    choose(page, "benchmark", "spelling")
    page.locator("#text").fill("a")
    page.wait_for_function("location.search.includes('text=a')")
    page.get_by_role("button", name="Pass rate", exact=True).click()
    page.wait_for_selector("th[aria-sort=ascending]:has-text('Pass rate')")
    page.get_by_role("button", name="Pass rate", exact=True).click()
    page.wait_for_selector("th[aria-sort=descending]:has-text('Pass rate')")
    page.locator("#ranking-on").click()
    page.wait_for_function("location.search.includes('page=1')")
    assert "benchmark=spelling" in page.url
    rows = page.locator("#ranking-table tbody a").all_inner_texts()
    frame = trained.ranked("spelling", None, "cosine", Filter(text="a"))
    expected = frame.sort_values("pass_rate", ascending=False, kind="stable", na_position="last")["id"].tolist()
    assert rows == expected[20:40]
    shared = visit(page.url)
    shared.wait_for_selector("th[aria-sort=descending]:has-text('Pass rate')")
    assert shared.locator("#ranking-table tbody a").all_inner_texts() == rows
    with shared.expect_download() as got:
        shared.locator("#ranking-export").click()
    lines = Path(got.value.path()).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("id,source,score")
    assert [line.partition(",")[0] for line in lines[1:]] == expected


def test_a_list_is_selected(address: str, trained: Catalogue, visit: Callable, tmp_path: Path) -> None:
    """The button gives the training file that `gradstore select` writes of the same problems."""
    page = visit(address)
    page.wait_for_selector("#ranking-table tbody tr.data")
    page.locator("#ranking-n").fill("7")
    with page.expect_download() as got:
        page.locator("#ranking-select").click()
    chosen = engine.select(trained.store, trained.pool, "sums", 7)
    write_selection(trained.store, chosen, tmp_path / "picked")
    assert got.value.suggested_filename == "train.jsonl"
    assert Path(got.value.path()).read_bytes() == (tmp_path / "picked" / "train.jsonl").read_bytes()


def test_what_is_not_there_is_404(address: str, trained: Catalogue) -> None:
    """A problem, a view; the others are 200."""

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(address + path) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    name = trained.ranked("sums", None, "cosine", Filter())["id"].iloc[0]
    found = [status(path) for path in ("", f"problem?id={name}", "compare", "problem?id=nobody", "rank")]
    assert found == [200, 200, 200, 404, 404]


def test_nothing_is_cut(address: str, trained: Catalogue, visit: Callable, looks_right: Callable) -> None:
    """Every view, from a wide window to a phone, where a score is seen without scrolling."""
    name = trained.ranked("sums", None, "cosine", Filter())["id"].iloc[0]
    for path, ready in (
        ("", "#ranking-table tr.data"),
        ("compare", "#comparison tr.data"),
        (f"problem?id={name}", "pre"),
    ):
        page = visit(address + path, scheme="dark", width=1400)
        page.wait_for_selector(ready)
        page.wait_for_selector(".main-svg")
        for width in (1400, 1024, 390):
            looks_right(page, width)
        box = page.locator("td[data-name*=Score], td[data-name*=Cosine]").first.bounding_box()
        assert box["x"] + box["width"] <= 390


def test_a_problem_in_a_browser(address: str, trained: Catalogue, visit: Callable, keep_picture: Callable) -> None:
    """From the ranking to a problem, and on to the one nearest to it; token by token."""
    page = visit(address)
    page.locator("#ranking-table tbody a").first.click()
    name = trained.ranked("sums", None, "cosine", Filter())["id"].iloc[0]
    page.wait_for_selector(f"h3.name:has-text('{name}')")
    page.wait_for_selector("#problem-view .main-svg")
    assert page.locator("#problem-view pre").first.inner_text() == trained.texts([name])[name]
    assert page.locator(".rollout").count() == 8
    assert page.locator(".rollout pre span[title^=probability]").count() > 8
    keep_picture(page, "explorer-problem")
    nearest = trained.nearest(name, None)["id"].iloc[0]
    page.locator("#problem-view table a").first.click()
    page.wait_for_selector(f"h3.name:has-text('{nearest}')")
    choose(page, "problem-rollouts", "all steps")
    page.wait_for_function("document.querySelectorAll('.rollout').length === 24")
    page.locator("#problem-id").fill("nobody <b>")
    page.locator("#problem-id").press("Enter")
    page.wait_for_selector(".missing:has-text('nobody <b>')")
    page.locator("#problem-id").fill(name[:-1])
    page.wait_for_selector(f"#problem-view li a:has-text('{name}')")
    page.locator("#problem-id").fill("")
    page.locator("#problem-id").press("Enter")
    page.wait_for_selector(".missing:has-text('Give a problem')")


def test_comparing_in_a_browser(address: str, trained: Catalogue, visit: Callable, keep_picture: Callable) -> None:
    """Two steps, then two benchmarks; the theme changes and stays."""
    page = visit(address)
    page.locator("#to-compare").click()
    page.wait_for_selector("#comparison .main-svg")
    found = trained.compare(("sums", 0), ("sums", None), "cosine")
    assert page.locator(".tiles dd").first.inner_text() == str(len(found.frame))
    keep_picture(page, "explorer-compare")
    choose(page, "right-benchmark", "spelling")
    page.wait_for_selector("h3:has-text('spelling, newest')")
    page.locator("#toggle").click()
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_timeout(300)
    keep_picture(page, "explorer-compare-dark")
    page.reload()
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_selector("h3:has-text('spelling, newest')")


def test_keyboard_and_names(address: str, visit: Callable) -> None:
    """Skip link first, a name on every control, one first heading."""
    page = visit(address)
    page.wait_for_selector("#ranking-table tbody tr")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator("h1").count() == 1
    for name in ("benchmark", "step", "metric", "order", "text", "sources", "tags", "states"):
        assert page.locator(f"label[for={name}]").inner_text().strip()
    assert page.locator("nav a.here").inner_text() == "Rank"
    assert page.locator("main, nav, header").count() == 3


def test_beyond_this_machine_a_token_is_printed(course: Path) -> None:
    """Without it nothing is told, with it the page is."""
    process, address = started(course, "--host", "0.0.0.0")
    try:
        token = address.partition("?token=")[2]
        assert len(token) >= 40
        local = address.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(local.partition("?")[0])
        asked = urllib.request.Request(local.partition("?")[0], headers={"Authorization": f"Bearer {token}"})
        assert b"<html" in urllib.request.urlopen(asked).read()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def test_the_link_opens_the_page_and_the_token_leaves_the_address(course: Path, visit: Callable) -> None:
    process, link = started(course)
    try:
        assert "?token=" in link
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(link.partition("?")[0])
        page = visit(link)
        page.wait_for_selector("#ranking-table tbody tr")
        assert "token" not in page.url
        page.locator("#to-compare").click()
        page.wait_for_selector("#comparison .main-svg")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def test_a_taken_port_is_one_line(course: Path, address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "gradstore", "serve", str(course / "store"), "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "is taken" in ended.stderr
