"""A selection's weights scale the advantages of each problem's rollouts, and the default ones touch nothing."""

from typing import Any

import pytest

from gradstore.trainer.round.settings import RoundSettings
from gradstore.trainer.verl.sampler import RoundSampler

pytestmark = pytest.mark.verl


class Batch:
    """verl's batch as far as the hook sees it: keys of rollouts, whose tensors are in the queue."""

    def __init__(self, keys: list[str]) -> None:
        self.keys, self.partition_id = keys, "train"
        self.tags: list[dict] = [{"is_padding": True} if key.startswith("pad") else {} for key in keys]


class Queue:
    """verl's queue with advantages and weights of the rollouts; counts what is written."""

    def __init__(self, rows: dict[str, list[float]], weight_of: dict[str, float]) -> None:
        self.rows, self.weight_of, self.n_written = rows, weight_of, 0
        self.metrics: dict[str, float] = {}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        import torch
        from tensordict import NonTensorData, NonTensorStack, TensorDict

        (field,) = select_fields
        if field == "gradstore_weight":
            weights = [NonTensorData(self.weight_of.get(key.split("_")[0], 1.0)) for key in keys]
            return TensorDict({field: NonTensorStack(*weights)}, batch_size=len(keys))
        rows = [torch.tensor(self.rows[key]) for key in keys]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return TensorDict({field: nested}, batch_size=len(keys))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> None:
        self.n_written += 1
        for key, row in zip(keys, fields["advantages"].unbind(0), strict=True):
            self.rows[key] = row.tolist()


def computed(
    monkeypatch: pytest.MonkeyPatch,
    weight_of: dict[str, float],
    ahead: bool = False,
    rule: str | None = None,
    rounds: Any = None,
    policy: Any = None,
) -> Queue:
    """The queue after our trainer's advantages, verl's own being there."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from gradstore.trainer.verl import selecting_trainer, transfer

    rows = {"a_0_0": [0.1, 0.2, 0.3], "a_1_0": [-0.7], "b_0_0": [0.3, 0.3], "pad1_0_0": [0.0]}
    queue = Queue(rows, weight_of)
    monkeypatch.setattr(transfer, "tq", queue)
    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: batch)
    trainer = object.__new__(selecting_trainer.SelectingTrainer)
    settings = RoundSettings(selected=1, train_batch=1, steps=1, observe="none", rollout_rule=rule)
    trainer.settings = type("Settings", (), {"rounds": settings, "asynchronous": ahead})()
    trainer.sampler, trainer.rounds, trainer._policy = RoundSampler(["a", "b"]), rounds, policy
    trainer.sampler.feed(["a"], weights=weight_of)
    trainer._ids, trainer.timing_raw, trainer.use_reference_policy = ["p", "q"], {}, False
    monkeypatch.setattr(trainer, "_problems", lambda keys: {"a": "p", "b": "q"})
    batch = Batch(list(queue.rows))
    assert trainer._compute_advantage(batch, queue.metrics) is batch
    return queue


def test_rows_are_scaled_by_their_problems_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rollouts differ in length, and never the rows that verl fills a batch up with."""
    queue = computed(monkeypatch, {"a": 2.0, "b": 0.0})
    assert queue.rows["a_0_0"] == pytest.approx([0.2, 0.4, 0.6])
    assert queue.rows["a_1_0"] == pytest.approx([-1.4])
    assert queue.rows["b_0_0"] == [0.0, 0.0]
    assert queue.rows["pad1_0_0"] == [0.0]


@pytest.mark.parametrize("ahead", [False, True])
def test_usual_weights_write_nothing(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """A run without weights is verl's own, bit for bit."""
    assert computed(monkeypatch, {}, ahead).n_written == 0


def test_a_rollout_rule_scales_each_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On top of its problem's weight, in the order of the rollouts' numbers, and never the rows of padding."""
    import numpy as np

    from gradstore.engine.rollouts.group import Group
    from gradstore.trainer.round.weighing import Weighed

    asked: list = []

    class Rounds:
        def weigh(self, policy: object, groups: list[Group], factors: list[float]) -> Weighed:
            asked.append(([group.problem_id for group in groups], factors))
            return Weighed([np.array([0.0, 0.5]), np.array([1.0])], 1 / 3, 7)

    class Policy:
        def groups(self, keys: list[str], problem_of: dict[str, str], referred: bool) -> dict[str, Group]:
            assert sorted(keys) == ["a_0_0", "a_1_0", "b_0_0"]
            ids = np.arange(2)
            return {"a": Group("p", ids, [ids, ids], np.array([0.0, 1.0])), "b": Group("q", ids, [ids], np.ones(1))}

    queue = computed(monkeypatch, {"b": 2.0}, rule="dtv", rounds=Rounds(), policy=Policy())
    assert asked == [(["p", "q"], [1.0, 2.0])]
    assert queue.rows["a_0_0"] == [0.0, 0.0, 0.0]
    assert queue.rows["a_1_0"] == pytest.approx([-0.35])
    assert queue.rows["b_0_0"] == pytest.approx([0.6, 0.6])
    assert queue.metrics == {"gradstore/rollouts_dropped": pytest.approx(1 / 3), "gradstore/weigh_tokens": 7}
