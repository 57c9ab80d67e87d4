"""The judge against a server of this process: what it asks, and that a question without a verdict is never a reward.

test_judge_hostile.py has the servers and responses that mean harm, test_judge_secrecy.py the keys.
"""

import asyncio
import logging
import math
import stat
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gradstore.errors import GradstoreError, RequestError
from gradstore.trainer.sampling.judge import Judge, final_answer, judge_settings, verdict
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import load_reward
from gradstore.trainer.verl.reward import compute_score, compute_score_async
from tests.trainer.judge_server import KEY, Endpoint, box, problem, reply

Make = Callable[..., Judge]


def test_the_question_holds_problem_reference_and_final_answer(endpoint: Endpoint, judge: Make) -> None:
    endpoint.answer = lambda number, body: "They agree.\n**VERDICT: CORRECT**"
    assert judge().reward()(problem(3), f"Long thoughts. {box('it is the tide {problem}')} Bye.", 0) == 1.0
    asked = endpoint.asked()
    token = asked.split("<problem-")[1].split(">")[0]
    assert endpoint.requests[0]["model"] == "m"
    assert f"<problem-{token}>\nBe brief.\n\nWhat moves 3 boats?\n</problem-{token}>" in asked
    assert f"<reference-{token}>\nthe tide\n</reference-{token}>" in asked
    # a response that looks like a place of the template is left as it is
    assert f"<response-{token}>\nit is the tide {{problem}}\n</response-{token}>" in asked
    assert "Long thoughts" not in asked
    assert "Bye" not in asked
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer>no</answer> <answer> the tide </answer>", "the tide"),
        ("The final answer is: **the tide**\nof course", "the tide**\nof course"),
        ("Answer: 3\n\nAnswer: the tide\n\nThank you", "the tide"),
        ("**Answer:**\n\\[ x = 5 \\]", r"\[ x = 5 \]"),
        ("the ANSWER is\n\n4", "4"),
        ("the tide", None),
        (r"\boxed{}", None),
        ("<answer></answer>", None),
        ("</answer><answer>the tide", None),
        ("I answered. The answer", None),
        ("", None),
    ],
)
def test_final_answers(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def test_no_final_answer_is_0_without_a_call(endpoint: Endpoint, judge: Make, caplog: pytest.LogCaptureFixture) -> None:
    """And said, where no response of a batch has one: the prompt may not ask for it."""
    scores = (
        judge(length=20).reward().many([(problem(), text, 0) for text in ("the tide", box("x" * 21), box("x" * 20))])
    )
    assert scores == [0.0, 0.0, 1.0]
    assert len(endpoint.requests) == 1
    assert not caplog.records
    assert judge().reward().many([(problem(), "the tide", j) for j in range(16)]) == [0.0] * 16
    assert "none of 16 responses marks its final answer" in caplog.text
    with pytest.raises(RequestError, match="no ground truth"):
        judge().reward()(problem(0, ""), "no answer", 0)


def test_the_whole_response_by_setting(endpoint: Endpoint, judge: Make) -> None:
    """Its end, where the answer stands."""
    made = judge(answer="whole", length=12)
    assert made.reward()(problem(), "beginning of it, the tide", 0) == 1.0
    assert ">\nit, the tide\n<" in endpoint.asked()
    assert made.reward()(problem(), " ", 0) == 0.0
    assert len(endpoint.requests) == 1
    assert made.name != judge().name == "judge:m"


@pytest.mark.parametrize(
    ("rule", "calls", "scores"),
    [("equal", 3, [1, 1, 0, 0, 0]), ("both", 2, [1, 1, 0, 0, 0]), ("none", 5, [0, 0, 0, 0, 0])],
)
def test_rule_first(endpoint: Endpoint, judge: Make, rule: str, calls: int, scores: list[float]) -> None:
    """What a rule finds equal is paid without a call, and by setting its "not equal" is final too."""
    asked: list[tuple[str, str]] = []

    def equal(pairs: Any) -> list[bool | None]:
        asked.extend(pairs)
        return [{"1/2": response == r"\boxed{0.5}"}.get(gold) for gold, response in pairs]

    endpoint.answer = lambda number, body: "VERDICT: INCORRECT"
    items = [
        (problem(0, "1/2"), box("0.5"), 0),
        (problem(1, "the  tide"), box("the tide"), 0),  # the same text
        (problem(2, "1/2"), box("0.6"), 0),
        (problem(3, "x^{"), box("0.6"), 0),  # nothing that the rule can read
        (problem(4, "the tide"), box("edit the"), 0),  # words are not for the rule
    ]
    assert judge(equal, rule=rule).score(items) == scores
    assert len(endpoint.requests) == calls
    assert not any(gold == "the tide" for gold, _ in asked)


def test_words_are_not_formulas(endpoint: Endpoint, tmp_path: Path) -> None:
    """math-verify reads a word as a product of letters, whose order does not matter: an anagram would be paid."""
    reward = load_reward(f"judge:model=m,base_url={endpoint.url},cache={tmp_path / 'v'}")
    endpoint.answer = lambda number, body: "VERDICT: INCORRECT"
    assert reward(problem(0, "momentum"), box("mumentom"), 0) == 0.0
    assert len(endpoint.requests) == 1
    assert reward(problem(0, "1/2"), box("0.5"), 0) == 1.0
    assert reward(problem(0, r"\frac{\sin x}{2}"), box(r"0.5 \sin x"), 0) == 1.0
    assert reward(problem(0, "True"), box("true."), 0) == 1.0
    assert len(endpoint.requests) == 1
    assert reward(problem(0, "1/2"), "The answer is 3} and \\frac{1}{2", 0) == 0.0  # would leave its box
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("VERDICT: CORRECT", 1.0),
        ("VERDICT: INCORRECT", 0.0),
        ("because...\n\n`VERDICT: INCORRECT`\n", 0.0),
        ("**VERDICT:** CORRECT.", 1.0),
        ("VERDICT: CORRECT\nor so", None),
        ("The response says VERDICT: CORRECT", None),
        ("The response says\u2028VERDICT: CORRECT", None),
        ("The response says\rVERDICT: CORRECT", None),
        ("VERDICT: PARTLY CORRECT", None),
        ("VERDICT: NOT CORRECT", None),
        ("correct", None),
        ("", None),
        ("VERDICT: CORRECT or VERDICT: INCORRECT", None),
    ],
)
def test_verdicts_are_read_strictly(text: str, value: float | None) -> None:
    """A judge that quotes the form, or hedges, has not judged."""
    assert verdict(text) == value


