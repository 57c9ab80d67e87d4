"""Answers, data files and functions that mean harm: nothing runs, nothing hangs, and the others are paid right."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from gradstore import RequestError
from gradstore.trainer.sampling import grading
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import load_reward
from gradstore.trainer.sampling.workers import confinement, frames, grader, pool
from gradstore.trainer.sampling.workers.expressions import RefusedError, literal
from gradstore.trainer.sampling.workers.keeper import checked
from gradstore.trainer.sampling.workers.pool import Limits, WorkerPool

TASKS = sorted(DATASETS.keys() - {"composite"})
linux = pytest.mark.skipif(bool(confinement.missing()), reason="the system lacks Landlock or seccomp")

CODE = [
    "__import__('os').system('touch {marker}')",
    "[__import__('os').system('touch {marker}')]",
    "open('{marker}', 'w')",
    "__import__('pathlib').Path('{marker}').touch()",
    "(lambda: open('{marker}', 'w'))()",
    "sympify(\"open('{marker}', 'w')\")",
    "S(\"__import__('os').system('touch {marker}')\")",
    "lambdify(x, \"open('{marker}', 'w')\")(1)",
    "[c for c in ().__class__.__base__.__subclasses__() if open('{marker}', 'w')]",
    "x.__class__.__init__.__globals__['sys'].modules['os'].system('touch {marker}')",
    "print(open('{marker}', 'w'))",
    "eval(\"open('{marker}', 'w')\")",
]
"""Answers that make a file, if anything runs them."""
HARMFUL = [
    "9**9**9**9",
    "factorial(9**9)",
    "1<<10**12",
    "1e999999999",
    "sys.exit(0)",
    "exit()",
    "__import__('os')._exit(0)",
    "[0]*6*10**9",
    "bytearray(6*10**9)",
    "<answer>" * 125_000,
    "(" * 50_000 + "1" + ")" * 50_000,
    "-" * 200_000 + "1",
    '{"a":' * 50_000,
]


def _problem(name: str = "p1", ground_truth: str = "", **extra: Any) -> dict[str, Any]:
    return {"id": name, "source": "test", "prompt": "?", "ground_truth": ground_truth, "tags": [], "extra": extra}


def _entry(task: str) -> dict[str, Any]:
    return json.loads(json.dumps(reasoning_gym.create_dataset(task, size=1, seed=3)[0]))


def _of_task(task: str) -> dict[str, Any]:
    return _problem(task, reasoning_gym={"dataset": task, "entry": _entry(task)})


@pytest.fixture
def two_seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """Workers of reasoning-gym that give an answer two seconds."""
    short = WorkerPool("reasoning-gym", limits=Limits(seconds=2, wall=100))
    monkeypatch.setitem(pool._pools, ("reasoning-gym", ""), short)
    yield short
    short.close()


@pytest.mark.timeout(900)
def test_no_task_runs_or_waits_for_an_answer(two_seconds: WorkerPool, tmp_path: Path) -> None:
    """All data sets of reasoning-gym: nothing is run, nothing overruns, right answers are paid.

    Nine of these verifiers evaluate answers as Python. A policy finds such a hole by chance, and is paid for it.
    """
    reward, marker = load_reward("reasoning-gym"), tmp_path / "marker"
    problems = [_of_task(task) for task in TASKS]
    right = [(problem, problem["extra"]["reasoning_gym"]["entry"]["answer"] or "", 0) for problem in problems]
    right = [(problem, str(answer), j) for problem, answer, j in right]
    before = reward.scores(right)
    assert [score.stopped for score in before] == [None] * len(TASKS)
    workers = {worker.process.pid for worker in two_seconds._idle}
    hostile = [*(code.format(marker=marker) for code in CODE[:3]), *HARMFUL]
    items = [(problem, answer, 0) for problem in problems for answer in hostile]
    scores = reward.scores(items)
    # its verifier pays every answer in which it does not find the wrong word
    paid = {items[i][0]["id"] for i, score in enumerate(scores) if score.value >= 0.5} - {"game_of_life_halting"}
    assert not paid
    assert {score.stopped for score in scores} <= {None, "its grading took longer than 2 seconds"}
    assert not marker.exists()
    assert reward.scores(right) == before
    assert {worker.process.pid for worker in two_seconds._idle} == workers


def test_code_is_not_run_even_where_nothing_confines_it(tmp_path: Path) -> None:
    """Without the confinement the file could be made: it is the verifiers that must not run the answer."""
    marker = tmp_path / "marker"
    tasks = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"]
    tasks += ["simple_integration", "intermediate_integration", "polynomial_multiplication"]
    kept = [{"dataset": task, "entry": _entry(task)} for task in tasks]
    answers = [code.format(marker=marker) for code in CODE]
    sorting = {"dataset": "number_sorting", "entry": _entry("number_sorting") | {"answer": answers[0]}}
    bits = {"dataset": "bitwise_arithmetic", "entry": _entry("bitwise_arithmetic")}
    bits["entry"]["metadata"]["problem"] = answers[0]
    pairs = [[one, answer] for one in kept for answer in answers] + [[sorting, "[1]"], [bits, "0x1"]]
    script = """
        import json, sys
        from gradstore.trainer.sampling.workers.auditing import guard
        from gradstore.trainer.sampling.workers.grader import loaded
        grade = loaded("reasoning-gym", "")
        if "guard" in sys.argv:
            guard(("reasoning_gym",))
        print([grade(kept, answer, 0) for kept, answer in json.load(sys.stdin)])
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    for arguments, made in ((["guard"], False), ([], True)):
        run = subprocess.run(
            [*command, *arguments], input=json.dumps(pairs), capture_output=True, text=True, timeout=200, check=False
        )
        assert run.returncode == 0, run.stderr
        assert marker.exists() == made
    marker.unlink()


