"""Rounds inside TRL's own GRPOTrainer: what it trains on, and that it trains as it would alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstore
from gradstore import RequestError
from gradstore.engine import target
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import sketcher_of
from tests.trainer.trl.conftest import BATCH, BENCHMARK, GENERATIONS, POOL, SELECTION, odd

trl = pytest.importorskip("trl", reason="needs trl: make install")

Make = Callable[..., Any]


class Killed(BaseException):
    """The process ends here."""


class Watching:
    """Mixin that keeps the problems of every generation batch."""

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        if self.model.training:
            self.seen = [*getattr(self, "seen", []), [row["id"] for row in inputs]]
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]


class Watched(Watching, trl.GRPOTrainer):
    """TRL alone, watched."""


def selecting(*mixins: Any) -> Any:
    from gradstore.trainer.trl import Selecting

    return type("Watched", (Selecting, *mixins, Watching, trl.GRPOTrainer), {})


def assert_same_weights(one: Any, other: Any) -> None:
    for own, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, theirs)


def cosines(one_PD: np.ndarray, other_PD: np.ndarray) -> np.ndarray:
    lengths_P = np.linalg.norm(one_PD, axis=1) * np.linalg.norm(other_PD, axis=1)
    return (one_PD * other_PD).sum(axis=1) / lengths_P


def test_each_round_picks_what_follows_the_target_and_trl_trains_on_it(make_trainer: Make) -> None:
    trainer = make_trainer(SELECTION, cls=selecting())
    trainer.train()
    store = gradstore.open(trainer._settings.store)
    rounds = store.rounds("pool")
    assert [one.about["step"] for one in rounds] == [0, 2]
    for number, one in enumerate(rounds):
        step = one.about["step"]
        toward_D = target(store, "bench", step).vector
        view = store.view("pool", step)
        rows = dict(zip(view.ids, view.take(view.ids), strict=True))
        candidates = [name for name, own in zip(view.ids, view.steps, strict=True) if own == step]
        assert set(one.picks) <= set(candidates)
        live = [name for name in one.table["id"].to_pylist() if np.any(rows[name])]
        score_of = {name: cosines(rows[name][None], toward_D[None])[0] for name in live}
        assert set(one.picks) == set(sorted(live, key=lambda name: -score_of[name])[:4])
        for batch in trainer.seen[2 * number : 2 * number + 2]:
            assert sorted(batch) == sorted([*one.picks] * GENERATIONS)


EXTRA = [
    {},
    {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "max_steps": 16},
    {"steps_per_generation": 4, "per_device_train_batch_size": 4, "max_steps": 32, "shuffle_dataset": False},
]


@pytest.mark.parametrize("settings", EXTRA, ids=["default", "reused", "split"])
def test_the_whole_pool_at_random_is_trl_alone(make_trainer: Make, settings: dict) -> None:
    """Same problems in the same batches, same rollouts, same weights: rounds leave nothing else behind."""
    settings = {"max_steps": 8} | settings
    alone = make_trainer(None, "alone", Watched, **settings)
    alone.train()
    whole = {**SELECTION, "selector": "rand", "candidates": None, "selected": N_POOL, "steps": 4}
    with_rounds = make_trainer(whole, "rand", selecting(), **settings)
    with_rounds.train()
    assert with_rounds.seen == alone.seen
    assert len(gradstore.open(with_rounds._settings.store).rounds("pool")) == 2
    assert_same_weights(with_rounds, alone)


N_POOL = len(POOL)


def test_without_a_selection_the_trainer_is_trl_alone(make_trainer: Make) -> None:
    alone = make_trainer(None, "alone", Watched)
    alone.train()
    off = make_trainer(None, "off", selecting())
    off.train()
    assert off.seen == alone.seen
    assert_same_weights(off, alone)


class _Kills:
    """A reward that ends the process after some calls."""

    __name__ = "odd"

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, **columns: Any) -> list[float]:
        self.left -= 1
        if not self.left:
            raise Killed
        return odd(**columns)


@pytest.mark.parametrize("at", [4, 6, 9, 13])
def test_a_killed_run_goes_on_as_if_undisturbed(make_trainer: Make, at: int) -> None:
    """In a round or between, whichever comes: the same picks, the same batches, the same weights."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    plan = {**SELECTION, "window": 2, "observe": "all"}
    calls = _Kills(10**9)
    whole = make_trainer(plan, "whole", selecting(), rewards=calls, **settings)
    whole.train()
    assert 10**9 - calls.left > at
    first = make_trainer(plan, "killed", selecting(), rewards=_Kills(at), **settings)
    with pytest.raises(Killed):
        first.train()
    again = make_trainer(plan, "killed", selecting(), rewards=odd, **settings)
    saved = any(Path(again.args.output_dir).glob("checkpoint-*"))
    again.train(resume_from_checkpoint=saved or None)
    stores = [gradstore.open(trainer._settings.store) for trainer in (whole, again)]
    picks = [[one.picks for one in store.rounds("pool")] for store in stores]
    assert picks[0] == picks[1]
    assert again.seen == whole.seen[-len(again.seen) :]
    for name in ("pool", "bench"):
        views = [store.view(name) for store in stores]
        assert list(views[0].ids) == list(views[1].ids)
        np.testing.assert_array_equal(views[0].steps, views[1].steps)
        np.testing.assert_array_equal(views[0].take(views[0].ids), views[1].take(views[0].ids))
    assert_same_weights(whole, again)


