"""A planted history: a store whose drift, noise, clusters and picks are known, because they were put there.

Dimension letters: S steps, P problems, V problems of a benchmark, D sketch dimensions.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore import State, Store

DIM = 24
LAYOUT = [["a", 0, 10], ["b", 10, 16], ["c", 16, DIM]]
N_BENCHMARK = 30


@dataclass
class History:
    """What was written, as arrays."""

    store: Store
    steps: list[int]
    ids: list[str]
    sources: list[str]
    rows_SPD: np.ndarray
    """The gradient of every problem as of each step (that of its newest row), float64; nan before its first row."""
    measured_SP: np.ndarray
    """bool: a row was written at that step."""
    states_SP: np.ndarray
    rates_SP: np.ndarray
    bench_SVD: np.ndarray

    def target(self, s: int) -> np.ndarray:
        """Mean gradient of the benchmark at the step with number s, float64 [D]."""
        return self.bench_SVD[s].mean(axis=0)

    def cosine(self, s: int, p: int, at: int | None = None) -> float:
        """Of the row known at step number s with the target at step number `at` (None: s)."""
        row_D, target_D = self.rows_SPD[s, p], self.target(s if at is None else at)
        return float(row_D @ target_D / (np.linalg.norm(row_D) * np.linalg.norm(target_D)))


def write_history(
    path: Path,
    along_SP: np.ndarray,
    *,
    steps: Sequence[int] | None = None,
    noise: float = 0.3,
    rotation: float = 0.0,
    n_sources: int = 3,
    source_strength: float = 1.0,
    source_signs: np.ndarray | None = None,
    measured_SP: np.ndarray | None = None,
    states_SP: np.ndarray | None = None,
    rates_SP: np.ndarray | None = None,
    tags: Sequence[Sequence[str]] | None = None,
    picks: Sequence[Sequence[int]] | None = None,
    other_target: np.ndarray | None = None,
    seed: int = 0,
    dtype: str = "fp32",
) -> History:
    """Write a store with `pool` and `bench` (and `other`, where a direction for it is given).

    along_SP: true length of each problem's gradient along the benchmark's direction at each step. That direction turns
    by `rotation` radians a step in the plane of the first two dimensions. Dimension 2 + k is that of source k. noise:
    standard deviation of each entry of each measurement. picks: places picked in a round at each step.
    """
    n_steps, n = along_SP.shape
    random = np.random.default_rng(seed)
    steps = list(range(0, 10 * n_steps, 10)) if steps is None else list(steps)
    measured_SP = np.ones((n_steps, n), bool) if measured_SP is None else measured_SP
    states_SP = np.full((n_steps, n), State.LIVE) if states_SP is None else states_SP
    rates_SP = np.full((n_steps, n), 0.5) if rates_SP is None else rates_SP
    signs_P = np.ones(n) if source_signs is None else source_signs
    ids, sources = [f"p{p:04d}" for p in range(n)], [f"s{p % n_sources}" for p in range(n)]
    store = gradstore.create(path, dim=DIM, fingerprint={"layout": LAYOUT}, dtype=dtype)
    records = [
        {"id": name, "prompt": f"What is {name}?", "source": sources[p], "tags": list(tags[p]) if tags else []}
        for p, name in enumerate(ids)
    ]
    store.add_problems("pool", records)
    targets = {"bench": np.eye(DIM)[0]} | ({} if other_target is None else {"other": other_target})
    for name in targets:
        store.add_problems(name, [{"id": f"{name}{v}", "prompt": "?"} for v in range(N_BENCHMARK)])
    own_PD = np.zeros((n, DIM))
    own_PD[np.arange(n), 2 + np.arange(n) % n_sources] = source_strength * signs_P
    rows_SPD = np.full((n_steps, n, DIM), np.nan)
    bench_SVD = np.zeros((n_steps, N_BENCHMARK, DIM))
    for s, step in enumerate(steps):
        direction_D = np.cos(rotation * step) * np.eye(DIM)[0] + np.sin(rotation * step) * np.eye(DIM)[1]
        rows_PD = along_SP[s][:, None] * direction_D + own_PD + noise * random.normal(size=(n, DIM))
        here = np.flatnonzero(measured_SP[s])
        with store.writer("pool", step=step) as writer:
            writer.append(
                [ids[p] for p in here],
                rows_PD[here].astype(np.float32),
                state=[State(int(states_SP[s, p])) for p in here],
                pass_rate=rates_SP[s, here].astype(np.float32),
                n_rollouts=np.full(len(here), 16),
                reason=["broken" if states_SP[s, p] == State.FAILED else "" for p in here],
            )
        if s:
            rows_SPD[s] = rows_SPD[s - 1]
        rows_SPD[s, here] = np.where(states_SP[s, here, None] == State.LIVE, rows_PD[here], np.nan)
        for name, vector_D in targets.items():
            about_D = direction_D if name == "bench" else vector_D
            bench_SVD[s] = about_D + noise * random.normal(size=(N_BENCHMARK, DIM))
            with store.writer(name, step=step) as writer:
                writer.append([f"{name}{v}" for v in range(N_BENCHMARK)], bench_SVD[s].astype(np.float32))
            if name == "bench":
                kept = bench_SVD[s].copy()
        bench_SVD[s] = kept
        if picks is not None:
            store.rounds("pool").add(about(step, len(picks[s])), round_table(ids, picks[s], rates_SP[s], step))
    return History(store, steps, ids, sources, rows_SPD, measured_SP, states_SP, rates_SP, bench_SVD)


def about(step: int, n: int) -> dict[str, Any]:
    return {"step": step, "selector": "planted", "seed": 0, "benchmarks": ["bench"], "settings": {"n": n}}


def round_table(ids: Sequence[str], picked: Sequence[int], rates_P: np.ndarray, step: int) -> pa.Table:
    """Every problem a candidate, some picked, in order."""
    n = len(ids)
    ranks = np.full(n, -1, np.int64)
    ranks[list(picked)] = np.arange(len(picked))
    return pa.table(
        {
            "id": list(ids),
            "score": np.zeros(n),
            "low": np.full(n, np.nan),
            "high": np.full(n, np.nan),
            "state": ["live"] * n,
            "step": np.full(n, step, np.int64),
            "pass_rate": np.asarray(rates_P, np.float64),
            "rolled_out": np.ones(n, bool),
            "picked": ranks,
            "weight": np.ones(n),
            "rollouts": np.full(n, 16, np.int64),
        }
    )


@pytest.fixture
def make_history(tmp_path: Path) -> Callable[..., History]:
    """`write_history` in a folder of its own."""
    return lambda along_SP, **settings: write_history(tmp_path / "store", np.asarray(along_SP, float), **settings)


@pytest.fixture
def history(make_history: Callable[..., History]) -> History:
    """Four steps of 60 problems, refreshed at some of them, some without signal, one failed; a round at each step."""
    random = np.random.default_rng(3)
    measured_SP = random.random((4, 60)) < 0.6
    measured_SP[0] = True
    measured_SP[0, :3] = False  # measured first at a later step, or never
    measured_SP[:, 0] = False
    measured_SP[-1, 1:3] = True
    states_SP = np.full((4, 60), State.LIVE)
    states_SP[1, ::9], states_SP[2, 5] = State.NO_SIGNAL, State.FAILED
    return make_history(
        random.normal(size=(4, 60)),
        measured_SP=measured_SP,
        states_SP=states_SP,
        rates_SP=random.integers(0, 17, (4, 60)) / 16,
        tags=[["even"] if p % 2 == 0 else ["odd", "third"][: 1 + (p % 3 == 0)] for p in range(60)],
        picks=[random.choice(np.flatnonzero(measured_SP[:1].any(0)), 12, replace=False).tolist() for _ in range(4)],
        rotation=0.02,
    )


ARTEFACTS = Path(__file__).parents[2] / "artefacts"
"""Screenshots of the last test run, for people to look at."""


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training run of the demo's model: `store`, with three rounds, and `rollouts/`."""
    from gradstore.demo.course import CourseSettings, run_course

    folder = tmp_path_factory.mktemp("course")
    run_course(folder, CourseSettings())
    return folder