@pytest.mark.timeout(900)
def test_wrong_answers_of_all_shapes_are_paid_as_the_data_set_pays_them() -> None:
    """What stands in for `eval` must give what `eval` gave for every answer that is data."""
    shapes = [
        "[1, 2]",
        "[[0, 1], [1, 0]]",
        "['A', 'B']",
        "(1 + 2) * 3",
        "sin(x)/2 + C",
        "2.5",
        "{'a': 1}",
        "a b",
    ]
    shapes += ["exp(2*x) - log(x)", "0x1f", "((1, 2), (3, 4))", "3!", "1/0"]
    reward = load_reward("reasoning-gym")
    items, expected = [], []
    for task in TASKS:
        data, problem = reasoning_gym.create_dataset(task, size=1, seed=3), _of_task(task)
        for answer in shapes:
            items.append((problem, answer, 0))
            try:
                expected.append(data.score_answer(answer, data[0]))
            except Exception:  # noqa: BLE001 - at an answer of another shape
                expected.append(0.0)
    given = reward.many(items)
    assert [(items[i][0]["id"], items[i][1]) for i in range(len(items)) if given[i] != expected[i]] == []


@pytest.mark.parametrize(
    "text",
    ["[1, 'a', (2.5, None)]", "{'a': {1, 2}, 'b': True}", "(0x12 + 0x5) << (7 >> 1)", "-3 * 2 ** 5 // 7", "~5 % 3"],
)
def test_literal_gives_what_eval_gives(text: str) -> None:
    assert literal(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "f()",
        "x",
        "x.y",
        "[1][0]",
        "lambda: 1",
        "f'{1}'",
        "9**9**9",
        "1 << 10**9",
        "'a' * 10**9",
        "[0] * 9",
        "{**{}}",
        "[x for x in ()]",
        "(x := 1)",
        "1 if 1 else 2",
        "...".join("aa"),
        "1" * 200000,
    ],
)
def test_literal_refuses_what_is_no_data(text: str) -> None:
    with pytest.raises((RefusedError, SyntaxError)):
        literal(text)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"dataset": "os"}, "no reasoning-gym data set 'os'"),
        ({"dataset": ["chain_sum"]}, "no reasoning-gym data set"),
        ({"dataset": "chain_sum", "config": {"__class__": 1}}, "'chain_sum' so configured: .*none of its settings"),
        ({"dataset": "chain_sum", "config": [1]}, "so configured"),
        ({"dataset": "chain_sum", "config": {"min_terms": "x"}}, "so configured"),
    ],
)
def test_a_data_file_cannot_choose_code(kept: dict[str, Any], message: str) -> None:
    """Names and settings of a data set come from files."""
    problem = _problem(reasoning_gym={"entry": _entry("chain_sum")} | kept)
    with pytest.raises(RequestError, match=rf"problem 'p1': .*{message}"):
        load_reward("reasoning-gym")(problem, "1", 0)
    with pytest.raises(RequestError, match=r"problem 'p1': reward 'auto' needs extra\.reward to be"):
        load_reward("auto")(_problem(reward="os:system"), "1", 0)


