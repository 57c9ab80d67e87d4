"""Sketches and probes computed inside verl's actor are those of the engine on the same weights and rollouts."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.engine import Probe, Sketcher, SketchSpec, validation_gradient
from gradstore.engine.gradients.coverage import measure
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.ranks import deal, gather
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import _projection, sketcher_from
from gradstore.engine.sketches.fitting import fit, passed

pytestmark = pytest.mark.verl


def random_groups(n: int, seed: int, vocabulary: int) -> list[Group]:
    """Groups of 4 random responses of different lengths; every third has equal rewards, every second tools' tokens."""
    random = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        lengths = random.integers(1, 12, 4)
        rewards = np.ones(4) if i % 3 == 2 else random.random(4)
        groups.append(
            Group(
                f"problem {seed}/{i}",
                random.integers(4, vocabulary, random.integers(3, 10)),
                [random.integers(4, vocabulary, length) for length in lengths],
                rewards,
                masks=[random.random(length) < 0.7 for length in lengths] if i % 2 else None,
            )
        )
    return groups


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(
    request: pytest.FixtureRequest, task: Path, tiny_model: Any, verl_environment: dict[str, str]
) -> dict[str, Any]:
    """What each rank found, and the groups it was given."""
    world, vocabulary = request.param, tiny_model.config.vocab_size
    groups, validation = random_groups(7, 1, vocabulary), random_groups(3, 2, vocabulary)
    (task / "groups.pkl").write_bytes(pickle.dumps((groups, validation)))
    script = Path(__file__).with_name("worker_rank.py")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(task)],
            env=verl_environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    found = [pickle.loads((task / f"rank-{rank}.pkl").read_bytes()) for rank in range(world)]
    return {"groups": groups, "validation": validation, "found": found, "world": world}


@pytest.mark.parametrize("basis", ["random", "fitted"])
def test_sketches_are_the_engines(ranks: dict[str, Any], tiny_model: Any, basis: str) -> None:
    """A store filled by verl's workers and one filled by `gradstore collect` must be comparable, whether the projection
    was just fitted or comes from the store, and however many ranks share the policy."""
    found, groups = ranks["found"], ranks["groups"]
    files = found[0][basis]["files"]
    expected = sketcher_from(tiny_model, files.fingerprint, files.attachments).sketch(groups)
    shares = deal(groups, ranks["world"])
    assert [part["share"] for part in found] == shares
    for way in ("fitted", "used"):
        batch = gather([part[basis][way] for part in found], shares)
        assert batch.ids == expected.ids
        assert batch.states == expected.states
        scale = np.linalg.norm(expected.sketches, axis=1).max()
        assert np.abs(batch.sketches - expected.sketches).max() < 1e-4 * scale
        np.testing.assert_allclose(batch.pass_rates, expected.pass_rates)
    few = gather([part["few"] for part in found], [[0], *([] for _ in found[1:])])
    assert few.ids == expected.ids[:1]
    spec = SketchSpec(rank=4, dim=64, basis=basis)  # type: ignore[arg-type]
    assert files.coverage == measure(GradientPass(tiny_model, spec), [])  # sharded: of the parameters alone
    if basis == "random":
        assert Sketcher(tiny_model, spec).fingerprint == files.fingerprint


def test_one_fit_by_all_ranks(ranks: dict[str, Any], tiny_model: Any) -> None:
    """Each rank runs its share of the sample, and the sums make every rank the basis of one process: a problem left
    out, or counted on each rank, would turn the sides."""
    digests = {part["fitted"]["files"].fingerprint["projection"]["basis"] for part in ranks["found"]}
    assert len(digests) == 1
    n_live = sum(group.has_signal for group in ranks["groups"])
    assert sum(part["n_fitted"] for part in ranks["found"]) == passed(n_live)
    if ranks["world"] > 1:
        assert max(part["n_fitted"] for part in ranks["found"]) < passed(n_live)
    files = ranks["found"][0]["fitted"]["files"]
    together = _projection(files.fingerprint, files.attachments)
    alone = fit(tiny_model, ranks["groups"], SketchSpec(rank=4, dim=64, basis="fitted", token_budget=64)).projection
    assert together.captured == pytest.approx(alone.captured, rel=1e-3)
    for one, other in zip(together.layers, alone.layers, strict=True):
        for side, expected in ((one.left_OR, other.left_OR), (one.right_IR, other.right_IR)):
            if expected is None:
                assert side is None
                continue
            same = np.abs((side * expected).sum(0)) / np.square(expected).sum(0)
            np.testing.assert_allclose(same, 1, atol=1e-2, err_msg=one.name)


def test_the_policy_is_left_alone(ranks: dict[str, Any]) -> None:
    """Sketching between training steps must not move a weight, leave a gradient, or average gradients of different
    problems among the ranks."""
    for part in ranks["found"]:
        assert part["sharded"]
        assert part["n_reduced"] == 0
        assert part["untouched"]
        assert part["without_gradients"]


def test_probes_are_the_engines(ranks: dict[str, Any], tiny_model: Any) -> None:
    """The validation gradient is over all ranks' problems, and kept for the next batch of the round. The step is chosen
    where the direction moves most, on the validation groups themselves, so rounding tells more elsewhere."""
    groups, shares = ranks["groups"], deal(ranks["groups"], ranks["world"])
    expected = Probe(tiny_model, validation_gradient(tiny_model, ranks["validation"])).probe(groups)
    scale = np.abs(expected.dots).max()
    aimed = gather([part["aim"] for part in ranks["found"]], deal(ranks["validation"], ranks["world"]))
    files = ranks["found"][0]["fitted"]["files"]
    sketches = sketcher_from(tiny_model, files.fingerprint, files.attachments).sketch(ranks["validation"])
    assert aimed.ids == sketches.ids
    assert np.abs(aimed.sketches - sketches.sketches).max() < 1e-4 * np.linalg.norm(sketches.sketches, axis=1).max()
    for name in ("probe", "again", "carried"):
        batch = gather([part[name] for part in ranks["found"]], shares)
        assert batch.ids == expected.ids
        assert batch.states == expected.states
        assert np.abs(batch.dots - expected.dots).max() < 5e-3 * scale


def test_ranks_share_the_tokens() -> None:
    """Every group goes to one rank, and no rank has twice another's tokens where the groups allow it."""
    groups = random_groups(40, 3, 100)
    shares = deal(groups, 4)
    assert sorted(place for share in shares for place in share) == list(range(40))
    tokens = [sum(groups[i].n_tokens for i in share) for share in shares]
    assert max(tokens) < 1.5 * min(tokens)
    assert deal(groups[:1], 3) == [[0], [], []]
