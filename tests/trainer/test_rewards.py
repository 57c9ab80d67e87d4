"""Rewards pay what their verifiers say, for any way of writing an answer, and say clearly when they cannot."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from gradstore import RequestError
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rewards import answer_of, load_reward


def _problem(ground_truth: str = "", **fields: Any) -> dict[str, Any]:
    return {"id": "p1", "source": "test", "prompt": "?", "ground_truth": ground_truth, "tags": [], "extra": {}} | fields


ANSWERS = [
    ("42", "The answer is \\boxed{42}.", 1.0),
    ("42", "so we get 41, no: 42", 1.0),
    ("42", "\\boxed{42} although one might think of 43", 1.0),
    ("42", "\\boxed{43}, not 42", 0.0),
    ("-4", "-4", 1.0),
    ("4", "-4", 0.0),
    ("1,234", "1234", 1.0),
    ("\\frac12", "it is $0.5$", 1.0),
    ("\\boxed{3}", "3", 1.0),
    ("$\\sqrt{2}$", "\\boxed{2^{1/2}}", 1.0),
    ("x^2+1", "$1+x^2$", 1.0),
    ("x^2+1", "$x^2-1$", 0.0),
    ("(1,2)", "\\boxed{(1, 2)}", 1.0),
    ("50\\%", "0.5", 1.0),
    ("42", "", 0.0),
    ("42", "I do not know", 0.0),
    ("42", "\\boxed{", 0.0),
    ("42", "\ufffd\x00 \\frac{", 0.0),
]


@pytest.mark.parametrize(("gold", "response", "expected"), ANSWERS)
def test_math(gold: str, response: str, expected: float) -> None:
    assert load_reward("math")(_problem(gold), response, 0) == expected


def test_math_in_another_thread() -> None:
    """math-verify's timeouts are signals, which another thread cannot receive: called there it raises, or pays 0."""
    reward, paid = load_reward("math"), []

    def pay() -> None:
        paid.extend(reward(_problem(gold), response, 0) for gold, response, _ in ANSWERS)

    thread = threading.Thread(target=pay)
    thread.start()
    thread.join()
    assert paid == [expected for _, _, expected in ANSWERS]


def test_runaway_answer_is_wrong_not_endless() -> None:
    """A policy learns to write towers of powers; a comparison that never ends would stop the whole run."""
    assert load_reward("math")(_problem("5"), "\\boxed{9^{9^{9^9}}}", 0) == 0.0


@pytest.mark.parametrize("gold", ["", "   "])
def test_math_needs_a_ground_truth(gold: str) -> None:
    """Without one every answer would be wrong, and the problem would look unsolvable."""
    with pytest.raises(RequestError, match=r"problem 'p1': ground truth .* is nothing that can be graded"):
        load_reward("math")(_problem(gold), "42", 0)


@pytest.mark.parametrize("dataset", sorted(DATASETS.keys() - {"composite"}))
def test_reasoning_gym_pays_as_the_data_set(dataset: str) -> None:
    """The entry goes through JSON in a problem file; every verifier must say the same of it afterwards."""
    entries = reasoning_gym.create_dataset(dataset, size=1, seed=3)
    entry = entries[0]
    extra = json.loads(json.dumps({"reasoning_gym": {"dataset": dataset, "entry": entry}}))
    reward, problem = load_reward("reasoning-gym"), _problem(extra=extra)
    for answer in (str(entry["answer"]), "7", "nonsense"):
        try:
            expected = entries.score_answer(answer.strip(), entry)
        except (TypeError, ValueError, AttributeError, KeyError):  # at an answer of another shape
            expected = 0.0
        assert reward(problem, f"thinking... <answer> {answer}\n</answer>", 0) == expected
        assert reward(problem, f" {answer}\n", 0) == expected