def _nested(depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"a": nested}
    return nested


@pytest.mark.parametrize("held", [_nested(900), _nested(100_000), {"a": object()}])
def test_entries_that_cannot_be_sent_name_their_problem(held: dict[str, Any]) -> None:
    """Deep nesting, and what is no JSON, are faults of one problem; the others are graded."""
    odd = _problem("odd", reasoning_gym={"dataset": "chain_sum", "entry": {"metadata": held}})
    first, second = load_reward("reasoning-gym").faults([odd, _of_task("chain_sum")])
    assert first is not None
    assert "\n" not in first
    assert second is None


def test_settings_without_bounds_are_stopped(two_seconds: WorkerPool) -> None:
    """A data set that would be made of 10**9 parts is stopped like an answer, in a check too."""
    entry = _entry("sudoku")
    big = _problem("big", reasoning_gym={"dataset": "circuit_logic", "entry": entry, "config": {"size": 10**12}})
    good = _of_task("chain_sum")
    reward = load_reward("reasoning-gym")
    started = time.monotonic()
    faults = reward.faults([big, good])
    assert time.monotonic() - started < 60
    assert faults[1] is None


HARM = """
import os, socket, sys, time
from pathlib import Path

def graded(data_source, solution_str, ground_truth, extra_info=None):
    return float(eval(solution_str))

def fork():
    return os.fork() + 1

def connects():
    with socket.socket() as there:
        there.connect(("127.0.0.1", int(os.environ.get("PORT", 80))))

def raises(function):
    try:
        function()
    except BaseException as error:
        return type(error) in (PermissionError, OSError, BlockingIOError)
    return False

def grows():
    kept = []
    while True:
        kept.append(bytearray(10**7))

def descriptors():
    return sum(raises(lambda fd=fd: os.fstat(fd)) is False for fd in range(64))
"""


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run an expression inside a worker of little memory and a second of time; returns its result."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (tmp_path / "harm.py").write_text(HARM, encoding="utf-8")
    limits = Limits(seconds=1, wall=50, memory=256 << 20)
    workers = WorkerPool("function", f"{tmp_path}/harm.py:graded", limits, workers=1)
    verl = {"data_source": "", "ground_truth": "", "extra_info": {}}

    def run(text: str) -> dict[str, Any]:
        first, result, last = workers.results([verl], [(0, "1", 0), (0, text, 1), (0, "2", 2)])
        assert (first, last) == ({"score": 1.0}, {"score": 2.0})  # whatever happens between them
        return result

    yield run
    workers.close()


