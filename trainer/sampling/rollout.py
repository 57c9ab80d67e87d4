"""Write a rollout file: sample n responses per problem and score them; interrupted runs can resume.

The problems are cut into chunks. Each chunk has a seed derived from (seed, chunk number) and is written at once, so the
file itself is the only state. A restarted run cuts the file after the last whole chunk and continues; the final file is
byte for byte that of an uninterrupted run. The settings are stored next to the file, in NAME.settings.json. Resuming
with other settings raises an error. A shard's chunks have the numbers that they have in the undivided run, so the rows
are those of the undivided run too (gradstore/shards.py).
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.durable import check_parent, write_text_file
from gradstore.engine.cluster.pool import named_range
from gradstore.engine.rollouts import Rollout, read_rollouts, write_rollouts
from gradstore.engine.rollouts.rollout import OVERLONG, STOPPED
from gradstore.engine.rollouts.templates import check_arguments, settings_path, tools_of
from gradstore.engine.rollouts.tokens import prompt_ids, text_of
from gradstore.engine.rollouts.write import SUFFIXES
from gradstore.errors import LockedError, RequestError, check_known, check_number, leaves
from gradstore.exclusive import lock
from gradstore.keepable import MAX_ROW_BYTES, parsed_line
from gradstore.outputs import check_output
from gradstore.reading.files import open_regular, read_object
from gradstore.shards import BLOCK, WHOLE, Shard
from gradstore.trainer.sampling.backends import Backend, Call, PromptError, Response, derived_seed, generate_each
from gradstore.trainer.sampling.overlong import check_overlong, penalties
from gradstore.trainer.sampling.readable import named, readable
from gradstore.trainer.sampling.reward import Reward

CHUNK = BLOCK
_MOST = 100_000
"""Most rollouts of a problem; a chunk's are held in memory."""


@dataclass(frozen=True)
class RolloutReport:
    """Counts of a finished rollout file."""

    path: Path
    problems: int
    rollouts: int
    kept_problems: int
    """Problems that were already in the file when the run started."""
    mean_reward: float
    with_signal: int
    """Problems whose rewards are not all equal; only these have a gradient."""
    tokens: int
    """Total tokens of all responses."""
    stopped: int = 0
    """Responses that were not graded and score 0; `extra.reward_stopped` of their rows says why."""
    first_stopped: str = ""
    """The first of them: its problem and the reason."""