def test_reasoning_gym_with_the_settings_of_the_data_set() -> None:
    """Some verifiers judge by their settings: here, which numbers a right expression may be made of."""
    settings = {"max_value": 6}
    entries = reasoning_gym.create_dataset("puzzle24", size=1, seed=0)
    problem = _problem(extra={"reasoning_gym": {"dataset": "puzzle24", "entry": entries[0]}})
    assert load_reward("reasoning-gym")(problem, "8 * 3 * 1 * 1", 0) == 1.0
    problem["extra"]["reasoning_gym"]["config"] = settings
    assert load_reward("reasoning-gym")(problem, "8 * 3 * 1 * 1", 0) == 0.01


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "needs extra.reasoning_gym with 'dataset' and 'entry'"),
        ({"reasoning_gym": {"dataset": "chain_sum"}}, "needs extra.reasoning_gym"),
        ({"reasoning_gym": {"dataset": "no_such", "entry": {}}}, "no reasoning-gym data set 'no_such'"),
        ({"reasoning_gym": {"dataset": "chain_sum", "entry": {}}}, "cannot use extra.reasoning_gym.entry: KeyError"),
        ({"reasoning_gym": {"dataset": "chain_sum", "entry": {}, "config": {"x": 1}}}, "'chain_sum' so configured"),
    ],
)
def test_reasoning_gym_refusals(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"problem 'p1': .*{message}"):
        load_reward("reasoning-gym")(_problem(extra=extra), "1", 0)


def test_answer_is_what_the_last_tags_hold() -> None:
    assert answer_of("<answer>1</answer> wait <answer>\n2 </answer>.") == "2"
    assert answer_of(" 3\n") == "3"
    assert answer_of("<answer>4") == "<answer>4"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n"
        "calls = []\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    calls.append((data_source, solution_str, ground_truth, extra_info))\n"
        "    return float(solution_str == ground_truth)\n"
        "def as_dict(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': np.float32(0.5), 'acc': True}\n"
        "def echo(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return eval(solution_str)\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    return "my_rewards"


def test_user_function_is_called_as_verl_calls_it(user_module: str) -> None:
    """One function must serve both: what verl pays during training is what the sketches were made of."""
    reward = load_reward(f"{user_module}:compute_score")
    problem = _problem("7", extra={"split": "train"})
    assert reward(problem, "7", 2) == 1.0
    assert reward(problem, "8", 0) == 0.0
    import my_rewards  # type: ignore[import-not-found]

    data_source, solution, ground_truth, extra_info = my_rewards.calls[0]
    assert (data_source, solution, ground_truth) == ("test", "7", "7")
    assert (extra_info["index"], extra_info["rollout_index"]) == ("p1", 2)


@pytest.mark.parametrize("module", ["my_rewards", "./my_rewards.py"])
def test_user_function_may_give_a_dict(user_module: str, module: str) -> None:
    assert load_reward(f"{module}:as_dict")(_problem(), "", 0) == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("float('nan')", "gave nan for rollout 4, expected a finite number"),
        ("float('inf')", "gave inf"),
        ("None", "gave None"),
        ("'1'", "gave '1'"),
        ("{'acc': 1}", r"gave a dict without 'score' \(found: acc\)"),
        ("{'score': None}", "gave None"),
        ("np.ones(2)", "gave array"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_bad_result_names_the_problem(user_module: str, given: str, message: str) -> None:
    """A reward that is not a number would make every gradient of its group one that is not a number."""
    with pytest.raises(RequestError, match=f"problem 'p1': reward 'my_rewards:echo' {message}") as refused:
        load_reward("my_rewards:echo")(_problem(), given, 4)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "value"), [("np.float32(2)", 2.0), ("True", 1.0), ("np.array(3)", 3.0), ("-1", -1.0)]
)
def test_numbers_of_any_kind(user_module: str, given: str, value: float) -> None:
    paid = load_reward("my_rewards:echo")(_problem(), given, 0)
    assert paid == value
    assert type(paid) is float


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "unknown reward 'maths', expected 'math', 'reasoning-gym', 'judge', 'auto', 'module:function' or"),
        ("my_rewards:", "unknown reward"),
        (":f", "unknown reward"),
        ("no_such_module:f", "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken:f", "cannot import broken: ModuleNotFoundError: No module named 'no_such_module'"),
        ("none.py:f", "cannot import none.py: FileNotFoundError: no such file none.py"),
        ("my_rewards:none", "my_rewards has no function 'none'"),
        ("my_rewards:number", "my_rewards has no function 'number'"),
    ],
)
def test_unknown_rewards(user_module: str, spec: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_reward(spec)
    assert message in str(refused.value)
    assert refused.value.exit_status == 2


def test_any_callable_can_be_a_reward() -> None:
    """The embedded trainer and the demo bring their own."""
    reward = Reward("half", lambda record, response, rollout_index: np.float64(0.5))
    assert reward(_problem(), "", 0) == 0.5
