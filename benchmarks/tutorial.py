"""Run docs/tutorial.ipynb and keep its outputs in it: `python -m benchmarks.tutorial`. It needs Chromium.

Each plotly figure is kept as its JSON, which notebooks draw, and as a PNG, which is what GitHub shows.
"""

import base64
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
FIGURE = "application/vnd.plotly.v1+json"
SIZE = (760, 400)


def main() -> None:
    """Execute every cell in an empty folder, add the pictures, write the notebook."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # no copy of plotly.js in the notebook
    notebook = nbformat.read(TUTORIAL, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    figures = [out["data"] for out in outputs if FIGURE in out.get("data", {})]
    for data, picture in zip(figures, pictures([data[FIGURE] for data in figures]), strict=True):
        data["image/png"] = picture
    for cell in notebook.cells:
        cell["metadata"].pop("execution", None)  # times of the day
        if "outputs" in cell:  # warnings about this machine's notebook packages are left out
            cell["outputs"] = [out for out in cell["outputs"] if "IProgress" not in str(out.get("text", ""))]
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, TUTORIAL)


def pictures(figures: list[dict[str, Any]]) -> list[str]:
    """Each figure as PNG, in base64."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.set_content("<body style='margin:0'><div id=plot></div></body>")
        page.add_script_tag(content=get_plotlyjs())
        for figure in figures:
            script = (
                "([f, w, h]) => Plotly.newPlot('plot', f.data, {...f.layout, width: w, height: h}, {staticPlot: true})"
            )
            page.evaluate(script + ".then(() => 0)", [json.loads(json.dumps(figure)), *SIZE])
            found.append(base64.b64encode(page.screenshot()).decode())
        browser.close()
    return found


if __name__ == "__main__":
    main()
