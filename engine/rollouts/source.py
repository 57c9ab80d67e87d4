"""Rollout files as a stream of groups; all rows are checked before the first group is computed.

`read_rollouts` reads the files once. That pass checks every row and keeps only integers per row: its problem, its file
and its place. `RolloutSource.groups()` then fetches one problem's rows at a time. So rows may come in any order, and
memory does not grow with the size of the rows. A fault in the last row is found before hours of work.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.engine.rollouts import tokens
from gradstore.engine.rollouts.formats import COLUMNS, FORMATS, TRL, detect_format, names_in, names_of, with_rewards
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.rollout import OVERLONG, STOPPED, Rollout
from gradstore.engine.rollouts.row import read_row
from gradstore.engine.rollouts.templates import check_arguments, kept_arguments, prompt_text, tools_of
from gradstore.errors import RequestError, check_known
from gradstore.reading.columns import check_columns
from gradstore.reading.files import RowFile
from gradstore.reading.opening import files_at, open_rows

log = logging.getLogger(__name__)

_CHOOSE = "choose one with step= (collect --rollout-step)"
_LOGPROBS = ("logprobs", "reference_logprobs")


class RolloutSource:
    """Checked rollouts of one policy version, by problem in order of first appearance. Made by `read_rollouts`."""

    format: str
    """One of gradstore.engine.rollouts.FORMATS."""
    step: int | None
    """The policy version that sampled the rollouts, if stated; t - 1 for verl's training dump of trainer step t."""
    problem_ids: list[str]
    n_rollouts: int
    """Number of rollouts; several outputs of one count once."""
    counts: np.ndarray
    """Rollouts of each problem, int64 [P], in the order of problem_ids."""
    has_logprobs: bool
    """Whether every rollout has the behaviour policy's log-probabilities."""
    has_reference: bool
    """Whether any rollout has a reference policy's log-probabilities; problems without signal need none."""

    def __init__(
        self,
        files: Sequence[RowFile],
        format: str,
        tokenizer: Any,
        append_eos: bool,
        step: int | None,
        known: Mapping[str, dict] | None,
        vocabulary: int | None,
        arguments: Mapping[str, Any],
    ) -> None:
        self.format = format
        self._files, self._tokenizer, self._append_eos = list(files), tokenizer, append_eos
        self._known = known
        self._changed: Callable[[Group], Group] = lambda group: group
        self._known_by_id = None if known is None else {record["id"]: record for record in known.values()}
        self._vocabulary, self._arguments = vocabulary, dict(arguments)
        self._index(step)

    def __len__(self) -> int:
        return len(self.problem_ids)

    def records(self) -> Iterator[dict[str, Any]]:
        """The problems as canonical records (see Store.add_problems), each from its first rollout.

        A prompt known only as token ids is decoded by the tokenizer; without a tokenizer it is "[token ids] 5 17 ...".
        """
        for problem in range(len(self)):
            rollout = self._fetch(self._starts[problem : problem + 1])[0]
            if self._known_by_id is not None:
                yield self._known_by_id[rollout.problem_id]
                continue
            prompt = rollout.prompt
            if prompt is None and rollout.prompt_ids is not None:
                ids = rollout.prompt_ids.tolist()
                prompt = f"[token ids] {' '.join(map(str, ids))}" if self._tokenizer is None else self._decode(ids)
            yield {
                "id": rollout.problem_id,
                "source": rollout.source,
                "prompt": prompt,
                "ground_truth": rollout.ground_truth,
                "tags": rollout.tags,
                "extra": {name: value for name, value in rollout.extra.items() if name not in (STOPPED, OVERLONG)},
            }

    def rollouts(self, ids: Iterable[str] | None = None) -> Iterator[list[Rollout]]:
        """The rollouts of each problem, or of those in `ids`, unchanged from the files."""
        for problem in self._chosen(ids):
            yield self._fetch(range(self._starts[problem], self._starts[problem + 1]))

    def groups(self, ids: Iterable[str] | None = None) -> Iterator[Group]:
        """The groups of all problems, or of those in `ids`, in order of first appearance, read one at a time.

        Raises RequestError for an unknown id, for a chat template that refuses a prompt, and for a file that changed
        since it was checked.
        """
        chosen = self._chosen(ids)  # ids are checked at the call, not at the first group
        return (self._changed(self._group(self._fetch(range(self._starts[p], self._starts[p + 1])))) for p in chosen)

    def change(self, change: Callable[[Group], Group]) -> None:
        """Apply `change` to every group from now on; example: an `engine.Reference`."""
        self._changed = change

    def _index(self, step: int | None) -> None:
        """Check every row and sort the places by problem."""
        problem_of, file_of, places, sizes = array("q"), array("q"), array("q"), array("q")
        numbers: dict[str, int] = {}
        # per problem: prompt digest, which log-probabilities it has, where it first appears
        first: list[tuple[bytes, tuple[bool, bool], str]] = []
        steps: dict[int | None, str] = {}
        outputs: dict[tuple[int, str], tuple[float, str]] = {}  # reward and first row of each named rollout
        n_hints, hint = 0, ""  # responses that look like several turns, and where the first is
        for j, file in enumerate(self._files):
            for row in file.scan():
                rollout = self._read(row.value, row.where)
                if step is not None and rollout.step != step:
                    continue
                steps.setdefault(rollout.step, row.where)
                self._check_tokenizable(rollout, row.where)
                given = (rollout.logprobs is not None, rollout.reference_logprobs is not None)
                # Outputs of one rollout may have prompts of their own.
                traits = (rollout.prompt_digest() if rollout.rollout is None else b"", given)
                problem = numbers.setdefault(rollout.problem_id, len(numbers))
                if problem == len(first):
                    first.append((*traits, row.where))
                elif traits != first[problem][:2]:
                    name, other = f"{row.where}: problem {rollout.problem_id!r}", first[problem][2]
                    if b"" in (traits[0], first[problem][0]) and traits[0] != first[problem][0]:
                        raise RequestError(
                            f"{name}: give 'rollout' in all rows of a problem or in none, unlike {other}"
                        )
                    if traits[0] != first[problem][0]:
                        raise RequestError(f"{name} has another prompt than in {other}; one problem has one prompt")
                    part = int(given[0] == first[problem][1][0])
                    raise RequestError(
                        f"{name} has {'' if given[part] else 'no '}'{_LOGPROBS[part]}', unlike {other}; "
                        "give them for all rollouts of a problem or for none"
                    )
                if rollout.rollout is not None:
                    reward, other = outputs.setdefault((problem, rollout.rollout), (rollout.reward, row.where))
                    if reward != rollout.reward:
                        raise RequestError(
                            f"{row.where}: field 'reward' is {rollout.reward:g}, but {reward:g} in {other}, which is "
                            f"of the same rollout {rollout.rollout!r}"
                        )
                if self.format != "rollouts" and rollout.hints_at_turns:
                    n_hints, hint = n_hints + 1, hint or row.where
                problem_of.append(problem)
                file_of.append(j)
                places.append(row.place)
                sizes.append(row.size)
        paths = _listed([str(file.path) for file in self._files])
        if not numbers:
            wanted = "" if step is None else f" of step {step}"
            raise RequestError(f"{paths}: no rollouts{wanted}, expected at least one")
        if len(steps) > 1:
            where = "; ".join(f"step {s} in {w}" for s, w in sorted(steps.items(), key=lambda item: str(item[0]))[:3])
            raise RequestError(f"{paths}: rollouts of {len(steps)} steps ({where}); {_CHOOSE}")
        if n_hints:
            log.warning(
                "%s: %d responses look like several turns, first in %s; this format does not say which tokens the "
                "policy wrote, so all are taken as its own: write rollouts with 'response_mask' if others wrote some",
                paths,
                n_hints,
                hint,
            )
        self.step = self._policy_version(next(iter(steps)))
        order = np.argsort(np.frombuffer(problem_of, np.int64), kind="stable")
        self._file_of = np.frombuffer(file_of, np.int64)[order]
        self._places = np.frombuffer(places, np.int64)[order]
        self._sizes = np.frombuffer(sizes, np.int64)[order]
        self.problem_ids = list(numbers)
        n_rows_P = np.bincount(np.frombuffer(problem_of, np.int64), minlength=len(numbers))
        self._starts = np.concatenate([[0], np.cumsum(n_rows_P)])
        n_named_P = np.bincount(np.array([problem for problem, _ in outputs], np.int64), minlength=len(numbers))
        self.counts = np.where(n_named_P > 0, n_named_P, n_rows_P)
        self.n_rollouts = int(self.counts.sum())
        self.has_logprobs = all(given[0] for _, given, _ in first)
        self.has_reference = any(given[1] for _, given, _ in first)

    def keep(self, problems: np.ndarray) -> None:
        """Forget all problems but those at some places of `problem_ids`, ascending: a shard, for example."""
        lengths_P = np.diff(self._starts)[problems]
        spans = [np.arange(self._starts[p], self._starts[p + 1]) for p in problems]
        rows = np.concatenate([np.zeros(0, np.int64), *spans])
        self._file_of, self._places, self._sizes = self._file_of[rows], self._places[rows], self._sizes[rows]
        self._starts = np.concatenate([[0], np.cumsum(lengths_P)])
        self.problem_ids = [self.problem_ids[p] for p in problems]
        self.counts = self.counts[problems]
        self.n_rollouts = int(self.counts.sum())

    def _policy_version(self, step: int | None) -> int | None:
        if step is None or not (self.format == "verl" or self.format.startswith(TRL)):
            return step
        if step == 0:
            raise RequestError(
                f"{self._files[0].path}: step 0, but a trainer's first training step is 1; "
                "read verl's validation dumps with format='verl-validation'"
            )
        return step - 1

    def _read(self, value: Any, where: str) -> Rollout:
        rollout = read_row(value, self.format, where, vocabulary=self._vocabulary)
        if self._known is None:
            return rollout
        record = None
        if isinstance(rollout.prompt, str):
            record = self._known.get(rollout.prompt) or self._known.get(self._without_special_tokens(rollout.prompt))
        if record is None:
            raise RequestError(
                f"{where}: no problem given has this prompt as the chat template renders it; give the problems these "
                "rollouts are of, and the template's arguments they were sampled with (--template-kwargs)"
            )
        fields = {name: getattr(rollout, name) for name in Rollout.__slots__}
        known = {"problem_id": record["id"], "prompt": record["prompt"], "extra": record.get("extra") or {}}
        return Rollout(**fields | known)

    def _without_special_tokens(self, prompt: str) -> str:
        """A prompt that keeps the template's special tokens, as GradAlign's responses do, in the form of `_known`."""
        ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return tokens.text_of(self._tokenizer, ids, skip_special_tokens=True)

    def _check_tokenizable(self, rollout: Rollout, where: str) -> None:
        if self._tokenizer is not None:
            if isinstance(rollout.prompt, list) and rollout.prompt_ids is None:
                self._rendered(rollout, where)
            return
        for ids, text in ((rollout.prompt_ids, "prompt"), (rollout.response_ids, "response")):
            if ids is None:
                name = names_of(self.format)[text][0]
                raise RequestError(f"{where}: field {name!r} is text: give a tokenizer, or token ids as '{text}_ids'")

    def _rendered(self, rollout: Rollout, where: str) -> str:
        tools = tools_of({"extra": rollout.extra}, where)
        return prompt_text(self._tokenizer, rollout.prompt or "", where, tools=tools, arguments=self._arguments)

    def _chosen(self, ids: Iterable[str] | None) -> Sequence[int]:
        if ids is None:
            return range(len(self))
        numbers = {name: j for j, name in enumerate(self.problem_ids)}
        chosen = set()
        for name in ids:
            if name not in numbers:
                paths = _listed([str(file.path) for file in self._files])
                raise RequestError(f"problem {name!r} has no rollouts in {paths}")
            chosen.add(numbers[name])
        return sorted(chosen)

    def _fetch(self, rows: Sequence[int] | np.ndarray) -> list[Rollout]:
        rows = np.asarray(rows)
        rollouts: list[Any] = [None] * len(rows)
        for j in np.unique(self._file_of[rows]):
            file = self._files[j]
            file.check_unchanged()
            mine = np.flatnonzero(self._file_of[rows] == j)
            values = file.fetch(self._places[rows[mine]].tolist(), self._sizes[rows[mine]].tolist())
            for k, value in zip(mine, values, strict=True):
                rollouts[k] = self._read(value, str(file.path))
        if len(self._files) > 1:  # keep few files open, even in a large folder
            for file in self._files:
                file.close()
        return rollouts

    def _group(self, rollouts: list[Rollout]) -> Group:
        first, responses = rollouts[0], [self._response_ids(rollout) for rollout in rollouts]
        names = list(dict.fromkeys(rollout.rollout for rollout in rollouts))
        several = first.rollout is not None
        masks: list[np.ndarray] | None = None
        if any(rollout.response_mask is not None for rollout in rollouts):
            masks = [
                np.ones(len(response), dtype=bool) if rollout.response_mask is None else rollout.response_mask
                for response, rollout in zip(responses, rollouts, strict=True)
            ]
        reward_of = {rollout.rollout: rollout.reward for rollout in rollouts}
        rewards = [reward_of[name] for name in names] if several else [rollout.reward for rollout in rollouts]
        return Group(
            problem_id=first.problem_id,
            prompt_ids=self._prompt_ids(first),
            responses=responses,
            rewards=np.asarray(rewards, dtype=np.float64),
            logprobs=None if first.logprobs is None else [r.logprobs for r in rollouts if r.logprobs is not None],
            reference_logprobs=None
            if first.reference_logprobs is None
            else [r.reference_logprobs for r in rollouts if r.reference_logprobs is not None],
            masks=masks,
            prompts=[self._prompt_ids(rollout) for rollout in rollouts] if several else None,
            rollout_of=np.array([names.index(rollout.rollout) for rollout in rollouts]) if several else None,
        )

    def _prompt_ids(self, rollout: Rollout) -> np.ndarray:
        if rollout.prompt_ids is not None:
            return rollout.prompt_ids
        name = f"problem {rollout.problem_id!r}"
        tools = tools_of({"extra": rollout.extra}, name)
        return tokens.prompt_ids(self._tokenizer, rollout.prompt or "", name, tools=tools, arguments=self._arguments)

    def _response_ids(self, rollout: Rollout) -> np.ndarray:
        if rollout.response_ids is not None:
            return rollout.response_ids
        # a response cut at the limit of new tokens never had an end-of-sequence token
        append_eos = self._append_eos and rollout.finish_reason != "length"
        return tokens.response_ids(self._tokenizer, rollout.response or "", append_eos=append_eos)

    def _decode(self, ids: list[int]) -> str:
        return tokens.text_of(self._tokenizer, ids)


