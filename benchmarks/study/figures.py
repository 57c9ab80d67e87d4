"""Figures of the study as SVG; the same rows give the same file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.bed import Bed
from benchmarks.study.statistics import curve, of, share
from gradstore.errors import RequestError

COLOURS = ("#888888", "#000000", "#cc3311", "#0077bb", "#009988", "#ee7733")


def draw_curves(bed: Bed, rows: Sequence[dict[str, Any]], arms: Sequence[str], path: Path) -> None:
    """Draw accuracy by training step of the bed's shown methods, one panel per arm, with 95 % intervals shaded."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(arms), figsize=(3.4 * len(arms), 3.4), sharey=True, squeeze=False)
    for axis, arm in zip(axes[0], arms, strict=True):
        for name, colour in zip(bed.shown, COLOURS, strict=False):
            own = of(rows, arm, name)
            if not own:
                continue
            points = curve(own)
            steps = [k * own[0]["settings"]["steps"] for k in range(len(points))]
            axis.plot(steps, [p.mean for p in points], color=colour, label=name, lw=1.4)
            if len(own) > 1:
                axis.fill_between(steps, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15)
        axis.set_title(f"{arm}\n{bed.arms[arm].title}", fontsize=8)
        axis.set_xlabel("training steps")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out accuracy")
    if axes[0][0].get_legend_handles_labels()[0]:
        axes[0][0].legend(fontsize=7, frameon=False)
    _save(plt, figure, path)


def draw_picks(
    bed: Bed, rows: Sequence[dict[str, Any]], arms: Sequence[str], methods: Sequence[str], path: Path
) -> None:
    """Draw the share of bad problems among the picks, one panel per arm, one bar per method."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(arms), figsize=(3.4 * len(arms), 0.26 * len(methods) + 1), sharey=True, squeeze=False
    )
    for axis, arm in zip(axes[0], arms, strict=True):
        for place, name in enumerate(methods):
            own = of(rows, arm, name)
            if own:
                bad = share(own, "bad")
                colour = COLOURS[bed.shown.index(name)] if name in bed.shown else "#bbbbbb"
                axis.barh(place, bad.mean, xerr=bad.half if len(own) > 1 else None, color=colour, error_kw={"lw": 0.8})
        axis.set_yticks(range(len(methods)), methods, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(arm, fontsize=8)
        axis.set_xlabel("share of bad picks")
        axis.set_xlim(0, 1)
    _save(plt, figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise RequestError("the study's figures need matplotlib: pip install 'gradstore[plots]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gradstore"
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