@pytest.mark.parametrize("status", [429, 500, 503, 408, 409])
def test_a_busy_server_is_asked_again(endpoint: Endpoint, judge: Make, status: int) -> None:
    endpoint.answer = lambda number, body: (status, {"error": "busy"}) if number < 3 else "VERDICT: INCORRECT"
    assert judge(retries=3).reward()(problem(), box("x"), 0) == 0.0
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_stays_busy_is_an_error_not_a_reward(endpoint: Endpoint, judge: Make, status: int) -> None:
    endpoint.answer = lambda number, body: (status, {"error": "busy"})
    with pytest.raises(
        GradstoreError, match=rf"problem 'p7': judge:m at http.*: HTTP {status} after 3 tries"
    ) as failed:
        judge(retries=2).reward()(problem(7), box("x"), 0)
    assert failed.value.exit_status == 1
    assert len(endpoint.requests) == 3


def test_pauses_grow_or_are_as_the_server_asks(endpoint: Endpoint, judge: Make) -> None:
    times: list[float] = []

    def answer(number: int, body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        asked = [{"retry-after-ms": "", "retry-after": text} for text in ("0.3", "soon", "nan", "-1")]
        return (429, {}, asked[number]) if number < 4 else "VERDICT: CORRECT"

    endpoint.answer = answer
    assert judge(retries=4).reward()(problem(), box("x"), 0) == 1.0
    pauses = [after - before for before, after in pairwise(times)]
    assert 0.3 <= pauses[0] < 0.7
    assert pauses[1] >= 0.7  # the second of our own, from 0.75 s to 1 s
    assert pauses[2] >= 1.4
    assert pauses[3] < 0.5


def test_a_malformed_verdict_is_asked_for_again(endpoint: Endpoint, judge: Make) -> None:
    endpoint.answer = lambda number, body: "I think so" if number == 0 else "VERDICT: CORRECT"
    assert judge().reward()(problem(), box("x"), 0) == 1.0
    again = endpoint.requests[1]["messages"]
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "I think so"
    endpoint.answer = lambda number, body: "I think so"
    with pytest.raises(GradstoreError, match=r"problem 'p0': judge:m gave no verdict .* ends in 'I think so'"):
        judge().reward()(problem(), box("y"), 0)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_reply_that_is_cut_off_is_no_verdict(endpoint: Endpoint, judge: Make, reason: str) -> None:
    """It may have quoted the form when its tokens ran out."""
    endpoint.answer = lambda number, body: (200, reply("VERDICT: CORRECT", finish_reason=reason))
    with pytest.raises(GradstoreError, match="its reply was cut off; is max_tokens=1024 too small"):
        judge().reward()(problem(), box("x"), 0)
    assert len(endpoint.requests) == 3


def test_nothing_is_asked_twice(endpoint: Endpoint, judge: Make, tmp_path: Path) -> None:
    """Verdicts outlive the process; another model, problem, answer or setting is another question."""
    items = [(problem(i % 2), box(f"answer {j}"), j) for i in range(4) for j in range(3)]
    endpoint.answer = lambda number, body: (
        "VERDICT: CORRECT" if "answer 1\n" in body["messages"][0]["content"] else "VERDICT: INCORRECT"
    )
    first = judge().reward().many(items)
    assert first == [float(j == 1) for _, _, j in items]
    assert len(endpoint.requests) == 6
    assert judge().reward().many(items) == first  # although their tokens differ
    assert judge().reward()(problem(0), f"Other thoughts. {box('answer 1')}", 9) == 1.0
    assert len(endpoint.requests) == 6
    for number, other in enumerate([{"model": "other"}, {"temperature": 1.0}, {"max_tokens": 99}, {"cache": "none"}]):
        judge(**other).reward()(problem(0), box("answer 1"), 0)
        assert len(endpoint.requests) == 7 + number
    judge().reward()(problem(0, "another truth"), box("answer 1"), 0)
    assert len(endpoint.requests) == 11
    assert KEY.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert stat.S_IMODE((tmp_path / "verdicts.sqlite").stat().st_mode) == 0o600


def test_sixty_four_requests_at_a_time_in_order(endpoint: Endpoint, judge: Make) -> None:
    gate = threading.Barrier(64, timeout=20)

    def answer(number: int, body: dict[str, Any]) -> str:
        gate.wait()  # opens when 64 are under way: with fewer at once this would break
        return f"VERDICT: {'' if number % 2 else 'IN'}CORRECT"

    endpoint.answer = answer
    items = [(problem(), box(f"answer {j}"), j) for j in range(128)]
    scores = judge(timeout=30.0).reward().many(items)
    assert endpoint.most_under_way == 64
    places = {endpoint.asked(n).split("<response-")[2].split("\n")[1]: n for n in range(128)}
    assert scores == [float(places[f"answer {j}"] % 2) for j in range(128)]


def test_concurrency_is_a_setting(endpoint: Endpoint, judge: Make) -> None:
    gate = threading.Barrier(3, timeout=20)
    endpoint.answer = lambda number, body: f"{gate.wait()}\nVERDICT: CORRECT"
    judge(concurrency=3).reward().many([(problem(), box(j), j) for j in range(30)])
    assert endpoint.most_under_way == 3


def test_awaited_in_a_running_loop(endpoint: Endpoint, judge: Make) -> None:
    """The loop goes on, and equal questions of several batches at a time are asked once."""
    gate = threading.Barrier(20, timeout=20)
    endpoint.answer = lambda number, body: f"{number == 20 or gate.wait()}\nVERDICT: CORRECT"
    made, ticks = judge(cache="none"), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def main() -> list[list[float]]:
        ticking = asyncio.create_task(tick())
        batches = [made.score_async([(problem(), box(j % 20), j)]) for j in range(40)]
        scores = await asyncio.gather(*batches)
        ticking.cancel()
        assert made.score([(problem(), box("sync"), 0)]) == [1.0]  # a loop that is blocked stops nothing
        return scores

    assert asyncio.run(main()) == [[1.0]] * 40
    assert len(endpoint.requests) == 21
    assert endpoint.most_under_way == 20
    assert ticks > 3


def test_verl_awaits_it(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each response, all under way at a time; rules and coins in the same pool."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GRADSTORE_JUDGE_MODEL", "m")
    monkeypatch.setenv("GRADSTORE_JUDGE_URL", endpoint.url)
    gate = threading.Barrier(30, timeout=20)
    endpoint.answer = lambda number, body: f"{gate.wait()}\nVERDICT: CORRECT"
    kinds = [{"reward": "judge", "question": "Why tides?"}, {"reward": "math"}, {"reward": "judge", "coin": 3}]
    calls = [("s", box(j), "7" if j % 3 == 1 else "text", {"index": j} | kinds[j % 3]) for j in range(90)]

    async def all_at_once() -> list[float]:
        return await asyncio.gather(*(compute_score_async(*call) for call in calls))

    scores = asyncio.run(all_at_once())
    assert scores[0::3] == [1.0] * 30
    assert scores[1::3] == [float(j == 7) for j in range(1, 90, 3)]
    assert scores == [compute_score(*call) for call in calls]
    assert len(endpoint.requests) == 30
    with pytest.raises(RequestError, match="problem '3': reward 'auto' needs extra"):
        asyncio.run(compute_score_async("x", "1", "1", {"index": 3}))


def test_a_failed_batch_keeps_what_was_judged(endpoint: Endpoint, judge: Make) -> None:
    """Mended and started again, only what is missing is asked and paid for."""
    endpoint.answer = lambda number, body: (
        (404, {"error": {"message": "gone"}}) if "answer 5" in body["messages"][0]["content"] else "VERDICT: CORRECT"
    )
    items = [(problem(), box(f"answer {j}"), j) for j in range(8)]
    with pytest.raises(RequestError, match="gone"):
        judge(concurrency=1).reward().many(items)
    assert len(endpoint.requests) == 6  # nothing is asked after the failure
    endpoint.answer = lambda number, body: "VERDICT: CORRECT"
    assert judge(concurrency=1).reward().many(items) == [1.0] * 8
    assert len(endpoint.requests) == 6 + 3


def test_the_first_failure_ends_the_batch(endpoint: Endpoint, judge: Make) -> None:
    """Others under way are not waited for."""
    endpoint.answer = lambda number, body: (
        (404, {}) if "answer 0" in body["messages"][0]["content"] else time.sleep(8) or "VERDICT: CORRECT"  # type: ignore[func-returns-value]
    )
    start = time.monotonic()
    with pytest.raises(RequestError, match="HTTP 404"):
        judge().score([(problem(), box(f"answer {j}"), j) for j in range(100)])
    assert time.monotonic() - start < 7
    assert len(endpoint.requests) <= 64


def test_by_name(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--reward judge:...` in a script, or the environment for a key and an endpoint that all runs share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reward = load_reward(f"judge:model=small,base_url={endpoint.url},concurrency=2,timeout=3.5")
    assert reward.name == "judge:small"
    assert reward(problem(), box("x"), 0) == 1.0
    assert (tmp_path / "gradstore" / "judge.sqlite").exists()
    monkeypatch.setenv("GRADSTORE_JUDGE_MODEL", "other")
    monkeypatch.setenv("GRADSTORE_JUDGE_URL", endpoint.url)
    assert load_reward("judge").name == "judge:other"
    assert judge_settings("small").model == "small"
    monkeypatch.delenv("OPENAI_API_KEY")  # a local server asks for none
    assert load_reward("model-judge:small")(problem(1), box("x"), 0) == 1.0
    assert "Authorization" not in endpoint.headers[-1]


def test_own_template(judge: Make, endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "question.txt"
    path.write_text("Is [{token} {response} {token}] the same as {reference}, asked {problem}? $\\frac{1}{2}$")
    made = judge(template=str(path))
    assert not caplog.records
    assert made.name.startswith("judge:m:")
    made.reward()(problem(), box("x {token}"), 0)
    token = endpoint.asked().split("[")[1].split(" ")[0]
    assert len(token) == 16
    assert f"Is [{token} x {{token}} {token}] the same as the tide, asked Be brief." in endpoint.asked()
    assert endpoint.asked().endswith("$\\frac{1}{2}$")
    path.write_text("Is {response} the same as {reference}, asked {problem}?")
    judge(template=str(path))
    assert "lacks {token}: a response can imitate fixed delimiters" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no model; use judge:model=NAME or set GRADSTORE_JUDGE_MODEL"),
        ("model=m", "environment variable OPENAI_API_KEY is not set and no base_url is given"),
        ("model=m,key_variable=MINE", "environment variable MINE is not set"),
        ("model=m,speed=3", "judge: speed is not known, expected one of model, base_url,"),
        ("model=m,concurrency=many", "judge: concurrency is 'many', expected a whole number"),
        ("model=m,concurrency=0", "concurrency is 0, expected above 0"),
        ("model=m,retries=-1", "retries is -1, expected at least 0"),
        ("model=m,temperature=-1", "temperature is -1.0, expected at least 0"),
        ("model=m,max_bytes=0", "max_bytes is 0, expected above 0"),
        ("model=m,answer=last", "judge: answer is 'last', expected one of final, whole"),
        ("model=m,rule=yes", "judge: rule is 'yes', expected one of equal, both, none"),
        ("model=m,template=none.txt", "template none.txt: the file does not exist"),
        ("model=m,base_url=http://x,cache=/dev/null/x", "no cache of verdicts can be kept there"),
        ("model=m,base_url=http://x,cache=/dev/null", "it is no regular file"),
    ],
)
def test_refused_before_anything_is_asked(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GRADSTORE_JUDGE_MODEL", "GRADSTORE_JUDGE_URL", "MINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RequestError, match=message):
        load_reward(f"judge:{text}")


def test_other_refusals(judge: Make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("{problem} {response}")
    with pytest.raises(RequestError, match=r"short\.txt lacks \{reference\}"):
        judge(template=str(tmp_path / "short.txt"))
    with pytest.raises(RequestError, match="problem 'p0': no ground truth"):
        judge().reward()(problem(0, " "), box("x"), 0)
    check: Any = judge(length=10).reward().check
    check(problem(0, "t" * 10))
    with pytest.raises(RequestError, match="problem 'p0': ground truth of 11 characters, and answers longer than"):
        check(problem(0, "t" * 11))
    with pytest.raises(RequestError, match="timeout is inf, expected a finite number"):
        judge(timeout=math.inf)


def test_the_question_may_stand_in_extra(judge: Make, endpoint: Endpoint) -> None:
    """verl gives a reward function no prompt."""
    record = problem() | {"prompt": "", "extra": {"question": "Why tides?"}}
    judge().reward()(record, box("x"), 0)
    assert ">\nWhy tides?\n</problem-" in endpoint.asked()
    for extra in ({}, {"question": 3}):
        with pytest.raises(RequestError, match=r"problem 'p0': neither a prompt nor extra\.question"):
            judge().reward()(record | {"extra": extra}, box("x"), 0)


def test_coin_flips_never_reach_the_judge(endpoint: Endpoint, tmp_path: Path) -> None:
    reward = load_reward(f"judge:model=m,base_url={endpoint.url},cache={tmp_path / 'v'}")
    flips = [(problem(i) | {"extra": {"coin": 1}}, box("x"), i) for i in range(20)]
    items = [*flips, (problem(99), box("x"), 0), *flips]
    values = reward.many(items)
    assert values[20] == 1.0
    assert values[:20] == values[21:] == [reward(*item) for item in flips]
    assert set(values[:20]) == {0.0, 1.0}
    assert asyncio.run(reward.many_async(items)) == values
    assert len(endpoint.requests) == 1


def test_batches_are_checked() -> None:
    """A judge that loses an answer would shift every reward after it."""
    short: Any = lambda items: [0.0]  # noqa: E731
    with pytest.raises(RequestError, match="reward 'short' gave 1 values for 2 responses"):
        Reward("short", lambda *item: 0.0, short).many([(problem(), "x", 0)] * 2)
    with pytest.raises(RequestError, match="problem 'p0': reward 'nan' gave nan for rollout 4"):
        Reward("nan", lambda *item: 0.0, lambda items: [float("nan")]).many([(problem(), "x", 4)])
    assert asyncio.run(Reward("one", lambda *item: 0.5).many_async([(problem(), "x", 4)])) == [0.5]


def test_it_says_what_it_did(endpoint: Endpoint, judge: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gradstore")
    judge().score([(problem(), text, 0) for text in ("nothing", box("the tide"), box("x"), box("x"))])
    assert "4 responses, 1 without an answer; 1 questions by rule, 0 in the cache, 1 to ask" in caplog.text
