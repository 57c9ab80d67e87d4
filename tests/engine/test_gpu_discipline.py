"""What a GPU punishes, looked for without one: the model on the `meta` device, every operation watched.

Shapes and devices are real there, values are not. An operation that mixes devices would raise on a GPU; reading a value
inside a micro-batch, and each copy to the host, would make the host wait for everything that was asked for before.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from gradstore.engine import (
    Probe,
    Sketcher,
    SketchSpec,
    exact_dots,
    fit_projection,
    layer_gradients,
    objective,
    validation_gradient,
)
from gradstore.engine.gradients.exact import exact_against
from gradstore.engine.gradients.passes import PolicyForward

ARCHITECTURES = ["qwen2", "llama", "gpt2", "qwen2-lora"]
aten = torch.ops.aten
SMALL = 1e-4
"""What every number is: small enough for a shortcut to count as exact, and a length that is not zero."""
PACKED = "find_packed_sequence_indices"
"""By which transformers reads one value a forward that has no mask and no cache. It is counted, not refused."""
_COPIES = (aten._to_copy.default, aten.copy_.default)


class Watch(TorchDispatchMode):
    """Runs operations on `meta` tensors and fails on those that a GPU would refuse or wait for.

    A number that is read is SMALL, a truth is true, and what is copied to the host is 1 throughout, so that every
    problem counts as live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        """Whether a micro-batch runs."""
        self.counts: Counter[str] = Counter()
        """Copies to the host, and values that were read outside of micro-batches."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        away = any(tensor.is_meta for tensor in tensors)
        if func is aten._local_scalar_dense.default and away:
            self._wait("values", func)
            return SMALL if tensors[0].is_floating_point() else 1
        if func is aten._to_copy.default and away and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self._wait("copies", func)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self._wait("copies", func)
            return args[0].fill_(1)
        if func is aten.index.Tensor and away:
            args = (args[0], [self._places(part) for part in args[1]])
        if away and func not in _COPIES and any(not tensor.is_meta and tensor.ndim for tensor in tensors):
            raise AssertionError(f"{func} mixes devices: {[(str(x.device), tuple(x.shape)) for x in tensors]}")
        return func(*args, **kwargs)

    def _wait(self, kind: str, func: Any) -> None:
        assert not self.inside, f"{func} makes the host wait inside a micro-batch"
        self.counts[kind] += 1

    def _places(self, part: torch.Tensor | None) -> torch.Tensor | None:
        """A mask selects by its values, which the host waits for; all of them are taken to be true."""
        if part is None or part.dtype != torch.bool:
            return part
        assert part.ndim == 1
        self._wait("values", aten.nonzero.default)
        return torch.arange(len(part), device=part.device)


@pytest.fixture
def watch(monkeypatch) -> Iterator[Watch]:
    """A watch that knows when micro-batches run; everything in the test is watched."""
    found = Watch()

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            found.inside = True
            found.counts["micro-batches"] += 1
            try:
                return method(*args, **named)
            finally:
                found.inside = False

        return watched

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            found.inside, was = False, found.inside
            try:
                return function(*args, **named)
            finally:
                found.inside = was

        return watched

    if hasattr(masking_utils, PACKED):
        monkeypatch.setattr(masking_utils, PACKED, outside(getattr(masking_utils, PACKED)))
    monkeypatch.setattr(PolicyForward, "backward", within(PolicyForward.backward))
    monkeypatch.setattr(PolicyForward, "logprobs", within(PolicyForward.logprobs))
    with found:
        yield found


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def test_the_watch_sees_what_it_is_for(watch) -> None:
    """A watch that lets everything through would make the tests below empty."""
    away, here = torch.ones(3, 4, device="meta"), torch.ones(3, 4)
    for mixed in (lambda: away + here, lambda: away[torch.tensor([0, 1])], lambda: torch.cat([away, here])):
        with pytest.raises((AssertionError, RuntimeError)):
            mixed()
    assert (away * torch.tensor(2.0)).is_meta
    assert torch.equal(away.cpu(), here)
    assert torch.equal(away.double().to("cpu"), here.double())
    assert torch.equal(torch.zeros(3, 4).copy_(away), here)
    assert away.sum().item() == float(away.sum()) == SMALL
    assert away.any()
    assert away[away[:, 0] > 0].shape == (3, 4)
    assert watch.counts == {"copies": 3, "values": 4}
    watch.inside = True
    for waiting in (
        lambda: away.sum().item(),
        lambda: bool(away.any()),
        lambda: away.cpu(),
        lambda: away[away[:, 0] > 0],
    ):
        with pytest.raises(AssertionError, match="wait inside"):
            waiting()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sketches(make_model, make_groups, watch, architecture: str) -> None:
    """One copy to the host a batch of problems, after its last micro-batch; no value is waited for."""
    model, groups = on_meta(make_model(architecture)), make_groups(6)
    for basis in ("random", "dense"):
        sketcher = Sketcher(model, SketchSpec(rank=6, dim=40, basis=basis, token_budget=60))
        assert sketcher.policy.shares_prompts
        watch.counts.clear()
        batch = sketcher.sketch(groups)
        assert batch.sketches.shape == (6, sketcher.dim)
        assert watch.counts.pop("micro-batches") > 1
        assert watch.counts == {"copies": 1}


def test_sketches_with_prompts_apart(make_model, make_groups, watch) -> None:
    """The only value read is the library's own, once a forward."""
    sketcher = Sketcher(on_meta(make_model("qwen2")), SketchSpec(rank=6, token_budget=60, share_prompts=False))
    watch.counts.clear()
    sketcher.sketch(make_groups(6))
    n_batches = watch.counts.pop("micro-batches")
    assert n_batches > 1
    assert watch.counts["copies"] == 1
    assert watch.counts["values"] <= n_batches


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-lora"])
def test_fitting_and_fitted_sketches(make_model, make_groups, watch, architecture: str) -> None:
    """A fit waits at its windows and once a side, never in a micro-batch; a fitted sketch is copied once."""
    model, groups = on_meta(make_model(architecture)), make_groups(6)
    spec = SketchSpec(rank=6, dim=40, basis="fitted", token_budget=60)
    projection = fit_projection(model, groups, spec, benchmark=make_groups(2, seed=1))
    # Each side of a layer is chosen on the device and copied once it is known: left and right, in two passes.
    most = 4 * len(projection.layers)
    assert watch.counts["copies"] <= most + 2  # and the cores of two windows
    assert watch.counts["values"] <= most + 5
    sketcher = Sketcher(model, spec, projection)
    watch.counts.clear()
    batch = sketcher.sketch(groups)
    assert batch.norms is not None
    assert watch.counts.pop("micro-batches") > 1
    assert watch.counts == {"copies": 1}