def read_rollouts(
    path: str | Path,
    *,
    tokenizer: Any = None,
    format: str = "auto",
    append_eos: bool = False,
    step: int | None = None,
    problems: Iterable[Mapping[str, Any]] | None = None,
    vocabulary: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> RolloutSource:
    """Check every row of a rollout file, or of a folder of them, and return the rollouts grouped by problem.

    path: JSON Lines or Parquet with one rollout per row, a JSON list, or a folder of such files.
    tokenizer: a transformers tokenizer; needed if prompts or responses are text.
    format: "rollouts", "verl" (trainer.rollout_data_dir), "verl-validation" (trainer.validation_data_dir),
        "gradalign" (responses_sorted.json), "trl" (log_completions; "trl:NAME" or "trl:NAME+NAME" where several columns
        may be rewards), or "auto": by the fields of the first row.
    append_eos: append the end-of-sequence token to each text response, except those cut at the length limit.
    step: read only the rows that state this step (verl: the trainer's step, as in the dump's file name).
    problems: canonical problem records; each rollout gets the id and the prompt of the problem with the same prompt
        text without special tokens. verl's dumps lose ids and special tokens; this restores them.
    vocabulary: size of the model's vocabulary, an upper limit of token ids; often larger than the tokenizer's.
    template_kwargs: arguments of the chat template; default: those stored beside a file of `gradstore rollout`.

    Raises RequestError, naming file, row and field, for input that cannot be used; docs/rollouts.md has the list.
    """
    path = Path(path)
    check_known("rollout format", TRL if format.startswith(f"{TRL}:") else format, ("auto", *FORMATS))
    if append_eos and getattr(tokenizer, "eos_token_id", None) is None:
        raise RequestError("append_eos needs a tokenizer with an end-of-sequence token")
    try:
        paths = files_at(path)
        if format == "auto":
            format = detect_format(next((row.value for row in open_rows(paths[0], COLUMNS, "rollout").scan()), None))
        if format.rstrip(":") == TRL:
            format = with_rewards(TRL, open_rows(paths[0]).names, paths[0])
        if path.is_dir() and format.startswith("verl") and all(file.stem.isdecimal() for file in paths):
            paths = _files_of_step(path, paths, step)
        files = [open_rows(file, [*COLUMNS, *names_in(format)], "rollout") for file in paths]
        for file in files:
            check_columns(file.names, names_in(format), str(file.path))
        arguments = kept_arguments(path, template_kwargs)
        if tokenizer is not None:
            check_arguments(tokenizer, arguments)
        known = None if problems is None else _known_prompts(problems, tokenizer, arguments)
        return RolloutSource(files, format, tokenizer, append_eos, step, known, vocabulary, arguments)
    except OSError as error:
        raise RequestError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None


def _files_of_step(folder: Path, files: list[Path], step: int | None) -> list[Path]:
    """The files of one step, if the files of the folder are named by their step."""
    steps = sorted(int(file.stem) for file in files)
    span = f"step {steps[0]} to {steps[-1]}"
    if step is None and len(files) > 1:
        raise RequestError(f"{folder}: rollouts of {len(files)} steps ({span}); {_CHOOSE}")
    chosen = [file for file in files if step is None or int(file.stem) == step]
    if not chosen:
        raise RequestError(f"{folder}: no file of step {step}, found {span}")
    return chosen


def _known_prompts(
    problems: Iterable[Mapping[str, Any]], tokenizer: Any, arguments: Mapping[str, Any]
) -> dict[str, dict]:
    """Problem records, by prompt text without special tokens."""
    if tokenizer is None:
        raise RequestError("problems= needs a tokenizer, to compare prompts as the model sees them")
    known: dict[str, dict] = {}
    for problem in problems:
        name = f"problem {problem['id']!r}"
        ids = tokens.prompt_ids(tokenizer, problem["prompt"], name, tools=tools_of(problem, name), arguments=arguments)
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        if text in known:
            raise RequestError(f"{name}: the same prompt as problem {known[text]['id']!r}, so rollouts fit both")
        known[text] = dict(problem)
    return known


def _listed(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"