@linux
def test_a_worker_has_nothing_and_reaches_nothing(harm: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Even code that runs in a worker finds no key, no file, no network, no other process."""
    (tmp_path / "notes.txt").write_text("private", encoding="utf-8")
    blocked = [
        "connects()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 0)",
        f"open({str(tmp_path / 'notes.txt')!r})",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"os.remove({str(tmp_path / 'notes.txt')!r})",
        f"os.chmod({str(tmp_path / 'notes.txt')!r}, 0)",
        "os.symlink('/etc', 'link')",
        "open('/etc/passwd')",
        "os.listdir('/proc')",
        "open(f'/proc/{os.getppid()}/environ')",
        "os.listdir(os.path.expanduser('~root'))",
        "__import__('resource').prlimit(os.getppid(), 0, (1, 1))",
        "os.setuid(0)",
    ]
    for expression in blocked:
        assert harm(f"raises(lambda: {expression})") == {"score": 1.0}, expression
    assert harm("os.system('true') != 0") == {"score": 1.0}
    assert harm("len([name for name in os.environ if 'KEY' in name or 'TOKEN' in name])") == {"score": 0.0}
    assert harm("descriptors()") == {"score": 5.0}  # three to nowhere, two pipes
    assert harm("open('own.txt', 'w').write('scratch')") == {"score": 7.0}
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "private"


def test_answers_that_overrun_or_end_their_worker_score_nothing(harm: Callable[[str], dict[str, Any]]) -> None:
    """The answers before and after them are paid; `harm` compares them."""
    assert harm("9**9**9 and 1") == {"stopped": "its grading took longer than 1 seconds"}
    assert harm("os._exit(0)") == {"stopped": "its grader ended with status 0"}
    assert harm("os.abort()")["stopped"].startswith("its grader was ended by SIG")
    assert harm("sys.exit(3)") == {"stopped": "its grading raised SystemExit: 3"}
    assert harm("1 / 0") == {"unusable": "raised ZeroDivisionError: division by zero"}
    assert harm("float('nan')") == {"unusable": "gave nan, expected a finite number"}


def test_a_worker_that_waits_is_ended(tmp_path: Path) -> None:
    """Processor time does not run while a grader sleeps."""
    (tmp_path / "harm.py").write_text(HARM, encoding="utf-8")
    workers = WorkerPool("function", f"{tmp_path}/harm.py:graded", Limits(wall=3), workers=1)
    verl = {"data_source": "", "ground_truth": "", "extra_info": {}}
    asked = [(0, "1", 0), (0, "time.sleep(60)", 1), (0, "2", 2)]
    stopped = {"stopped": "its grading waited longer than 3 seconds"}
    assert workers.results([verl], asked) == [{"score": 1.0}, stopped, {"score": 2.0}]
    workers.close()


@linux
def test_memory_is_limited(harm: Callable[[str], dict[str, Any]]) -> None:
    assert "memory" in harm("grows()")["stopped"]


def test_a_worker_cannot_forge_scores(harm: Callable[[str], dict[str, Any]]) -> None:
    """Printing does not reach the pipe; what reaches it must be the message that is due."""
    assert harm("print('{\"n\": 1, \"score\": 9}') or os.write(1, b'x') and 0.5") == {"score": 0.5}
    assert harm("os.write(4, b'\\xff' * 8)") == {"stopped": "its grader sent something else than a score"}
    assert harm('[os.write(4, b\'\\0\\0\\0\\x13{"n":7,"score":9.0}\'), time.sleep(9)]') == {
        "stopped": "its grader sent something else than a score"
    }


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {"n": 1, "score": 1.0},
        {"n": 0},
        {"n": 0, "score": "1"},
        {"n": 0, "score": float("nan")},
        {"n": 0, "score": True},
        {"n": 0, "stopped": 1},
        {"score": 1.0},
    ],
)
def test_messages_that_are_not_due(message: Any) -> None:
    assert checked(message, 0, 1) is None
    assert checked({"n": 1, "score": 1}, 1, 1) is None


def test_frames() -> None:
    """Bytes arrive in any pieces; what is no message is an error, whatever its length says."""
    messages = [{"a": "\ud800 ü"}, [], 3]
    whole = b"".join(map(frames.encoded, messages))
    inbox = frames.Inbox()
    assert [message for i in range(len(whole)) for message in inbox.take(whole[i : i + 1])] == messages
    for broken in (b"\x00\x00\x00\x02{]", b"\xff\xff\xff\xff", frames.LENGTH.pack(200_000) + b"[" * 200_000):
        with pytest.raises(frames.BrokenFrameError):
            list(frames.Inbox().take(broken))


def test_many_threads_share_the_workers() -> None:
    """verl calls the reward from many threads; each gets its own answer's score."""
    reward, wrong = load_reward("math"), []

    def ask(k: int) -> None:
        for i in range(5):
            given = reward.many([(_problem("p", str(k)), f"\\boxed{{{k + i * j}}}", j) for j in range(3)])
            if given != [1.0, float(i == 0), float(i == 0)]:
                wrong.append((k, i, given))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_lost_worker_is_replaced() -> None:
    """The system ends processes where memory is short; answers in their hands are graded again."""
    workers = WorkerPool("math", workers=1)
    ask = [(0, "\\boxed{42}", 0), (0, "\\boxed{43}", 1)]
    assert workers.results(["42"], ask) == [{"score": 1.0}, {"score": 0.0}]
    (worker,) = workers._idle
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert workers.results(["42"], ask) == [{"score": 1.0}, {"score": 0.0}]
    assert workers._idle[0].process.pid != worker.process.pid
    assert not Path(worker.scratch).exists()
    workers.close()


TRAINER = """
import json, os, sys, time
from gradstore.trainer.sampling.workers.pool import Limits, WorkerPool
workers = WorkerPool("function", sys.argv[1] + ":graded", Limits(seconds=100, wall=100), workers=1)
verl = {"data_source": "", "ground_truth": "", "extra_info": {}}
workers.results([verl], [(0, "1", 0)])
print(workers._idle[0].process.pid, flush=True)
child = os.fork()  # holds no pipe of the workers
if not child:
    time.sleep(20)
    os._exit(0)
print(child, flush=True)
workers.results([verl], [(0, "time.sleep(50)", 0)])
"""


def test_workers_end_with_their_trainer(tmp_path: Path) -> None:
    """After kill -9 in the middle of an answer no process and no folder is left, though a forked child lives on."""
    (tmp_path / "harm.py").write_text(HARM, encoding="utf-8")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, f"{tmp_path}/harm.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        keeper, child = int(trainer.stdout.readline()), int(trainer.stdout.readline())
        time.sleep(1)
        group = _group(keeper)
        assert len(group) == 2
        trainer.kill()
        for _ in range(100):
            if not _group(keeper):
                break
            time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
    assert not _group(keeper)
    assert list(tmp_path.glob("gradstore-rewards-*")) == []


def _group(keeper: int) -> list[int]:
    """A keeper and its grader, if they live."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            _, _, rest = (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if state != "Z" and keeper in (int(place.name), int(parent)):
            found.append(int(place.name))
    return found


def test_what_is_missing_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without the protections rewards still run; the warning names what is missing."""
    pool._say_missing.cache_clear()
    for _ in range(2):
        pool._say_missing(("rules for files (Landlock): ...",))
    assert caplog.text.count("without: rules for files (Landlock)") == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    assert len(confinement.missing()) == 3


def test_isolated_reward_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function, called with the same arguments; what it raises is an error as in this process."""
    (tmp_path / "mine.py").write_text(
        "def paid(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': extra_info['rollout_index'] + float(solution_str == ground_truth)}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("isolated:mine.py:paid")
    problem = _problem("p", "7")
    assert reward.many([(problem, "7", 0), (problem, "8", 1), (problem, "7", 2)]) == [1.0, 1.0, 3.0]
    assert reward.faults([problem]) == [None]
    with pytest.raises(RequestError, match=r"the workers of reward .*mine.py:gone' cannot start: .*no function 'gone'"):
        load_reward("isolated:mine.py:gone")(problem, "7", 0)


def test_the_reason_reaches_the_user(caplog: pytest.LogCaptureFixture) -> None:
    problem = _problem("p", "42")
    reward: Reward = load_reward("math")
    long = "1" * (5 << 20)
    assert [score.stopped for score in reward.scores([(problem, long, 0), (problem, "42", 1)])] == [
        "it has more than 4194304 characters",
        None,
    ]
    assert reward.many([(problem, "42", 0), (problem, long, 1)]) == [1.0, 0.0]
    assert "1 of 2 answers were not graded and score 0; the first is rollout 1 of problem 'p': it has" in caplog.text


def test_a_comparison_that_was_cut_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sympy remembers of it is not sure: a truth was once found equal to anything. So the grader is replaced."""
    cuts = itertools.count()
    monkeypatch.setattr(grading, "interrupted", lambda: next(cuts))
    monkeypatch.setattr(grading, "grade", lambda gold, response: True)
    result = grader._math("5", "\\boxed{9^9\\infty}")
    assert result == {"stopped": "its comparison took longer than five seconds", "retire": True}
