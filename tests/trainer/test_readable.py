"""Problems that a reward cannot pay are found before anything is sampled, all of them, each with its reason."""

from typing import Any

import pytest

from gradstore import RequestError
from gradstore.trainer.sampling.readable import readable
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import load_reward


def _problem(name: str, truth: str = "1", **extra: Any) -> dict[str, Any]:
    return {"id": name, "source": "", "prompt": "q", "ground_truth": truth, "tags": [], "extra": extra}


def _gym(name: str, **entry: Any) -> dict[str, Any]:
    whole = {"question": "1 + 1 = ", "answer": "2", "metadata": {}} | entry
    return _problem(name, "2", reasoning_gym={"dataset": "chain_sum", "entry": whole})


GOOD = [_problem("a", "3"), _problem("b", "True"), _problem("c", "(C)"), _problem("d", r"\frac12"), _problem("e", "x")]
BAD = [_problem("empty", ""), _problem("prose", "the $ sign"), _problem("blank", "  ")]


def test_unreadable_truths_of_math() -> None:
    """Every one is named, by file and row where they are known; the readable ones are kept in order."""
    mixed = [GOOD[0], BAD[0], *GOOD[1:3], BAD[1], *GOOD[3:], BAD[2]]
    reward = load_reward("math")
    kept, left_out = readable(mixed, reward, skip=True, names={"prose": "f.jsonl, line 5"})
    assert kept == GOOD
    assert [line.partition(": ground truth")[0] for line in left_out] == [
        "problem 'empty'",
        "f.jsonl, line 5: problem 'prose'",
        "problem 'blank'",
    ]
    with pytest.raises(RequestError, match=r"cannot pay 3 of 8 problems: problem 'empty': .*--skip-unreadable"):
        readable(mixed, reward)
    assert readable(GOOD, reward) == (GOOD, [])


def test_a_long_list_is_counted() -> None:
    many = [_problem(f"p{i}", "the $ sign") for i in range(9)]
    with pytest.raises(RequestError, match=r"9 of 9 problems.*'p1'.*; and 7 more\. Expected .*Mend") as refused:
        readable(many, load_reward("math"))
    assert "'p2'" not in str(refused.value)
    assert len(readable(many, load_reward("math"), skip=True)[1]) == 9


def test_what_is_expected_is_said_once() -> None:
    """The message is for one line of a terminal; a truth of a megabyte is cut."""
    with pytest.raises(RequestError, match=r"problem 'b': .*\. Expected True or False, .* LaTeX\. Mend") as refused:
        readable([_problem("a", ""), _problem("b", "x" * 10**6), _problem("c", "3")], load_reward("math"))
    assert str(refused.value).lower().count("expected") == 1
    assert len(str(refused.value)) < 1000


def test_what_other_rewards_need() -> None:
    """The check agrees with the reward itself, whatever the response."""
    coin = _problem("coin", "", coin=1)
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("reasoning-gym", _gym("gym"), True),
        ("reasoning-gym", _gym("broken", answer=None), False),
        ("reasoning-gym", _problem("none"), False),
        ("reasoning-gym", _problem("unknown", reasoning_gym={"dataset": "no such", "entry": {}}), False),
        ("math", coin, True),
        ("reasoning-gym", coin, True),
        ("auto", _problem("m", "4", reward="math"), True),
        ("auto", _problem("m", "", reward="math"), False),
        ("auto", _problem("n", "4"), False),
        ("auto", {**_gym("g"), "extra": {**_gym("g")["extra"], "reward": "reasoning-gym"}}, True),
    ]
    for name, problem, fine in cases:
        reward = load_reward(name)
        kept, left_out = readable([problem], reward, skip=True)
        assert (len(kept), len(left_out)) == ((1, 0) if fine else (0, 1)), (name, problem["id"], left_out)
        if fine:
            assert reward(problem, r"\boxed{7}", 0) in (0.0, 0.01, 1.0)
        else:
            with pytest.raises(RequestError):
                reward(problem, r"\boxed{7}", 0)


def test_a_judge_needs_a_truth_and_a_question(tmp_path: Any) -> None:
    """Known without asking it."""
    pytest.importorskip("httpx")
    reward = load_reward(f"judge:model=m,base_url=http://127.0.0.1:1/v1,cache={tmp_path / 'c.sqlite'}")
    kept, left_out = readable([_problem("a"), _problem("b", ""), {**_problem("c"), "prompt": ""}], reward, skip=True)
    assert [problem["id"] for problem in kept] == ["a"]
    assert len(left_out) == 2


def test_a_reward_without_a_check_pays_all() -> None:
    assert readable(BAD, Reward("own", lambda record, response, j: 1.0)) == (BAD, [])
