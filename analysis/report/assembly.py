"""Assemble the page, section by section, from the findings."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

from gradstore.analysis.report import choices, concerns, holdings, listing, makeup, movement
from gradstore.analysis.report.caveats import caveats
from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import Figure, Page, Section, written
from gradstore.analysis.report.results import results
from gradstore.analysis.report.transcripts import Transcripts
from gradstore.errors import RequestError


def assemble(
    found: Findings, transcripts: Transcripts | None = None, tell: Callable[[str], None] = lambda line: None
) -> Page:
    """Make every section of the report; `tell` is called with each section's title before it is made."""
    makers: list[tuple[str, str, Callable[[], Section]]] = [
        ("problems", "Problems", lambda: listing.extremes(found, transcripts)),
        ("selections", "Selections", lambda: choices.selections(found)),
        ("sources", "Sources", lambda: makeup.sources(found)),
        ("suspects", "Suspicious rewards", lambda: concerns.suspects(found)),
        ("turned", "Turned problems", lambda: concerns.turned(found)),
        ("conflicts", "Conflicts", lambda: concerns.disagreeing(found)),
        ("clusters", "Clusters", lambda: makeup.clustered(found)),
        ("timeline", "Timeline", lambda: holdings.timeline(found)),
        ("drift", "Drift", lambda: movement.drifting(found)),
        ("layers", "Layers", lambda: concerns.through_layers(found)),
        ("costs", "Costs", lambda: choices.costs(found)),
        ("holdings", "What the store holds", lambda: holdings.holdings(found)),
    ]
    sections = []
    for key, title, make in makers:
        tell(title)
        try:
            sections.append(_without_single_points(make()))
        except RequestError as error:  # for example rows of several bases: the section shows the reason
            sections.append(Section(key, title, missing=f"This store cannot tell: {error}"))
    path = found.store.path.resolve()
    model = found.store.fingerprint.get("model")
    named = (model.get("name") or model.get("architecture")) if isinstance(model, dict) else model
    against = ", ".join(found.benchmarks) or "no benchmark"
    subtitle = f"{path.name} · {found.pool} against {against} · {found.metric}" + (f" · {named}" if named else "")
    made = (
        f"Made by gradstore {version('gradstore')} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {path.name}, commits "
    )
    made += ", ".join(f"{name} {found.store.commit(name)}" for name in (found.pool, *found.benchmarks)) + "."
    return Page(_title(found), subtitle, _tiles(found), caveats(found), sections, made, results(found))


def _without_single_points(section: Section) -> Section:
    """A line chart of one point says less than its numbers: a table in its place."""
    blocks = [one.as_table() if isinstance(one, Figure) and one.is_one_point else one for one in section.blocks]
    return replace(section, blocks=blocks)


def _title(found: Findings) -> str:
    steps = found.steps
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"Curriculum report, {span}"


def _tiles(found: Findings) -> list[tuple[str, str]]:
    about = found.about["collections"]
    states = about[found.pool]["states"]
    measured = max(1, sum(states.values()))
    size = sum(collection["bytes"] for collection in about.values())
    return [
        ("Problems in the pool", written(about[found.pool]["problems"], "integer")),
        ("With a gradient", written(states["live"] / measured, "percent")),
        ("Benchmarks", written(len(found.benchmarks), "integer")),
        ("Steps measured", written(len(found.steps), "integer")),
        ("Rounds", written(len(found.rounds), "integer")),
        ("Rows", written(sum(collection["rows"] for collection in about.values()), "integer")),
        ("On disk", written(size, "bytes")),
    ]
