"""Size of a large store's report, time to make it, and time to open it.

    python -m benchmarks.report [--problems 100000] [--steps 3] [--dim 256] [--repeats 5] [--folder DIR]

A pool with texts of about 600 characters, two benchmarks and a round at each step are made in a temporary folder and
removed afterwards. Opening is timed in headless Chromium, with a new context each time: until the page's script has
finished and its tables are there, and until the first figure is drawn.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

import gradstore
from gradstore import State, Store
from gradstore.analysis.report import write_report
from gradstore.cli.show import print_table

_TEXT = "find the number of ways in which a train leaves before two of three integers meet so that x holds"
_WORDS = np.array(_TEXT.split())


def main(
    problems: Annotated[int, typer.Option(help="Problems of the pool.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Steps, each with every problem measured and a round.")] = 3,
    dim: Annotated[int, typer.Option(help="Sketch dimensions.")] = 256,
    repeats: Annotated[int, typer.Option(help="Times the page is opened.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary folder is made.")] = None,
) -> None:
    """Make a store and its report, open the report, and print sizes and times."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        store = synthetic(Path(made) / "store", problems, steps, dim)
        page = Path(made) / "report.html"
        started, spent = time.perf_counter(), time.process_time()
        write_report(store, page)
        rows = [
            ["make the report", f"{time.perf_counter() - started:.1f} s ({time.process_time() - spent:.1f} s of CPU)"]
        ]
        rows.append(["size", f"{page.stat().st_size / 1e6:.2f} MB"])
        ready, drawn = opened(page, repeats)
        rows.append(["open, tables there", _spread(ready)])
        rows.append(["open, first figure drawn", _spread(drawn)])
        print_table(f"report of {problems:,} problems, {steps} steps, {dim} dimensions", ["what", "measured"], rows)


def synthetic(path: Path, n: int, n_steps: int, dim: int, seed: int = 0) -> Store:
    """Make a store: a pool in 20 sources, two benchmarks of 200 problems, and a round at each step."""
    random = np.random.default_rng(seed)
    layout = [[f"model.layers.{layer}.mlp", layer * dim // 8, (layer + 1) * dim // 8] for layer in range(8)]
    store = gradstore.create(path, dim=dim, fingerprint={"model": "synthetic", "layout": layout})
    sources = random.normal(size=(20, dim))
    for name, count in (("pool", n), ("first", 200), ("second", 200)):
        kinds = random.integers(0, 20, count) if name == "pool" else np.full(count, 0 if name == "first" else 1)
        words = random.integers(0, len(_WORDS), (count, 120))
        ids = [f"{name}-{p:06d}" for p in range(count)]
        store.add_problems(
            name,
            (
                {"id": one, "source": f"source-{kind}", "prompt": " ".join(_WORDS[line]), "ground_truth": "42"}
                for one, kind, line in zip(ids, kinds, words, strict=True)
            ),
        )
        for step in range(n_steps):
            with store.writer(name, step=10 * step) as writer:
                for first in range(0, count, 20_000):
                    part = slice(first, first + 20_000)
                    rows = (sources[kinds[part]] + 2 * random.normal(size=(len(kinds[part]), dim))).astype(np.float32)
                    rates = random.integers(0, 17, len(rows)) / 16
                    silent = (rates == 0) | (rates == 1)
                    rows[silent] = 0
                    states = [State.NO_SIGNAL if one else State.LIVE for one in silent]
                    counts = np.full(len(rows), 16)
                    writer.append(ids[part], rows, state=states, pass_rate=rates, n_rollouts=counts)
            if name == "pool":
                _round(store, ids, 10 * step, random)
    return gradstore.open(path)


def _round(store: Store, ids: list[str], step: int, random: np.random.Generator) -> None:
    n = len(ids)
    order = random.permutation(n)[: n // 20]
    picked = np.full(n, -1)
    picked[order] = np.arange(len(order))
    columns: dict[str, Any] = {name: np.zeros(n) for name in ("score", "low", "high")}
    columns["pass_rate"] = random.integers(0, 17, n) / 16
    columns |= {"id": ids, "state": ["live"] * n, "step": np.full(n, step), "rolled_out": np.ones(n, bool)}
    columns |= {"picked": picked, "weight": np.ones(n), "rollouts": np.full(n, 16)}
    costs = {"rollouts": 600.0, "sketches": 90.0, "selection": 1.0, "training": 1800.0}
    about = {"step": step, "selector": "rand", "benchmarks": ["first"], "costs": costs, "rollouts": 16 * n}
    store.rounds("pool").add(about, pa.table(columns))


def opened(page: Path, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """(seconds until the tables are there, seconds until the first figure is drawn), [repeats] each."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    found = []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        for _ in range(repeats + 1):
            tab = browser.new_page(viewport={"width": 1360, "height": 900})
            started = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="commit")
            tab.wait_for_selector("html[data-ready=yes]", state="attached")
            ready = time.perf_counter() - started
            tab.locator("[data-figure]").first.scroll_into_view_if_needed()
            tab.wait_for_selector("[data-drawn=yes]", state="attached")
            found.append((ready, time.perf_counter() - started))
            tab.close()
        browser.close()
    ready_drawn = np.array(found[1:])
    return ready_drawn[:, 0], ready_drawn[:, 1]


def _spread(seconds: np.ndarray) -> str:
    return f"{np.median(seconds):.2f} s ({seconds.min():.2f}-{seconds.max():.2f})"


if __name__ == "__main__":
    typer.run(main)
