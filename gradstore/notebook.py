"""Notebook display of stores, views, hits and selections (a line of facts and a small table, all text escaped), and
frames of other libraries."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import needing
from gradstore.state import State

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

SHOWN = 10
"""Most rows shown in a table; further rows are only counted."""

_CELL = "padding: 2px 10px; text-align: {side};"


def html_table(title: str, facts: str, columns: Sequence[str], rows: Sequence[Sequence[object]], n_rows: int) -> str:
    """HTML for `_repr_html_`: title and facts, then at most SHOWN of n_rows rows; numbers are right-aligned."""
    heads = "".join(f'<th scope="col" style="{_CELL.format(side="left")}">{escape(name)}</th>' for name in columns)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:SHOWN])
    more = f"<div>… {n_rows - SHOWN:,} more</div>" if n_rows > SHOWN else ""
    return (
        f"<div><strong>{escape(title)}</strong> <span>{escape(facts)}</span>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{more}</div>"
    )


def as_polars(frame: "pd.DataFrame") -> "pl.DataFrame":
    """A pandas frame as one of polars; RequestError if polars is not installed."""
    with needing("to_polars", "polars"):
        import polars as pl

    return pl.DataFrame({name: column.to_list() for name, column in frame.items()})


def rows_html(title: str, states_N: np.ndarray, columns: Mapping[str, np.ndarray]) -> str:
    """HTML of N stored rows: how many are in each state, and the columns of the first rows, "state" in words."""
    words = [state.name.lower().replace("_", " ") for state in State]
    facts = ", ".join(f"{int((states_N == state).sum()):,} {words[state]}" for state in State)
    shown = {name: column.tolist() for name, column in columns.items()}
    shown["state"] = [words[state] for state in shown["state"]]
    return html_table(title, facts, list(shown), list(zip(*shown.values(), strict=True)), len(states_N))


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = ("–" if value != value else f"{value:,.4g}") if isinstance(value, float) else str(value)
    return f'<td style="{_CELL.format(side="right" if number else "left")}">{escape(text)}</td>'