def test_a_checkpoint_of_another_run_is_refused(make_trainer: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(None, "run", Watched, **settings).train()
    with pytest.raises(RequestError, match="no state of rounds"):
        make_trainer(SELECTION, "run", **settings).train(resume_from_checkpoint=True)
    make_trainer(SELECTION, "other", **settings).train()
    with pytest.raises(RequestError, match="another pool"):
        make_trainer(SELECTION, "other", pool=POOL[::-1], **settings).train(resume_from_checkpoint=True)


def test_sketches_are_the_engines_on_the_trainers_weights(make_trainer: Make, tiny_model: Any) -> None:
    """Of rounds, and of the rollouts that a step trains on, before its update."""
    trainer = make_trainer({**SELECTION, "observe": "all"}, max_steps=2, bf16=False)
    seen: list[tuple[int, dict[str, torch.Tensor], list[Group]]] = []
    observe = trainer._rounds.observe

    def kept(policy: Any, groups: list[Group]) -> int:
        seen.append((policy.step, copy.deepcopy(trainer.model.state_dict()), groups))
        return observe(policy, groups)

    trainer._rounds.observe = kept
    trainer.train()
    store = gradstore.open(trainer._settings.store)
    step, weights, groups = seen[1]
    assert step == 1
    model = copy.deepcopy(tiny_model)
    model.load_state_dict(weights)
    expected = sketcher_of(store, model).sketch(groups)
    view = store.view("pool", 1)
    found = view.take(expected.ids)
    live = expected.sketches.any(axis=1)
    assert live.any()
    assert cosines(found[live], expected.sketches[live]) == pytest.approx(1, abs=1e-3)  # the store keeps 8 bits

    rolled = trainer._policy.roll_out(trainer._rows.pool[:3], 4, seed=1)
    found_PD = trainer._policy.sketch(rolled).sketches
    model.load_state_dict(trainer.model.state_dict())
    np.testing.assert_array_equal(found_PD, sketcher_of(store, model).sketch(rolled).sketches)
    assert found_PD.any(axis=1).all()


def test_a_rounds_rollouts_are_the_trainers_own_and_repeatable(make_trainer: Make) -> None:
    """The reward functions get the row's columns; neither TRL's logs nor the random state show that a round was."""
    given: list[str] = []

    def reward(answer: list[str], **columns: Any) -> list[float]:
        given.extend(answer)
        return odd(**columns)

    trainer = make_trainer(SELECTION, rewards=[reward, odd], reward_weights=[1.0, 0.5])
    trainer.model.train()
    records, before = trainer._rows.pool[:3], torch.random.get_rng_state()
    groups = trainer._policy.roll_out(records, 6, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert given == [row["answer"] for row in POOL[:3] for _ in range(6)]
    assert not trainer._metrics["eval"]
    assert not trainer._logs["prompt"]
    assert trainer.model.training
    for group, row in zip(groups, POOL, strict=False):
        assert group.problem_id == row["id"]
        assert group.prompt_ids.tolist() == trainer.processing_class(row["prompt"])["input_ids"]
        assert group.rewards.tolist() == pytest.approx([1.5 * one for one in odd(group.responses)])
    again = trainer._policy.roll_out(records, 6, seed=3)
    for one, other in zip(groups, again, strict=True):
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
    other = trainer._policy.roll_out(records, 6, seed=4)
    assert any(a.tolist() != b.tolist() for a, b in zip(groups[0].responses, other[0].responses, strict=True))


def test_weights_of_a_selection_multiply_the_advantages(make_trainer: Make) -> None:
    trainers = [make_trainer(SELECTION, name) for name in ("plain", "weighted")]
    outputs = []
    for trainer, weight in zip(trainers, (1.0, 3.0), strict=True):
        trainer.model.train()
        trainer._restore(trainer.state)
        round_ = trainer._round

        def weighted(number: int, weight: float = weight, round_: Any = round_, trainer: Any = trainer) -> Any:
            found = round_(number)
            name = trainer._rows.pool[found.order[0]]["id"]
            found.weights.update({name: weight})
            return found

        trainer._round = weighted
        torch.manual_seed(0)
        outputs.append(trainer._generate_and_score_completions([{}] * (BATCH * GENERATIONS)))
    plain, found = (output["advantages"] for output in outputs)
    assert plain[:GENERATIONS].abs().max() > 0
    torch.testing.assert_close(found[:GENERATIONS], 3 * plain[:GENERATIONS])
    torch.testing.assert_close(found[GENERATIONS:], plain[GENERATIONS:])


def test_lora_trains_and_is_sketched(make_trainer: Make) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    trainer = make_trainer(SELECTION, more={"peft_config": config}, max_steps=2)
    trainer.train()
    store = gradstore.open(trainer._settings.store)
    assert len(store.rounds("pool")[0].picks) == 4
    assert store.fingerprint["adapters"]


def test_probes_rank_too(make_trainer: Make) -> None:
    trainer = make_trainer({**SELECTION, "selector": "exact"}, max_steps=2)
    trainer.train()
    assert gradstore.open(trainer._settings.store).rounds("pool")[0].about["probe"]


def two_turns(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout function of two turns, between which the environment says three tokens."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    first, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    said = tokenizer(" ok")["input_ids"]
    second, _ = trainer._generate_single_turn(
        [p + f + said for p, f in zip(prompt_ids, first, strict=True)], None, {}, 1
    )
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [f + said + s for f, s in zip(first, second, strict=True)],
        "logprobs": None,
        "env_mask": [[1] * len(f) + [0] * len(said) + [1] * len(s) for f, s in zip(first, second, strict=True)],
    }


def test_tokens_of_an_environment_are_masked(make_trainer: Make) -> None:
    """What the environment said is read by the policy and not trained on."""
    trainer = make_trainer(SELECTION, more={"rollout_func": two_turns}, max_steps=2)
    groups = trainer._policy.roll_out(trainer._rows.pool[:2], 4, seed=0)
    said = trainer.processing_class(" ok")["input_ids"]
    for group in groups:
        assert group.masks is not None
        for response, mask in zip(group.responses, group.masks, strict=True):
            assert response[~mask].tolist() == said


REFUSED = {
    "importance": ({"spec": {"objective": {"importance": True}}}, {}, "importance"),
    "batch": ({"train_batch": 3}, {}, "train_batch"),
    "unknown": ({"candidate": 8}, {}, "did you mean"),
    "rounds": ({"rounds": 1}, {"max_steps": 40}, "too few"),
    "aggregation": ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
    "store": ({"store": None}, {}, "store is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_the_start(make_trainer: Make, case: str) -> None:
    selection, settings, said = REFUSED[case]
    with pytest.raises(RequestError, match=said):
        make_trainer({**SELECTION, **selection}, **settings)


def test_a_stream_is_refused(make_trainer: Make) -> None:
    from datasets import Dataset

    from gradstore.trainer.trl import SelectingGRPOTrainer

    plain = make_trainer(None)
    with pytest.raises(RequestError, match="a stream has none"):
        SelectingGRPOTrainer(
            model=plain.model,
            reward_funcs=odd,
            args=plain.args,
            train_dataset=Dataset.from_list(POOL).to_iterable_dataset(),
            processing_class=plain.processing_class,
            selection={"store": "never"},
        )


def test_rounds_decide_the_length_where_trl_was_given_none(make_trainer: Make) -> None:
    trainer = make_trainer({**SELECTION, "rounds": 3}, max_steps=-1, num_iterations=2)
    assert trainer.args.max_steps == 3 * 2 * 2
    by_epochs = make_trainer(SELECTION, max_steps=-1, num_train_epochs=2)
    assert by_epochs._rounds.settings.rounds == 2 * (len(POOL) // BATCH) // 2
    assert len(BENCHMARK) == 4


def test_a_batch_becomes_groups_with_masks_and_scored_rollouts_alone() -> None:
    """What was not scored, not written or not to be trained on must not count."""
    from gradstore.trainer.trl.rollouts import Scored, groups_of, sampled_of, weighted_rewards

    nan = float("nan")
    rewards = weighted_rewards(torch.tensor([[1.0, nan], [nan, nan], [0.0, 2.0], [nan, nan]]), torch.tensor([2.0, 0.5]))
    assert rewards[0] == 2
    assert rewards[2] == 1
    assert np.isnan([rewards[1], rewards[3]]).all()
    output = {
        "prompt_ids": torch.tensor([[0, 5], [0, 5], [6, 7], [0, 8]]),
        "prompt_mask": torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    }
    scored = Scored([[1, 2, 3], [4, 5], [6, 7, 8], [9]], [2.0, 0.0, 1.0, nan])
    sampled = sampled_of(["a", "a", "b", "c"], output, scored)
    groups = {group.problem_id: group for group in groups_of([sampled[2], sampled[0], sampled[3], sampled[1]])}
    assert list(groups) == ["b", "a", "c"]
    a, b, c = groups["a"], groups["b"], groups["c"]
    assert a.masks is not None
    assert [mask.tolist() for mask in a.masks] == [[True, False, True], [True, True]]
    assert a.rewards.tolist() == [2.0, 0.0]
    assert a.n_written.tolist() == [2, 2]
    assert b.prompt_ids.tolist() == [6, 7]
    assert len(b.responses[0]) == 0  # truncated: it counts in the baseline alone
    assert c.rewards.tolist() == [0.0]
    assert not c.has_signal


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2_with_adapters(tmp_path: Path) -> None:
    """A chat model that people use, by the lines of docs/trl.md: two rounds, adapters, chat prompts, resume."""
    from datasets import Dataset
    from peft import LoraConfig

    from gradstore.trainer.trl import SelectingGRPOTrainer

    model = Path(__file__).parents[3] / ".models" / "smollm2"
    if not (model / "config.json").exists():
        pytest.skip("needs .models/smollm2: make test-real")

    def asked(rows: list[dict]) -> list[dict]:
        return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]

    def short(completions: list[Any], **columns: Any) -> list[float]:
        return [1 / (1 + len(one[0]["content"])) for one in completions]

    def make(steps: int) -> Any:
        return SelectingGRPOTrainer(
            model=str(model),
            reward_funcs=short,
            args=trl.GRPOConfig(
                str(tmp_path / "out"),
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=8,
                max_steps=steps,
                save_steps=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                model_init_kwargs={"dtype": "float32"},
            ),
            train_dataset=Dataset.from_list(asked(POOL[:6])),
            eval_dataset=Dataset.from_list(asked(BENCHMARK[:2])),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            selection={
                "store": tmp_path / "store",
                "candidates": 3,
                "selected": 2,
                "steps": 1,
                "target_rollouts": 2,
                "observe": "none",
                "spec": {"basis": "random", "rank": 4},
            },
        )

    make(1).train()
    make(2).train(resume_from_checkpoint=True)
    store = gradstore.open(tmp_path / "store")
    assert [(one.about["step"], len(one.picks)) for one in store.rounds("pool")] == [(0, 2), (1, 2)]
    assert store.view("pool", 1).live.any()
