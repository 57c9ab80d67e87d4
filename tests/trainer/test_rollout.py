"""A rollout run leaves the same file however often it was killed, and says before the first token what cannot work."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore import LockedError, RequestError
from gradstore.engine.rollouts import read_rollouts
from gradstore.trainer.sampling.backends import Response, derived_seed, load_backend
from gradstore.trainer.sampling.reward import Reward, Score
from gradstore.trainer.sampling.rewards import load_reward
from gradstore.trainer.sampling.rollout import RolloutReport, rollout, settings_path

N, CHUNK = 3, 4

PROBLEMS: list[dict[str, Any]] = [
    {
        "id": f"p{j}",
        "source": "sums",
        "prompt": f"{j} + être =",
        "ground_truth": str(j),
        "tags": ["sum"],
        "extra": {"level": j % 3},
    }
    for j in range(10)
]

LENGTH = Reward("length", lambda record, response, rollout_index: len(response) / 10 + rollout_index)


@dataclasses.dataclass
class RandomBackend:
    """Tokens drawn from the seed alone: everything a real back end promises, in no time."""

    tokenizer: Any
    context: int | None = 60
    delay_s: float = 0.0
    weights: str = "a"
    calls: int = 0

    def generate(self, prompts: list[list[int]], n: int, *, seed: int, max_new_tokens: int, **_: Any) -> Any:
        self.calls += 1
        time.sleep(self.delay_s)
        generator = np.random.default_rng(seed)
        lengths = generator.integers(0, max_new_tokens + 1, (len(prompts), n))
        return [
            [Response(generator.integers(4, 260, k), -generator.random(k).astype(np.float32), "length") for k in row]
            for row in lengths
        ]

    def settings(self) -> dict[str, Any]:
        return {"backend": "random", "weights": self.weights}


def _run(tokenizer: Any, out: Path, *, backend: Any = None, problems: Any = None, **settings: Any) -> RolloutReport:
    options: dict[str, Any] = {"n": N, "chunk": CHUNK, "max_new_tokens": 8, "step": 2} | settings
    return rollout(problems or PROBLEMS, backend or RandomBackend(tokenizer), LENGTH, out, **options)


def test_rows_hold_what_was_sampled(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Whatever a row lacks cannot be had later: ids, log-probabilities, the problem for the store."""
    report = _run(tiny_tokenizer, tmp_path / "r.jsonl")
    source = read_rollouts(tmp_path / "r.jsonl", tokenizer=tiny_tokenizer)
    assert list(source.records()) == PROBLEMS
    assert (source.step, source.n_rollouts, source.has_logprobs) == (2, 30, True)
    groups = list(source.groups())
    for number in range(0, len(PROBLEMS), CHUNK):
        expected = RandomBackend(tiny_tokenizer).generate(
            [[1]] * len(PROBLEMS[number : number + CHUNK]), N, seed=derived_seed(0, number // CHUNK), max_new_tokens=8
        )
        for group, problem, responses in zip(
            groups[number : number + CHUNK], PROBLEMS[number : number + CHUNK], expected, strict=True
        ):
            assert group.prompt_ids.tolist() == tiny_tokenizer(problem["prompt"])["input_ids"]
            assert [ids.tolist() for ids in group.responses] == [r.token_ids.tolist() for r in responses]
            assert group.logprobs is not None
            assert [p.tolist() for p in group.logprobs] == [r.logprobs.tolist() for r in responses]
            texts = [tiny_tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in responses]
            assert group.rewards.tolist() == [LENGTH(problem, text, j) for j, text in enumerate(texts)]
    rewards = np.concatenate([group.rewards for group in groups])
    tokens = sum(len(ids) for group in groups for ids in group.responses)
    assert report == RolloutReport(tmp_path / "r.jsonl", 10, 30, 0, pytest.approx(rewards.mean()), 10, tokens)


def test_parquet_holds_the_same_as_json_lines(tmp_path: Path, tiny_tokenizer: Any) -> None:
    _run(tiny_tokenizer, tmp_path / "r.jsonl")
    _run(tiny_tokenizer, tmp_path / "r.parquet")
    lines, table = read_rollouts(tmp_path / "r.jsonl"), read_rollouts(tmp_path / "r.parquet")
    assert list(lines.records()) == list(table.records())
    for a, b in zip(lines.rollouts(), table.rollouts(), strict=True):
        assert [row.row() for row in a] == [row.row() for row in b]
    names = {"r.jsonl", "r.jsonl.settings.json", "r.parquet", "r.parquet.settings.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert _run(tiny_tokenizer, tmp_path / "r.parquet").kept_problems == len(PROBLEMS)


def test_cut_off_anywhere_the_file_ends_the_same(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A kill can leave any beginning of the file, in the middle of a line, of a letter, of a group, of a chunk."""
    _run(tiny_tokenizer, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    settings = settings_path(tmp_path / "whole.jsonl").read_bytes()
    ends = [j + 1 for j, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {*range(0, len(whole), 211), *ends, *(end - 1 for end in ends), len(whole)}
    for cut in sorted(cuts):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        settings_path(path).write_bytes(settings)
        backend = RandomBackend(tiny_tokenizer)
        report = _run(tiny_tokenizer, path, backend=backend)
        assert path.read_bytes() == whole, cut
        lines = whole[:cut].count(b"\n")
        kept = 10 if lines == 30 else lines // (N * CHUNK) * CHUNK
        assert report.kept_problems == kept
        assert backend.calls == -(-(10 - kept) // CHUNK)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_killed_and_started_again_the_file_ends_the_same(tmp_path: Path, tiny_tokenizer: Any, suffix: str) -> None:
    """The real thing: SIGKILL at random moments of a real process, again and again until a run gets through."""
    _run(tiny_tokenizer, tmp_path / f"whole.{suffix}", chunk=1)
    path, generator = tmp_path / f"killed.{suffix}", np.random.default_rng(0)
    kills = 0
    for _ in range(200):
        child = os.fork()
        if child == 0:
            try:
                _run(tiny_tokenizer, path, backend=RandomBackend(tiny_tokenizer, delay_s=0.02), chunk=1)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(float(generator.uniform(0.005, 0.09)))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    assert kills >= 2
    _run(tiny_tokenizer, path, chunk=1)
    assert path.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert settings_path(path).read_bytes() == settings_path(tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"n": 4}, "n was 3, now 4"),
        ({"temperature": 0.7}, "temperature was 1.0, now 0.7"),
        ({"top_p": 0.9, "max_new_tokens": 7}, "max_new_tokens was 8, now 7; top_p was 1.0, now 0.9"),
        ({"step": None}, "step was 2, now None"),
        ({"chunk": 2}, "chunk was 4, now 2"),
        ({"problems": PROBLEMS[:9]}, "problems.count was 10, now 9; problems.digest was"),
        ({"problems": [PROBLEMS[0] | {"ground_truth": "9"}, *PROBLEMS[1:]]}, "problems.digest was"),
    ],
)
def test_going_on_with_other_settings_is_refused(
    tmp_path: Path, tiny_tokenizer: Any, changed: dict[str, Any], message: str
) -> None:
    """Half the groups of one policy or temperature and half of another: a file that means nothing."""
    path = tmp_path / "r.jsonl"
    _run(tiny_tokenizer, path)
    before = path.read_bytes()
    with pytest.raises(RequestError, match=f"begun with other settings: {message}"):
        _run(tiny_tokenizer, path, **changed)
    with pytest.raises(RequestError, match="weights was 'a', now 'b'"):
        _run(tiny_tokenizer, path, backend=RandomBackend(tiny_tokenizer, weights="b"))
    assert path.read_bytes() == before


def test_files_of_others_are_left_alone(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("mine\n")
    with pytest.raises(RequestError, match=r"already there without r\.jsonl\.settings\.json"):
        _run(tiny_tokenizer, path)
    assert path.read_text() == "mine\n"
    path.unlink()
    _run(tiny_tokenizer, path)
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[1:]))
    with pytest.raises(RequestError, match="line 3: not a row of this run"):
        _run(tiny_tokenizer, path)
    assert path.read_text() == "".join(rows[1:])
    settings_path(path).write_text("{")
    with pytest.raises(RequestError, match="not the settings of a rollout run"):
        _run(tiny_tokenizer, path)


def test_two_runs_cannot_write_one_file(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Started twice by mistake, two runs would interleave their rows."""
    path = tmp_path / "r.jsonl"

    class Nested(RandomBackend):
        def generate(self, *args: Any, **options: Any) -> Any:
            with pytest.raises(LockedError, match="another run is writing it"):
                _run(tiny_tokenizer, path)
            return super().generate(*args, **options)

    _run(tiny_tokenizer, path, backend=Nested(tiny_tokenizer))


def test_failed_reward_keeps_whole_chunks(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Hours of sampling must not be lost to one reward; mended, the run goes on where it was."""
    path = tmp_path / "r.jsonl"
    broken = Reward(
        "length", lambda record, response, j: float("nan") if record["id"] == "p6" else LENGTH(record, response, j)
    )
    options: dict[str, Any] = {"n": N, "chunk": CHUNK, "max_new_tokens": 8, "step": 2}
    with pytest.raises(RequestError, match="problem 'p6': reward 'length' gave nan"):
        rollout(PROBLEMS, RandomBackend(tiny_tokenizer), broken, path, **options)
    assert path.read_bytes().count(b"\n") == CHUNK * N
    assert _run(tiny_tokenizer, path).kept_problems == CHUNK
    _run(tiny_tokenizer, tmp_path / "whole.jsonl")
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"temperature": -0.1}, "temperature is -0.1, expected at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"problems": [PROBLEMS[0], PROBLEMS[0]]}, "problem 'p0' is listed twice"),
        ({"problems": [PROBLEMS[0] | {"prompt": ""}]}, "problem 'p0': the prompt has no tokens"),
        (
            {"problems": [*PROBLEMS, PROBLEMS[0] | {"id": "long", "prompt": "x" * 53}]},
            "problem 'long': a prompt of 53 tokens and 8 new tokens do not fit in the model's context of 60",
        ),
    ],
)
def test_refused_before_anything_is_sampled(
    tmp_path: Path, tiny_tokenizer: Any, settings: dict[str, Any], message: str
) -> None:
    """The one problem that is too long is often the last, after a night of sampling the others."""
    backend = RandomBackend(tiny_tokenizer)
    with pytest.raises(RequestError, match=message):
        _run(tiny_tokenizer, tmp_path / "r.jsonl", backend=backend, **settings)
    assert backend.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_truths_are_read_before_anything_is_sampled(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Hours of sampling must not end at a truth that no grader reads."""
    backend, out = RandomBackend(tiny_tokenizer), tmp_path / "r.jsonl"
    problems = [*PROBLEMS, PROBLEMS[0] | {"id": "bad", "ground_truth": "the $ sign"}]
    with pytest.raises(RequestError, match=r"cannot pay 1 of 11 problems: problem 'bad': ground truth 'the \$ sign'"):
        rollout(problems, backend, load_reward("math"), out, n=N, max_new_tokens=4)
    assert backend.calls == 0
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="no problems to roll out"):
        rollout([], RandomBackend(tiny_tokenizer), LENGTH, tmp_path / "r.jsonl")
    with pytest.raises(RequestError, match=r"the suffix '\.txt' is not one of \.jsonl, \.parquet"):
        _run(tiny_tokenizer, tmp_path / "r.txt")
    with pytest.raises(RequestError, match=r"r\.jsonl.*the folder .*none does not exist"):
        _run(tiny_tokenizer, tmp_path / "none" / "r.jsonl")
    mixed = [PROBLEMS[0], PROBLEMS[1] | {"prompt": [{"role": "user", "content": "a"}]}]
    with pytest.raises(RequestError, match="Parquet cannot mix"):
        _run(tiny_tokenizer, tmp_path / "r.parquet", problems=mixed)
    _run(tiny_tokenizer, tmp_path / "r.jsonl", problems=mixed)
    with pytest.raises(RequestError, match="back end 'sglang' is not one of transformers, vllm"):
        load_backend("sglang", "model")


def test_a_chunk_is_scored_at_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A judge asks for a chunk's verdicts side by side; the file is that of one response at a time."""
    batches: list[int] = []

    def many(items: Any) -> list[float]:
        batches.append(len(items))
        return [LENGTH.score(*item) for item in items]

    options: dict[str, Any] = {"n": N, "chunk": CHUNK, "max_new_tokens": 8, "step": 2}
    reward = Reward("length", LENGTH.score, many)
    rollout(PROBLEMS, RandomBackend(tiny_tokenizer), reward, tmp_path / "r.jsonl", **options)
    assert batches == [CHUNK * N, CHUNK * N, 2 * N]
    _run(tiny_tokenizer, tmp_path / "single.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "single.jsonl").read_bytes()


def test_responses_that_were_not_graded_are_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A reward that stops answers pays them 0; the run goes on, the rows and the report say why."""

    def scores(items: Any) -> list[Any]:
        return [Score(0.0, "it took too long") if j == 0 and record["id"] != "p0" else 1.0 for record, _, j in items]

    reward = Reward("stopping", lambda *item: scores([item])[0], scores)
    report = rollout(PROBLEMS, RandomBackend(tiny_tokenizer), reward, tmp_path / "r.jsonl", n=N, max_new_tokens=8)
    assert (report.stopped, report.first_stopped) == (9, "problem 'p1': it took too long")
    (group,) = [group for group in read_rollouts(tmp_path / "r.jsonl").rollouts() if group[0].problem_id == "p1"]
    assert [row.extra.get("reward_stopped") for row in group] == ["it took too long", None, None]
    assert [row.reward for row in group] == [0.0, 1.0, 1.0]
    assert all("reward_stopped" not in record["extra"] for record in read_rollouts(tmp_path / "r.jsonl").records())


def test_progress(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A run that goes on tells at once what was there, so that a bar does not start at nothing."""
    told: list[int] = []
    _run(tiny_tokenizer, tmp_path / "r.jsonl", progress=told.append)
    assert told == [0, 4, 4, 2]
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(b"".join(lines[: CHUNK * N + 1]))
    told.clear()
    _run(tiny_tokenizer, tmp_path / "r.jsonl", progress=told.append)
    assert told == [4, 4, 2]


def test_seeds_of_neighbouring_chunks_are_unrelated() -> None:
    """With seed + chunk, run 0's second chunk would be run 1's first."""
    seeds = {derived_seed(seed, chunk) for seed in range(50) for chunk in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_settings_are_kept_beside_the_file(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Months later they say how the rollouts were sampled."""
    _run(tiny_tokenizer, tmp_path / "r.jsonl", seed=4)
    settings = json.loads((tmp_path / "r.jsonl.settings.json").read_text())
    assert settings["seed"] == 4
    assert settings["reward"] == "length"
    assert settings["backend"] == "random"
