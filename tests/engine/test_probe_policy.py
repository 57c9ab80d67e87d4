"""A probe leaves the policy as it was, chooses its own step, and refuses what it cannot answer."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradstore.engine import Direction, Probe, validation_gradient
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.state import State


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-lora"])
def test_every_byte_and_flag_is_restored(make_model, make_groups, weights_of, architecture: str) -> None:
    """A live trainer's policy must go on as if nothing had happened: weights to the bit, flags, mode, gradients."""
    model = make_model(architecture).train()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    versions = {name: parameter._version for name, parameter in parameters.items()}
    before = weights_of(model)
    probe = Probe(model, validation_gradient(model, make_groups(3)))
    probe.probe(make_groups(3, seed=1))
    assert weights_of(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: p._version for name, p in model.named_parameters()} == versions
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(g is None or bool((g == 0.5).all()) for g in gradients.values())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [None, 4])
def test_restored_after_an_error(make_model, make_groups, weights_of, rank: int | None) -> None:
    """An error while the weights are displaced must not leave them so."""
    model = make_model("qwen2").train()
    probe = Probe(model, validation_gradient(model, make_groups(3)), eps=1e-2, rank=rank)
    probe.calibrate(make_groups(3))
    before, calls = weights_of(model), []

    def fail(*_: object) -> None:
        calls.append(weights_of(model) != before)
        raise KeyError("boom")

    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(KeyError):
        probe.probe(make_groups(3))
    handle.remove()
    assert calls == [rank is None]
    assert weights_of(model) == before
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_calibration_expects_what_it_gets(make_model, make_groups) -> None:
    """The step's error is predicted from measured truncation and rounding; a wrong prediction hides bad scores."""
    model, groups = make_model("qwen2"), make_groups(8)
    direction = validation_gradient(model, make_groups(4, seed=5))
    calibration = Probe(model, direction).calibrate(groups)
    assert 1e-4 < calibration.nats_central < 0.1
    assert calibration.nats_one_sided < calibration.nats_central
    assert calibration.error_central < 1e-3
    assert calibration.relative_error < 10 * calibration.error_central
    assert json.loads(json.dumps(calibration.describe()))["relative_error"] == calibration.relative_error
    # A direction a thousand times longer is walked in steps a thousand times shorter.
    longer = Direction.of({name: 1000 * tensor for name, tensor in direction.tensors.items()})
    again = Probe(model, longer).calibrate(groups)
    assert again.central == pytest.approx(calibration.central / 1000, rel=0.7)
    assert again.relative_error < 2e-3


@pytest.mark.parametrize("known", [False, True])
def test_steps_are_taken_over_where_they_serve(make_model, make_groups, known: bool) -> None:
    """Most of a round's probe was the search for its step. One taken over gives the same dots along a direction of
    another length at a policy that moved, is checked, and is searched anew where it would not do."""
    model, groups = make_model("qwen2"), make_groups(6)
    before = Probe(model, validation_gradient(model, make_groups(4, seed=5)))
    before.calibrate(groups, before.logprobs(groups) if known else None)
    assert before.calibration is not None
    kept = Calibration.of(json.loads(json.dumps(before.calibration.describe())))
    assert kept.describe() == before.calibration.describe()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    direction = validation_gradient(model, make_groups(4, seed=5))
    longer = Direction.of({name: 1000 * tensor for name, tensor in direction.tensors.items()})
    probe, calls = Probe(model, longer, n_check=2), []
    base = probe.logprobs(groups) if known else None
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    carried, n_carried = probe.calibrate(groups, base, kept), len(calls)
    searched = Probe(model, longer, n_check=2).calibrate(groups, base)
    assert n_carried < (len(calls) - n_carried) / 2
    handle.remove()
    assert (carried.nats_central, carried.nats_one_sided) == (kept.nats_central, kept.nats_one_sided)
    assert carried.relative_error < 0.02
    np.testing.assert_allclose(carried.exact, searched.exact[:1], rtol=1e-4)
    expected = Probe(model, longer).probe(groups)
    found = probe.probe(groups, base)
    np.testing.assert_allclose(found.dots, expected.dots, rtol=0.02, atol=2e-3 * np.abs(expected.dots).max())
    for factor in (0.01, 100):
        far = Probe(model, longer, n_check=2)
        off = replace(kept, central=factor * kept.central, one_sided=factor * kept.one_sided)
        name = "one_sided" if known else "central"
        length = getattr(far.calibrate(groups, base, off), name)
        assert length == pytest.approx(getattr(carried, name), rel=0.2), "as many nats are as far from any start"
    for wrong in (replace(kept, norm=0.0), replace(kept, nats_central=5.0, nats_one_sided=5.0)):
        refused = Probe(model, longer, n_check=2).calibrate(groups, base, wrong)
        assert refused.describe() == searched.describe()


