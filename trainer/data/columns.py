"""Problems from a file or data set of one's own: which of its columns are what."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.errors import RequestError
from gradstore.trainer.data.answers import plain
from gradstore.trainer.data.catalogue import DataSet

HUB = "hub:"
"""What the name of a data set of one's own on the Hugging Face hub begins with."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a file or data set of one's own."""

    prompt: str
    """Column of the question."""
    truth: str
    """Column of the ground truth."""
    truth_after: str | None = None
    """The ground truth is what follows the last occurrence of this text; None: the whole value."""
    id: str | None = None
    """Column of a stable id; None: a hash of the question."""
    source: str | None = None
    """Column of the source; None: the name of the file or data set."""
    template: str | None = None
    """The prompt with `{COLUMN}` for a column's text; None: the question alone, and `Options.instruction`."""

    def __post_init__(self) -> None:
        if self.prompt == self.truth and self.truth_after is None:
            raise RequestError(f"column {self.prompt!r} cannot hold both the prompt and the ground truth")
        if self.template is not None and not re.search(r"\{[^{}]+\}", self.template):
            raise RequestError(f"template {self.template!r}: names no column; expected text with {{COLUMN}} in it")

    def data_set(self, name: str, split: str | None = None) -> DataSet:
        """A catalogue entry. `hub:USER/NAME[/CONFIG]` is read from the hub; any other name is a file's path."""
        owner, _, rest = name.removeprefix(HUB).partition("/")
        repository, _, config = rest.partition("/")
        of_hub = name.startswith(HUB)
        if of_hub and not repository:
            raise RequestError(f"{name}: expected {HUB}USER/NAME or {HUB}USER/NAME/CONFIG")
        return DataSet(
            repository if of_hub else Path(name).name.partition(".")[0],
            f"{owner}/{repository}",
            split or "train",
            self.prompt,
            self.truth,
            configs=(config,) if of_hub and config else (),
            id=self.id,
            source=self.source,
            template=self.template,
            read_answer=self._answer,
            instruction="",
        )

    def _answer(self, value: Any) -> str:
        text = plain(value)
        if self.truth_after is None:
            return text
        if self.truth_after not in text:
            raise ValueError(f"the answer has no {self.truth_after!r}")
        return plain(text.rpartition(self.truth_after)[2])