def test_importance(make_model, make_groups, watch) -> None:
    """Ratios and clipping are computed where the model is."""
    settings = objective("grpo", importance=True, clip_low=0.2, clip_high=0.2)
    sketcher = Sketcher(on_meta(make_model("qwen2")), SketchSpec(rank=6, objective=settings, token_budget=60))
    watch.counts.clear()
    assert sketcher.sketch(make_groups(6, logprobs=True)).ess is not None
    assert watch.counts.pop("micro-batches") > 1
    assert watch.counts == {"copies": 2}  # the effective sample sizes, in float64, are a copy of their own


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-lora"])
def test_exact_mode(make_model, make_groups, watch, architecture: str) -> None:
    """One copy a batch of problems, gradients formed or not; the length of a target is a number a layer."""
    model, groups, others = on_meta(make_model(architecture)), make_groups(6), make_groups(4, seed=1)
    spec = SketchSpec(token_budget=60)
    target = layer_gradients(model, others, spec)
    assert not watch.counts["copies"]
    for exact in (
        lambda: exact_dots(model, groups, target, spec),
        lambda: exact_dots(model, groups, target, spec, norms=True),
        lambda: exact_against(model, groups, others, spec),
    ):
        watch.counts.clear()
        assert exact().terms.all()
        assert watch.counts.pop("micro-batches") > 1
        assert watch.counts == {"copies": 1, "values": len(target.names)}


@pytest.mark.parametrize(("architecture", "rank"), [("qwen2", None), ("qwen2", 4), ("qwen2-lora", None)])
def test_probes(make_model, make_groups, watch, architecture: str, rank: int | None) -> None:
    """The log-probabilities of each displaced model are copied once, whatever the number of micro-batches."""
    model, groups = on_meta(make_model(architecture)), make_groups(3)
    direction = validation_gradient(model, make_groups(2, seed=1), token_budget=60)
    assert not watch.counts["copies"]
    probe = Probe(model, direction, eps=1e-3, rank=rank, n_check=1, token_budget=60)
    probe.calibrate(groups)
    watch.counts.clear()
    assert len(probe.derivatives(groups)) == 3
    assert watch.counts.pop("micro-batches") > 2
    assert watch.counts == {"copies": 2}