@dataclass
class Made:
    """A report of the demo's short run, as values and as a file."""

    store: Store
    page: Any
    path: Path


@pytest.fixture(scope="session")
def made(course: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The report of the short run, with its rollouts."""
    from gradstore.analysis.report import write_report
    from gradstore.demo.course import ROLLOUTS
    from gradstore.demo.run import MODEL
    from gradstore.engine.gradients.models import load_tokenizer

    store = gradstore.open(course / "store")
    path = tmp_path_factory.mktemp("report") / "report.html"
    page = write_report(store, path, rollouts=[course / ROLLOUTS], tokenizer=load_tokenizer(MODEL))
    return Made(store, page, path)


@pytest.fixture(scope="session")
def trained(course: Path) -> Any:
    """A catalogue of the explorer over the short run, with its rollout files."""
    from gradstore.analysis.explorer.catalogue import Catalogue
    from gradstore.analysis.report.transcripts import Transcripts
    from gradstore.demo.course import ROLLOUTS
    from gradstore.demo.run import MODEL
    from gradstore.engine.gradients.models import load_tokenizer

    transcripts = Transcripts([course / ROLLOUTS], load_tokenizer(MODEL))
    return Catalogue(gradstore.open(course / "store"), "pool", ("sums", "spelling"), transcripts)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests fail, rather than skip, where there is none."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("no Chromium on this machine: `make browser`, or install the package chromium")
    quiet = ["quic", "first-run", "background-networking", "component-update", "sync", "gpu"]
    flags = ["--no-first-run" if name == "first-run" else f"--disable-{name}" for name in quiet]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *flags])
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(address, scheme="light") -> a page; the test fails on any error it logs and any request that leaves it."""
    contexts, faults = [], []

    def told(kind: str, text: str) -> None:
        faults.append(f"{kind}: {text}")

    def go(address: str, scheme: str = "light", width: int = 1360) -> Any:
        context = browser.new_context(
            color_scheme=scheme,
            viewport={"width": width, "height": 900},
            reduced_motion="reduce",  # a page that still scrolls moves its links between press and release
        )
        context.set_default_timeout(90_000)  # a machine that is busy is slow, not wrong
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and told(said.type, said.text))
        page.on("pageerror", lambda error: told("exception", str(error)))
        page.on("requestfailed", lambda request: told("failed", request.url))
        home = address.split("/")[2] if address.startswith("http") else None
        local = ("data:", "blob:", "file:" if home is None else f"http://{home}/")
        page.on("request", lambda request: None if request.url.startswith(local) else told("left", request.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not faults, faults


LOOKED_AT = """() => {
  const found = [], whole = document.documentElement, wide = whole.clientWidth;
  const name = (one) => one.id || one.className || one.tagName;
  if (whole.scrollWidth > wide) found.push(`the page is ${whole.scrollWidth} wide`);
  const shown = (one) => one.checkVisibility() && !one.closest(".aside, .skip");
  for (const one of document.querySelectorAll("body *:not(svg *)")) {
    if (shown(one) && one.getBoundingClientRect().right > wide + 1) found.push(`${name(one)} goes over the edge`);
  }
  for (const one of document.querySelectorAll(".scroll th, .scroll td")) {
    const box = one.getBoundingClientRect(), around = one.closest(".scroll").getBoundingClientRect();
    if (shown(one) && box.width && box.right > around.right + 1) found.push(`cut: ${one.textContent.slice(0, 40)}`);
  }
  for (const one of document.querySelectorAll("p, caption, figcaption")) {
    const words = one.innerText.trim().split(/\\s+/).length, line = parseFloat(getComputedStyle(one).lineHeight) || 24;
    const tall = one.getBoundingClientRect().height > 0.7 * words * line;
    if (shown(one) && words > 4 && tall) found.push(`a word a line: ${one.innerText.slice(0, 40)}`);
  }
  for (const one of document.querySelectorAll("main *:not(pre, svg *, input)")) {
    const style = getComputedStyle(one);
    const cut = one.scrollHeight > one.clientHeight + 2 || one.scrollWidth > one.clientWidth + 2;
    const hides = style.textOverflow === "ellipsis" || style.webkitLineClamp !== "none";
    if (shown(one) && hides && cut && !one.closest("tr")?.querySelector("td.open button, a")) {
      found.push(`cut, and cannot be opened: ${one.innerText.slice(0, 40)}`);
    }
  }
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const around = plot.getBoundingClientRect(), bar = plot.querySelector(".modebar")?.getBoundingClientRect();
    for (const text of plot.querySelectorAll(".main-svg text")) {
      const box = text.getBoundingClientRect(), inside = box.left >= around.left - 2 && box.right <= around.right + 2;
      if (box.width && !(inside && box.top >= around.top - 2 && box.bottom <= around.bottom + 2)) {
        found.push(`clipped label: ${text.textContent}`);
      }
    }
    const legend = plot.querySelector(".legend")?.getBoundingClientRect();
    const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    if (legend && bar && bar.width && !apart(legend, bar)) found.push("the tool bar lies on a legend");
  }
  return [...new Set(found)];
}"""
"""Lists what is wider than the window, cut at its table's edge, clipped in a figure, a word a line, or covered."""


@pytest.fixture
def looks_right() -> Callable[[Any, int], None]:
    """looks_right(page, width): nothing of a page is cut or hidden in a window of that width."""

    def check(page: Any, width: int) -> None:
        page.set_viewport_size({"width": width, "height": 900})
        for _ in range(40):  # figures and tables follow the window, on a busy machine after seconds
            page.wait_for_timeout(400)
            found = page.evaluate(LOOKED_AT)
            if not found:
                break
        assert found == []

    return check


@pytest.fixture
def keep_picture() -> Callable[[Any, str], None]:
    """keep_picture(page, name): a screenshot of the whole page among the artefacts."""
    ARTEFACTS.mkdir(exist_ok=True)
    return lambda page, name: page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)
