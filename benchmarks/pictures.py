"""Pictures of the report and the explorer, to be looked at one by one: `python -m benchmarks.pictures RUN`.

RUN: folder of a training run, as `gradstore demo` leaves it: store/ and rollouts/. Every page at three widths, light
and dark, whole, cut into pieces that can be seen at once: OUT/NAME-WIDTH-SCHEME-NN.png. It needs Chromium.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (1400, 1024, 390)
SCHEMES = ("light", "dark")
TALL = 1800
"""Pixels of a piece's height."""


def main() -> None:
    """Write a report of the run, serve its explorer, and take the pictures of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("artefacts/pages"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shown = [str(options.run / "store"), "--rollouts", str(options.run / "rollouts")]
    report = (options.out / "report.html").resolve()
    subprocess.run([*GRADSTORE, "report", *shown, "--out", report, "--overwrite"], check=True)
    with explorer(shown) as address, chromium() as browser:
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = browser.new_page(color_scheme=scheme, reduced_motion="reduce")
                page.set_viewport_size({"width": width, "height": 900})
                name = f"{width}-{scheme}"
                page.goto(report.as_uri())
                page.wait_for_selector("html[data-ready=yes]")
                for figure in page.locator("[data-figure]").all():  # drawn when seen
                    figure.scroll_into_view_if_needed()
                keep(page, options.out / f"report-{name}")
                page.goto(address)
                page.wait_for_selector("#ranking-table tbody a")
                keep(page, options.out / f"ranking-{name}")
                problem = page.locator("#ranking-table tbody a").first.get_attribute("href")
                for kind, path in (("problem", problem), ("compare", "/compare")):
                    page.goto(address.rstrip("/") + str(path))
                    page.wait_for_load_state("networkidle")
                    keep(page, options.out / f"{kind}-{name}")
                page.close()


GRADSTORE = [sys.executable, "-m", "gradstore"]


@contextmanager
def explorer(shown: list[str]) -> Iterator[str]:
    """The address of an explorer of the store."""
    with subprocess.Popen(
        [*GRADSTORE, "serve", *shown, "--port", "0", "--no-token"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            found = (re.search(r"http://\S+", line) for line in process.stderr or ())
            yield next(match.group() for match in found if match)
        finally:
            process.kill()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


def keep(page: Any, start: Path) -> None:
    """Write the whole page in pieces."""
    from PIL import Image

    page.wait_for_timeout(1500)  # figures follow the window
    page.evaluate("scrollTo(0, 0)")
    whole = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    for old in start.parent.glob(f"{start.name}-*.png"):
        old.unlink()
    for number, top in enumerate(range(0, whole.height, TALL)):
        piece = whole.crop((0, top, whole.width, min(top + TALL, whole.height)))
        piece.save(start.with_name(f"{start.name}-{number:02}.png"))


if __name__ == "__main__":
    main()