def rollout(
    problems: Sequence[dict[str, Any]],
    backend: Backend,
    reward: Reward,
    out: str | Path,
    *,
    n: int = 8,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk: int = CHUNK,
    shard: Shard = WHOLE,
    step: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
    names: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> RolloutReport:
    """Write n scored rollouts of every problem to `out` (.jsonl or .parquet), resuming an earlier run if there is one.

    problems: canonical problem records, as returned by gradstore.read_problems.
    chunk: problems sampled at once. A kill loses at most one chunk. The responses depend on this size.
    shard: which shard of a larger run `problems` are (`problems[shard.places(n)]` of its n, with chunk=shard.block(n)).
    step: the policy version, written in every row.
    template_kwargs: arguments of the chat template, such as {"enable_thinking": False}; stored with the settings.
    overlong_buffer, overlong_penalty: DAPO's reward shaping (overlong.py); a row's penalty is in its `extra` too.
    names: problem id -> file and row, for messages.
    progress: callback(number of newly finished problems); the first call counts those already in the file.

    Raises RequestError for invalid settings, a prompt that leaves no room for its response in the model's context, a
    problem that the reward cannot grade, an existing file of another run, or a reward that is not a finite number;
    LockedError when another run is writing the file. Chunks already written stay in the file.
    """
    out = Path(out)
    check_settings(
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        chunk=chunk,
        out=out,
        step=step,
        seed=seed,
    )
    check_overlong(max_new_tokens, overlong_buffer, overlong_penalty)
    if out.suffix == ".parquet" and len({isinstance(problem["prompt"], str) for problem in problems}) > 1:
        raise RequestError(f"{out}: Parquet cannot mix prompts of text and of chat messages; write .jsonl")
    prompts = _prompts(problems, backend, max_new_tokens, template_kwargs, names)
    readable(problems, reward, names=names)
    settings = {
        "problems": {"count": len(problems), "digest": _digest(problems)},
        "n": n,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "chunk": chunk,
        **({} if shard == WHOLE else {"shard": str(shard)}),
        "step": step,
        "reward": reward.name,
        **({"template_kwargs": dict(template_kwargs)} if template_kwargs else {}),
        **({"overlong_buffer": overlong_buffer, "overlong_penalty": overlong_penalty} if overlong_buffer else {}),
        **backend.settings(),
    }
    shaping = partial(penalties, max_new_tokens=max_new_tokens, buffer=overlong_buffer, penalty=overlong_penalty)
    # rows cannot be appended to Parquet: collect them in a .jsonl file next to it first
    growing = out if out.suffix == ".jsonl" else out.with_name(out.name + ".unfinished.jsonl")
    try:
        _agree(out, growing, settings)
        if growing is not out and out.exists():
            growing.unlink(missing_ok=True)
            return _counted(out).report(out, kept=len(problems))
        with _locked(growing):
            kept = _drop_torn(growing, [problem["id"] for problem in problems], n, chunk)
            tally = _counted(growing) if kept else _Tally()
            advance = progress or (lambda n: None)
            advance(kept)
            chunks = [slice(first, first + chunk) for first in range(kept, len(problems), chunk)]
            calls = (
                Call(
                    prompts=prompts[of_chunk],
                    n=n,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=derived_seed(seed, shard.number(of_chunk.start // chunk)),
                    name=named_range([problem["id"] for problem in problems[of_chunk]]),
                )
                for of_chunk in chunks
            )
            answers = generate_each(backend, calls)
            for of_chunk in chunks:
                try:
                    responses = next(answers)
                except PromptError as found:
                    name = named(problems[of_chunk.start + found.prompt], names)
                    raise type(found.error)(f"{name}: {found.error}") from None
                rows = _scored(
                    problems[of_chunk], prompts[of_chunk], responses, backend.tokenizer, reward, step, shaping
                )
                with write_rollouts(growing, append=True) as writer:
                    writer.append(rows)
                for first in range(0, len(rows), n):
                    tally.add(rows[first : first + n])
                advance(len(responses))
            if growing is not out:
                with write_rollouts(out) as writer:
                    for group in read_rollouts(growing).rollouts():
                        writer.append(group)
                growing.unlink()
    except OSError as error:
        raise RequestError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    return tally.report(out, kept)


def _scored(
    problems: Sequence[dict[str, Any]],
    prompts: list[list[int]],
    responses: list[list[Response]],
    tokenizer: Any,
    reward: Reward,
    step: int | None,
    shaping: Callable[[Sequence[int]], np.ndarray],
) -> list[Rollout]:
    """The rows of a chunk: decode its responses, then score all at once. shaping: lengths -> what rewards get added."""
    sampled = [
        (problem, ids, response, j, text_of(tokenizer, response.token_ids.tolist(), skip_special_tokens=True))
        for problem, ids, group in zip(problems, prompts, responses, strict=True)
        for j, response in enumerate(group)
    ]
    scores = reward.scores([(problem, text, j) for problem, _, _, j, text in sampled])
    shaped = shaping([len(response.token_ids) for _, _, response, _, _ in sampled]).tolist()
    return [
        Rollout(
            problem_id=problem["id"],
            prompt=problem["prompt"],
            prompt_ids=np.asarray(ids, dtype=np.int64),
            response=text,
            response_ids=response.token_ids,
            reward=score.value + added,
            logprobs=response.logprobs,
            source=problem.get("source", ""),
            ground_truth=problem.get("ground_truth", ""),
            tags=list(problem.get("tags", ())),
            finish_reason=response.finish_reason,
            extra={
                **problem.get("extra", {}),
                **({} if score.stopped is None else {STOPPED: score.stopped}),
                **({OVERLONG: added} if added else {}),
            },
            step=step,
        )
        for (problem, ids, response, _, text), score, added in zip(sampled, scores, shaped, strict=True)
    ]


def checked_prompts(
    problems: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    context: int | None,
    max_new_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[list[int]]:
    """The problems' prompts as token ids; RequestError for a prompt that is empty or too long for the context.

    template_kwargs: arguments of the chat template. names: problem id -> file and row, for messages.
    """
    if template_kwargs:
        check_arguments(tokenizer, template_kwargs)
    prompts = []
    for problem in problems:
        name = named(problem, names)
        tools = tools_of(problem, name)
        ids = prompt_ids(tokenizer, problem["prompt"], name, tools=tools, arguments=template_kwargs).tolist()
        if not ids:
            raise RequestError(f"{name}: the prompt has no tokens")
        if context is not None and len(ids) + max_new_tokens > context:
            raise RequestError(
                f"{name}: a prompt of {len(ids)} tokens and {max_new_tokens} new tokens do not fit in the model's "
                f"context of {context}; leave the problem out, or lower max_new_tokens (--max-new-tokens)"
            )
        prompts.append(ids)
    return prompts


def _prompts(
    problems: Sequence[dict[str, Any]],
    backend: Backend,
    max_new_tokens: int,
    template_kwargs: Mapping[str, Any] | None,
    names: Mapping[str, str] | None,
) -> list[list[int]]:
    """The problems' prompts as token ids; all are checked before the first is used."""
    if not problems:
        raise RequestError("no problems to roll out, expected at least one")
    seen = set()
    for problem in problems:
        if problem["id"] in seen:
            raise RequestError(f"problem {problem['id']!r} is listed twice; each problem needs an id of its own")
        seen.add(problem["id"])
    return checked_prompts(problems, backend.tokenizer, backend.context, max_new_tokens, template_kwargs, names)


def check_settings(
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    chunk: int = CHUNK,
    out: Path | None = None,
    step: int | None = None,
    seed: int = 0,
) -> None:
    """RequestError for a setting of `rollout` that is out of range, and for a file that cannot be written."""
    if out is not None:
        check_output(out)
        if out.is_dir():
            raise RequestError(f"{out}: is a folder, expected the name of a file, {' or '.join(SUFFIXES)}")
        check_known(f"{out}: the suffix", out.suffix, SUFFIXES)
        check_parent(out)
    check_number("step", step or 0, least=0)
    check_number("seed", seed, least=0)
    for name, value in {"n": n, "max_new_tokens": max_new_tokens, "chunk": chunk}.items():
        check_number(name, value, least=1)
    check_number("n", n, most=_MOST)
    check_number("temperature", temperature, least=0)
    check_number("top_p", top_p, above=0, most=1)


def _digest(problems: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(problem, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _agree(out: Path, growing: Path, settings: dict[str, Any]) -> None:
    """Write the settings next to a new file; RequestError for an existing file with other or no settings."""
    path = settings_path(out)
    settings = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        for file in (out, growing):
            if file.exists():
                raise RequestError(f"{file}: already there without {path.name}; choose another path or remove it")
        write_text_file(path, json.dumps(settings, indent=1, sort_keys=True))
        return
    stored, offered = leaves(_read_settings(path)), leaves(settings)
    differing = [
        f"{name} was {stored.get(name)!r}, now {offered.get(name)!r}"
        for name in sorted(stored.keys() | offered.keys())
        if stored.get(name) != offered.get(name)
    ]
    if differing:
        raise RequestError(f"{out}: begun with other settings: {'; '.join(differing)}. Use those, or another path")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except RequestError as error:
        raise RequestError(f"{error}: not the settings of a rollout run; choose another path or remove it") from None


def _drop_torn(path: Path, ids: list[str], n: int, chunk: int) -> int:
    """Cut the file after its last whole chunk; returns the number of problems left in it."""
    kept, end, place = 0, 0, 0
    with path.open("r+b") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b"")):
            if not line.endswith(b"\n"):
                break
            try:
                name = parsed_line(line, str(path))["problem_id"]
            except (RequestError, KeyError, TypeError):
                break
            if number >= len(ids) * n or name != ids[number // n]:
                raise RequestError(f"{path}, line {number + 1}: not a row of this run; choose another path")
            place += len(line)
            done, within = divmod(number + 1, n)
            if not within and (done % chunk == 0 or done == len(ids)):
                kept, end = done, place
        file.truncate(end)
    return kept


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the file against other runs; the lock ends when the process does, even after a kill."""
    if path.exists():
        open_regular(path).close()
    try:
        release = lock(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), path, wait=False)
    except BlockingIOError:
        raise LockedError(f"{path}: another run is writing it; wait for it, or choose another path") from None
    try:
        yield
    finally:
        release()


@dataclass(slots=True)
class _Tally:
    """Counts for the report: of the rows that were there, read once, and of those written since."""

    rewards: "array[float]" = field(default_factory=lambda: array("d"))
    problems: int = 0
    with_signal: int = 0
    tokens: int = 0
    stopped: int = 0
    first_stopped: str = ""

    def add(self, group: Sequence[Rollout]) -> None:
        """Count the rows of one problem."""
        self.problems += 1
        self.rewards.extend(row.reward for row in group)
        self.with_signal += len({row.reward for row in group}) > 1
        self.tokens += sum(len(row.response_ids) for row in group if row.response_ids is not None)
        for row in group:
            if STOPPED in row.extra:
                self.stopped += 1
                self.first_stopped = self.first_stopped or f"problem {row.problem_id!r}: {row.extra[STOPPED]}"

    def report(self, path: Path, kept: int) -> RolloutReport:
        mean = float(np.mean(self.rewards))
        return RolloutReport(
            path, self.problems, len(self.rewards), kept, mean, self.with_signal, self.tokens, self.stopped,
            self.first_stopped,
        )  # fmt: skip


def _counted(path: Path) -> _Tally:
    """The counts of a file's rows."""
    tally = _Tally()
    for group in read_rollouts(path).rollouts():
        tally.add(group)
    return tally
