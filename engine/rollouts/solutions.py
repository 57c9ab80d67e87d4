"""Reference solutions as groups: a benchmark's target without rollouts.

The gradient of a problem is that of its solution's mean token log-likelihood, as LESS takes a validation row's (arXiv
2402.04333); it points the same way as a policy gradient, up. A problem keeps its solution in the field `solution` of
its `extra` (or of `extra_info` in verl's form); `gradstore data --solutions` puts it there.

Rows of solutions have a collection of their own, `solutions_of("amc")`, and share the store's projection, so they are
compared with rows of rollouts but never averaged with them unseen (searching/targets.py, `Target.kind`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gradstore.engine.rollouts import tokens
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.templates import tools_of
from gradstore.errors import RequestError
from gradstore.layout import SOLUTIONS
from gradstore.problems import detail

FIELD = "solution"
"""Field of a problem's `extra` that has its reference solution."""


def solutions_of(benchmark: str) -> str:
    """Name of the collection of a benchmark's solutions; the same name for such a collection itself."""
    return benchmark if benchmark.endswith(SOLUTIONS) else benchmark + SOLUTIONS


def solution_groups(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    append_eos: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Group]:
    """One group per problem record: its prompt, and its solution as the one response.

    append_eos: end each solution in the end-of-sequence token, as a response ends. RequestError for a record without a
    solution, naming it: a target of some of the problems would be another target.
    """
    if append_eos and getattr(tokenizer, "eos_token_id", None) is None:
        raise RequestError("append_eos needs a tokenizer with an end-of-sequence token")
    return [_group(record, tokenizer, append_eos, template_kwargs) for record in records]


def solution_text(record: Mapping[str, Any]) -> str:
    """The problem's reference solution; RequestError for a problem that has none."""
    text = detail(record, FIELD)
    if isinstance(text, str) and text.strip():
        return text.strip()
    kind = "missing" if text is None else "empty" if isinstance(text, str) else "no text"
    raise RequestError(
        f"problem {record['id']!r}: field 'extra.{FIELD}' is {kind}, expected its reference solution "
        "(`gradstore data --solutions`)"
    )


def _group(
    record: Mapping[str, Any], tokenizer: Any, append_eos: bool, template_kwargs: Mapping[str, Any] | None
) -> Group:
    name = f"problem {record['id']!r}"
    prompt = tokens.prompt_ids(
        tokenizer, record["prompt"], name, tools=tools_of(record, name), arguments=dict(template_kwargs or {})
    )
    response = tokens.response_ids(tokenizer, solution_text(record), append_eos=append_eos)
    return Group(record["id"], prompt, [response], np.ones(1), solution=True)
