"""Options for a file or data set of one's own, whose columns are named: those of `data` and `rollout`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from gradstore.cli.app import opt
from gradstore.cli.show import say
from gradstore.errors import RequestError
from gradstore.wording import first_words

if TYPE_CHECKING:
    from gradstore.trainer.data.columns import Columns
    from gradstore.trainer.data.pool import Part

Prompt = Annotated[str | None, opt("Column of the question, in a file or data set of one's own.")]
Truth = Annotated[str | None, opt("Column of the ground truth.")]
TruthAfter = Annotated[str | None, opt("Take what follows this text in --truth, such as '####'.")]
Id = Annotated[str | None, opt("Column of a stable id [default: a hash of the question].", "--id")]
Source = Annotated[str | None, opt("Column of the source [default: the name of the file or data set].")]
Template = Annotated[str | None, opt("The prompt with {COLUMN} for the text of a column.")]

PANEL, NAMES = "A file or data set of one's own", "prompt truth truth_after id source template"
"""Heading in the help, and the parameters under it."""


def columns(
    prompt: str | None,
    truth: str | None,
    truth_after: str | None,
    id: str | None,
    source: str | None,
    template: str | None,
) -> "Columns | None":
    """The columns that were named; None if none was; RequestError for some without the two that are needed."""
    from gradstore.trainer.data.columns import Columns

    if prompt is None and truth is None:
        if any((truth_after, id, source, template)):
            raise RequestError(
                "--truth-after, --id, --source and --template go with --prompt COLUMN and --truth COLUMN"
            )
        return None
    if prompt is None or truth is None:
        raise RequestError("a file or data set of one's own needs --prompt COLUMN and --truth COLUMN")
    return Columns(prompt, truth, truth_after, id, source, template)


def parts(sources: Sequence[str], count: int | None = None, size: int | None = None) -> "list[Part]":
    """The sources on a command line, taken apart: NAME[@SPLIT][:COUNT]; a count of 0.9 is a share of size."""
    from gradstore.trainer.data.columns import HUB
    from gradstore.trainer.data.loading import SUFFIXES
    from gradstore.trainer.data.pool import Part

    found = []
    for text in sources:
        name, colon, number = text.rpartition(":")
        if not colon or not number or not (number[0].isdigit() or number[0] in ".-"):
            name, number = text, ""
        wanted = count
        if number:
            try:
                value = float(number) if "." in number else int(number)
            except ValueError:
                raise RequestError(f"{text}: the count is {number!r}, expected a whole number or a share") from None
            if isinstance(value, float):
                if size is None or not 0 < value <= 1:
                    raise RequestError(f"{text}: a share needs --size and lies between 0 and 1")
                value = round(value * size)
            wanted = value
        whole, at, split = name.rpartition("@")
        if name.startswith(HUB) and name.count(":") > 1:
            whole, at, split = name.rpartition(":")
        named_split = bool(at) and not name.endswith(SUFFIXES)
        found.append(Part(whole, wanted, split) if named_split else Part(name, wanted))
    return found


def say_first(records: Sequence[dict[str, Any]]) -> None:
    """Shows how the columns were taken: the first problem."""
    first = records[0]
    text = first["prompt"] if isinstance(first["prompt"], str) else first["prompt"][-1]["content"]
    truth = first_words(first["ground_truth"])
    say(f"the first, {first['id']}: {first_words(text, 200)!r}, ground truth {truth!r}")