def test_a_step_that_is_too_long_is_reported(make_model, make_groups, caplog) -> None:
    """A step of the user's own that gives wrong scores must not pass in silence."""
    model = make_model("qwen2")
    direction = validation_gradient(model, make_groups(4, seed=5))
    with caplog.at_level(logging.WARNING):
        Probe(model, direction, eps=20 / direction.norm).probe(make_groups(4))
    assert "off their exact values" in caplog.text


def test_states(make_model, make_groups) -> None:
    """Problems without signal are not run, broken ones fail alone, and neither is ranked."""
    model, groups = make_model("llama"), make_groups(3)
    token = int(groups[1].prompt_ids[0])
    keep = [g for g in groups if g is groups[1] or not any(token in ids for ids in (g.prompt_ids, *g.responses))]
    direction = validation_gradient(model, keep)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    flat = Group("flat", keep[0].prompt_ids, keep[0].responses, np.ones(len(keep[0].responses)))
    batch = Probe(model, direction).probe([*keep, flat])
    for group, state, reason in zip(keep, batch.states, batch.reasons, strict=False):
        assert state is (State.FAILED if group is groups[1] else State.LIVE)
        assert bool(reason) == (group is groups[1])
    assert batch.states[-1] is State.NO_SIGNAL
    assert np.isnan(batch.derivatives[-1]).all()
    for kind in ("dot", "corr", "snr", "lcb", "shrunk", "fdr"):
        scores = batch.scores(kind)
        assert not np.isnan(scores).any()
        assert (scores[~batch.live] == -np.inf).all()


def test_rescoring_with_corrected_rewards(make_model, make_groups) -> None:
    """A mended verifier changes rewards, not derivatives: no pass over the model is needed."""
    model, groups = make_model("qwen2"), make_groups(4)
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.zeros(4))
    direction = validation_gradient(model, groups)
    batch = Probe(model, direction).probe([*groups, flat], run_all=True)
    assert batch.states[-1] is State.NO_SIGNAL
    mended = [1 - group.rewards for group in groups] + [groups[0].rewards]
    again = batch.rescored(mended)
    np.testing.assert_allclose(again.dots[:-1], -batch.dots[:-1])
    assert again.dots[-1] == pytest.approx(batch.dots[0])
    skipped = Probe(model, direction).probe([*groups, flat]).rescored(mended)
    assert skipped.states[-1] is State.FAILED
    with pytest.raises(RequestError, match="problem 'problem-0': expected 4 finite rewards"):
        batch.rescored([np.zeros(2), *mended[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"n_check": 0}, "n_check is 0"),
        ({"token_budget": 0}, "token budget is 0"),
    ],
)
def test_bad_settings(make_model, make_groups, change: dict, message: str) -> None:
    """Each names the setting and what was expected."""
    model = make_model("qwen2")
    with pytest.raises(RequestError, match=message):
        Probe(model, validation_gradient(model, make_groups(2)), **change)


def test_bad_input(make_model, make_groups, weights_of) -> None:
    """A direction of another model, log-probabilities of another policy, a benchmark without signal: all refused."""
    model, groups = make_model("qwen2"), make_groups(3)
    direction = validation_gradient(model, groups)
    probe = Probe(model, direction)
    before = weights_of(model)
    with pytest.raises(RequestError, match="of another policy, temperature or precision"):
        probe.probe(groups, [[tokens - 1 for tokens in own] for own in probe.logprobs(groups)])
    with pytest.raises(RequestError, match="problem 'problem-0': base log-probabilities of"):
        probe.probe(groups, [[tokens[:0] for tokens in own] for own in probe.logprobs(groups)])
    with pytest.raises(RequestError, match="of 1 groups for 3"):
        probe.probe(groups, probe.logprobs(groups[:1]))
    with pytest.raises(RequestError, match="the model no such parameter"):
        Probe(model, Direction.of({"nothing": torch.ones(3)})).probe(groups)
    with pytest.raises(RequestError, match="the direction is zero"):
        validation_gradient(model, [Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(4))])
    with pytest.raises(RequestError, match="not finite: a"):
        Direction.of({"a": torch.tensor([float("nan")])})
    with pytest.raises(RequestError, match="token id 61 is outside"):
        probe.probe([Group("p", np.array([61]), groups[0].responses, groups[0].rewards)])
    with pytest.raises(RequestError, match="probe score 'best'"):
        probe.probe(groups).scores("best")
    assert weights_of(model) == before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RequestError, match="no parameter of the model trains"):
        validation_gradient(model, groups)


def test_no_groups(make_model, make_groups) -> None:
    """An empty round is no error."""
    model = make_model("qwen2")
    batch = Probe(model, validation_gradient(model, make_groups(2))).probe([])
    assert batch.ids == []
    assert batch.scores("shrunk").shape == (0,)
