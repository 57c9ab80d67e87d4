"""A round with a real model: a small Qwen2 whose sketches, probes and fitted projection come from the engine."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import gradstore
from gradstore.attachments import read_coverage
from gradstore.engine.gradients.coverage import Coverage, measure
from gradstore.engine.gradients.directions import validation_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import SketcherFiles, files_of, sketcher_from
from gradstore.engine.sketches.fitting import fit_projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings

POOL = [{"id": f"p{i}", "prompt": f"{i}"} for i in range(12)]
BENCHMARK = [{"id": f"v{i}", "prompt": f"{i}"} for i in range(4)]


class ModelPolicy:
    """Random responses, whose rewards are drawn; everything else is the model's."""

    def __init__(self, model: Any) -> None:
        self.model, self.step, self.rolled = model, 0, 0
        self.sketcher: Sketcher | None = None

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        self.rolled += len(problems)
        return [self._group(problem["id"], n, seed) for problem in problems]

    def _group(self, name: str, n: int, seed: int) -> Group:
        random = np.random.default_rng([seed, self.step, *name.encode()])
        prompt, responses = random.integers(4, 200, 3), [random.integers(4, 200, 4) for _ in range(n)]
        return Group(name, prompt, responses, np.array([1.0, 0.0, *random.integers(0, 2, n - 2).tolist()]))

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        coverage = measure(GradientPass(self.model, spec), groups)
        fitted = spec.basis == "fitted"
        projection = fit_projection(self.model, groups, spec, benchmark=benchmark) if fitted else None
        self.sketcher = Sketcher(self.model, spec, projection)
        return files_of(self.sketcher, coverage)

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        self.sketcher = sketcher_from(self.model, fingerprint, attachments)

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        assert self.sketcher is not None
        return self.sketcher.sketch(groups)

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        self.direction = validation_gradient(self.model, groups)
        return self.sketch(groups)

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        return Probe(self.model, self.direction).probe(groups)

    def train(self) -> None:
        self.step += 1
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                generator = torch.Generator().manual_seed(1000 * self.step + number)
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def policy(tiny_model: Any) -> ModelPolicy:
    return ModelPolicy(copy.deepcopy(tiny_model))


def settings(**changes: Any) -> RoundSettings:
    usual: dict[str, Any] = {
        "selected": 4,
        "train_batch": 4,
        "steps": 1,
        "rounds": 3,
        "rollouts": 4,
        "target_rollouts": 4,
        "spec": SketchSpec(basis="fitted", rank=4, dim=48),
        "fit_problems": 4,
        "window": 5,
        "accept_coverage": 0.0,
    }
    return RoundSettings(**{**usual, **changes})


@pytest.mark.parametrize("changes", [{}, {"selector": "lcb"}, {"refresh": 6, "selector": "shrunk", "boundary": 0.4}])
def test_rounds_with_a_model(policy: ModelPolicy, tmp_path, changes: dict[str, Any]) -> None:
    """The rows kept are the sketches of the policy as it was, so that a later process can rank them again."""
    path = tmp_path / "store"
    rounds = Rounds(path, POOL, {"bench": BENCHMARK}, settings(**changes), dtype="fp32")
    picks = []
    for _ in range(2):
        picks.append(rounds.next(policy).ids)
        policy.train()
    assert all(len(set(chosen)) == 4 for chosen in picks)
    if changes:
        assert gradstore.open(path).probes("pool").table(step=1, target="bench").num_rows >= 6
    state = rounds.state_dict()
    resumed = Rounds(path, POOL, {"bench": BENCHMARK}, settings(**changes), dtype="fp32")
    resumed.load_state_dict(state)
    fresh = ModelPolicy(policy.model)
    fresh.step = policy.step
    assert resumed.next(fresh).ids == rounds.next(policy).ids
    store = gradstore.open(path)
    assert len(store.rounds("pool")) == 3
    assert store.verify().ok


def test_too_little_coverage_makes_no_store(policy: ModelPolicy, tmp_path) -> None:
    """Rounds would pick by a part of the gradient: refused before anything is stored, until it is accepted."""
    path, spec = tmp_path / "store", SketchSpec(basis="fitted", rank=4, dim=48, modules=("mlp",))

    def rounds(least: float | None) -> Rounds:
        return Rounds(path, POOL, {"bench": BENCHMARK}, settings(accept_coverage=least, spec=spec))

    offer = r"self_attn\.o_proj\.weight .*accept it: round setting accept_coverage=0\.\d"
    with pytest.raises(RequestError, match=offer) as refused:
        rounds(0.95).next(policy)
    assert not path.exists()
    least = float(str(refused.value).rpartition("=")[2])
    first = rounds(least)
    first.next(policy)
    kept = read_coverage(path)
    assert kept is not None
    assert least <= Coverage.of(kept).share < least + 0.01
    resumed = rounds(None)  # a run that is gone on with is not asked again
    resumed.load_state_dict(first.state_dict())
    policy.train()
    assert len(resumed.next(policy).ids) == 4


def test_a_policy_that_does_not_measure_is_told(policy: ModelPolicy, tmp_path, monkeypatch, caplog) -> None:
    """A trainer of one's own may return files without a coverage: that is said, not passed over."""
    monkeypatch.setattr(f"{__name__}.measure", lambda *given: None)
    Rounds(tmp_path / "store", POOL, {"bench": BENCHMARK}, settings()).next(policy)
    assert "did not measure what its sketches see" in caplog.text
    assert read_coverage(tmp_path / "store") is None


def test_a_round_is_the_cosine_of_the_sketches(policy: ModelPolicy, tmp_path) -> None:
    """GradAlign's round, from the engine's sketches one problem at a time."""
    rounds = Rounds(tmp_path / "store", POOL, {"bench": BENCHMARK}, settings(window=12), dtype="fp32")
    kept: dict[str, Group] = {}
    roll_out = policy.roll_out

    def remember(problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        groups = roll_out(problems, n, seed=seed)
        kept.update({group.problem_id: group for group in groups})
        return groups

    policy.roll_out = remember  # type: ignore[method-assign]
    picks = rounds.next(policy).ids
    assert policy.sketcher is not None
    batch_of = {name: policy.sketcher.sketch([group]) for name, group in kept.items()}
    target_D = np.mean([batch_of[record["id"]].sketches[0] for record in BENCHMARK], axis=0)
    scores: dict[str, float] = {}
    for record in POOL:
        batch = batch_of[record["id"]]
        assert batch.norms is not None, "a fitted sketch is divided by the length of the whole gradient"
        scores[record["id"]] = float(batch.sketches[0] @ target_D / batch.norms[0])
    assert picks == sorted(scores, key=lambda name: -scores[name])[:4]
