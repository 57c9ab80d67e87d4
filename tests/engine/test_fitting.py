"""Fitted projections hold the gradients' energy in few dimensions, and stay with the store they made."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

import gradstore
from gradstore import State
from gradstore.engine import PRESETS, Sketcher, SketchSpec, collect, exact_dots, fit_projection, layer_gradients
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches import fitting
from gradstore.engine.sketches.bases import _projection, _to_bytes, create_store, sketcher_of
from gradstore.engine.sketches.fitting import fit, sample_groups
from gradstore.engine.sketches.one_sided import Covariances
from gradstore.engine.sketches.projection import REST, Projection
from gradstore.errors import DamagedError, FingerprintError, RequestError

SPEC = SketchSpec(rank=6, basis="fitted", dim=60)
WHOLE = SketchSpec(rank=10_000)
"""A rank no side reaches: the sketch is the gradient."""


@pytest.fixture
def fitted(make_model, make_groups):
    model = make_model("qwen2")
    return model, fit_projection(model, make_groups(40, seed=1), SPEC)


def captured(model, sketcher: Sketcher, groups: list[Group]) -> float:
    """Share of the unit gradients' energy in the sketch, from the gradients themselves."""
    whole = Sketcher(model, WHOLE).sketch(groups).sketches
    energies = np.square(sketcher.sketch(groups).sketches).sum(axis=1) / np.square(whole).sum(axis=1)
    return float(energies.mean())


def test_sides_are_orthonormal_and_dimensions_as_asked(fitted) -> None:
    """Sides that are not orthonormal, or random directions that reach into them, would count some directions twice."""
    _, projection = fitted
    for basis in projection.layers:
        for side in (basis.left_OR, basis.right_IR):
            if side is not None:
                side_WR, beside_WR = side[:, :-1], side[:, -1:]
                np.testing.assert_allclose(side_WR.T @ side_WR, np.eye(side_WR.shape[1]), atol=1e-5)
                np.testing.assert_allclose(side_WR.T @ beside_WR, 0, atol=1e-5)
    assert projection.dim == 60
    assert projection.layout[0][1] == 0
    assert all(a[2] == b[1] for a, b in zip(projection.layout, projection.layout[1:], strict=False))


def test_captured_energy_is_what_it_says(fitted, make_groups) -> None:
    """`captured` decides when to fit anew; it must be the share measured with the gradients themselves."""
    model, projection = fitted
    exact = captured(model, Sketcher(model, SPEC, projection), make_groups(40, seed=1))
    assert projection.captured == pytest.approx(exact, abs=0.12)  # norms are estimated with a random sketch


def test_fitted_beats_random_on_problems_not_seen(fitted, make_groups) -> None:
    """The point of fitting: cosines of unseen problems nearer the exact ones, in as many dimensions."""
    model, projection = fitted
    groups = make_groups(30, seed=2)

    def cosines(sketcher: Sketcher) -> np.ndarray:
        rows = sketcher.sketch(groups).sketches.astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows @ rows.T)[np.triu_indices(len(rows), 1)]

    exact = cosines(Sketcher(model, WHOLE))
    random = cosines(Sketcher(model, SketchSpec(rank=6, basis="dense", dim=60)))
    found = cosines(Sketcher(model, SPEC, projection))
    assert np.abs(found - exact).mean() < 0.75 * np.abs(random - exact).mean()
    assert np.corrcoef(found, exact)[0, 1] > np.corrcoef(random, exact)[0, 1] + 0.1


def test_the_second_side_captures_more_than_the_first_alone(make_model, make_groups) -> None:
    """More dimensions from the same sides never hold less."""
    model, groups = make_model("llama"), make_groups(30, seed=1)
    shares = [fit_projection(model, groups, replace(SPEC, dim=dim)).captured for dim in (20, 60, 200)]
    assert shares == sorted(shares)


def test_fitting_is_reproducible_and_order_free_in_what_it_spans(make_model, make_groups) -> None:
    """The same sample and seed give the same projection; in another order the same up to rounding."""
    model, groups, bench = make_model("qwen2"), make_groups(20, seed=1), make_groups(5, seed=2)
    one, two = (fit_projection(model, groups, SPEC, benchmark=bench) for _ in range(2))
    assert one.digest() == two.digest()
    turned = fit_projection(model, groups[::-1], SPEC, benchmark=bench[::-1])
    assert turned.captured == pytest.approx(one.captured, rel=1e-4)
    for basis, other in zip(one.layers, turned.layers, strict=True):
        for side_WR, other_WR in ((basis.left_OR, other.left_OR), (basis.right_IR, other.right_IR)):
            width, n = side_WR.shape
            n = n if n == width else SPEC.rank  # beside the others stands a random direction
            overlap = np.linalg.norm(side_WR[:, :n].T @ other_WR[:, :n]) ** 2
            assert overlap == pytest.approx(n, rel=1e-3), basis.name


@pytest.mark.parametrize(("rank", "dim", "share"), [(6, 60, 0.97), (12, 300, 0.99)])
def test_as_much_energy_as_alternating_over_whole_gradients(make_model, make_groups, rank, dim, share) -> None:
    """Against the alternation as it is in the textbook, on gradients formed in full, until it settles: two passes come
    near it even where gradients have hardly any direction in common."""
    model, groups, spec = make_model("llama"), make_groups(40, seed=1), replace(SPEC, rank=rank, dim=dim)
    whole = Sketcher(model, WHOLE)
    rows_PC = whole.sketch(groups).sketches.astype(np.float64)
    rows_PC /= np.linalg.norm(rows_PC, axis=1, keepdims=True)
    energies = []
    for layer, basis in zip(whole.gradients.layers, whole.projection.layers, strict=True):
        gradients_POI = rows_PC[:, basis.start : basis.stop].reshape(len(groups), *layer.shape[1:3])
        left_OR = np.random.default_rng(0).standard_normal((gradients_POI.shape[1], 2 * rank))
        for _ in range(8):
            rows_NI = np.concatenate([left_OR.T @ gradient_OI for gradient_OI in gradients_POI])
            right_IR = np.linalg.svd(rows_NI, full_matrices=False)[2][:rank].T
            columns_ON = np.concatenate([gradient_OI @ right_IR for gradient_OI in gradients_POI], axis=1)
            left_OR = np.linalg.svd(columns_ON, full_matrices=False)[0][:, :rank]
        energies.append(np.square(left_OR.T @ gradients_POI @ right_IR).sum(axis=0).ravel())
    best = np.sort(np.concatenate(energies))[-dim:].sum() / len(groups)
    assert captured(model, Sketcher(model, spec, fit_projection(model, groups, spec)), groups) > share * best


def test_a_narrow_side_is_turned_and_loses_nothing(make_model, make_groups) -> None:
    """Of a side up to twice the rank all directions are kept, so that with room for all entries lengths are exact."""
    model, groups = make_model("qwen2"), make_groups(12, seed=1)
    spec = SketchSpec(rank=31, basis="fitted", dim=100_000)
    projection = fit_projection(model, groups, spec)
    assert all(basis.left_OR.shape[0] == basis.left_OR.shape[1] for basis in projection.layers)
    assert not np.allclose(projection.layers[0].left_OR, np.eye(len(projection.layers[0].left_OR)), atol=0.1)
    new = make_groups(5, seed=2)
    found, whole = Sketcher(model, spec, projection).sketch(new).sketches, Sketcher(model, WHOLE).sketch(new).sketches
    np.testing.assert_allclose(found @ found.T, whole @ whole.T, rtol=1e-4, atol=1e-5 * np.square(whole).sum(1).max())


def test_rows_of_the_sample_fall_out_of_the_fit(make_model, make_groups) -> None:
    """What the last pass has measured is not sketched again: it must be the same sketch, with its norm and its data."""
    model, objective = make_model("qwen2"), replace(PRESETS["gradalign"], importance=True)
    spec = replace(SPEC, objective=objective)
    groups, bench = make_groups(11, seed=1, logprobs=True), make_groups(3, seed=2, logprobs=True)
    flat = Group("flat", *[getattr(groups[0], name) for name in ("prompt_ids", "responses")], np.zeros(4))
    found = fit(model, [*groups, flat], spec, benchmark=bench)
    sketcher = Sketcher(model, spec, found.projection)
    for batches, given in ((found.rows, groups), (found.benchmark, bench)):
        expected = sketcher.sketch(given)
        assert [i for batch in batches for i in batch.ids] == expected.ids
        for name in ("sketches", "norms", "pass_rates", "n_rollouts", "ess"):
            rows = np.concatenate([getattr(batch, name) for batch in batches])
            scale = np.abs(getattr(expected, name)).max()
            np.testing.assert_allclose(rows, getattr(expected, name), rtol=1e-4, atol=1e-5 * scale, err_msg=name)
        assert {state for batch in batches for state in batch.states} == {gradstore.State.LIVE}


def test_a_store_keeps_its_projection(tmp_path, fitted, make_groups) -> None:
    """Rows collected by another process, from the store alone, are the same rows."""
    model, projection = fitted
    store = create_store(tmp_path / "store", Sketcher(model, SPEC, projection), "fp32")
    groups = make_groups(6)
    store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in groups])
    again = sketcher_of(gradstore.open(tmp_path / "store"), model)
    assert again.fingerprint == store.fingerprint
    collect(store, "pool", groups, sketcher=again, step=0, accept_coverage=0.0)
    expected = Sketcher(model, SPEC, projection).sketch(groups).sketches
    view = store.view("pool")
    np.testing.assert_allclose(view.rows(np.arange(6)) * view.norms[:, None], expected, rtol=1e-5, atol=1e-7)
    assert store.verify().ok


def test_a_damaged_projection_is_found(tmp_path, fitted) -> None:
    """Rows made with a basis that changed would be compared with those made before."""
    model, projection = fitted
    store = create_store(tmp_path / "store", Sketcher(model, SPEC, projection))
    (file,) = (tmp_path / "store" / "attachments").iterdir()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    report = store.verify()
    assert [finding.file for finding in report.findings] == [f"attachments/{file.name}"]
    with pytest.raises(DamagedError, match=file.name):
        sketcher_of(store, model)


def test_another_kind_of_basis_is_refused(tmp_path, fitted) -> None:
    """A random sketch does not belong among fitted ones."""
    model, projection = fitted
    store = create_store(tmp_path / "store", Sketcher(model, SPEC, projection))
    with pytest.raises(FingerprintError, match=r"projection\.kind: the store has 'fitted', this run has 'random'"):
        sketcher_of(store, model, replace(SPEC, basis="random"))


def test_bad_fits_are_refused(make_model, make_groups, fitted) -> None:
    """Without a signal there is nothing to fit to; a projection of other layers does not fit the model."""
    model, projection = fitted
    flat = [Group(g.problem_id, g.prompt_ids, g.responses, np.zeros(4)) for g in make_groups(5)]
    with pytest.raises(RequestError, match="none of these is one"):
        fit_projection(model, flat, SPEC)
    with pytest.raises(RequestError, match="must be fitted first"):
        Sketcher(model, SPEC)
    with pytest.raises(RequestError, match="of other layers"):
        Sketcher(make_model("gpt2"), SPEC, projection)


def test_a_sample_has_a_signal(make_groups) -> None:
    """Problems without signal teach a fit nothing; the sample is drawn past them."""

    class Source:
        def __init__(self, groups: list[Group]) -> None:
            self._groups = {group.problem_id: group for group in groups}
            self.problem_ids = list(self._groups)

        def __len__(self) -> int:
            return len(self._groups)

        def groups(self, ids: list[str]) -> list[Group]:
            return [self._groups[i] for i in self.problem_ids if i in set(ids)]

    groups = make_groups(60)
    flat = [Group(f"flat{i}", g.prompt_ids, g.responses, np.ones(4)) for i, g in enumerate(groups)]
    chosen = sample_groups(Source(groups + flat), 25, seed=0)  # type: ignore[arg-type]
    assert len(chosen) == 25
    assert all(group.has_signal for group in chosen)
    assert len(sample_groups(Source(groups[:5] + flat), 25, seed=0)) == 5  # type: ignore[arg-type]


def test_a_policy_that_moved_asks_for_a_new_fit(tmp_path, make_model, make_groups) -> None:
    """Old bases lose the gradients of a new policy silently; collecting measures it and says so."""
    model, spec, bench = make_model("qwen2"), replace(SPEC, rank=8, dim=200), make_groups(16, seed=2)
    groups = make_groups(80, seed=1)
    projection = fit_projection(model, groups, spec, benchmark=bench)
    store = create_store(tmp_path / "store", Sketcher(model, spec, projection))
    store.add_problems("pool", [{"id": group.problem_id, "prompt": "?"} for group in groups])
    report = collect(
        store, "pool", groups, sketcher=sketcher_of(store, model), step=0, benchmark=bench, accept_coverage=0.0
    )
    assert report.fidelity > 0.97
    assert not report.needs_refit
    with torch.no_grad():
        torch.manual_seed(9)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.std())
    moved = collect(
        store, "pool", groups, sketcher=sketcher_of(store, model), step=1, benchmark=bench, measure="always"
    )
    assert moved.fidelity < 0.8
    assert moved.needs_refit
    assert moved.describe()["needs_refit"]


def test_a_benchmark_has_a_dimension_of_its_own(make_model, make_groups) -> None:
    """A budget of dimensions keeps a few core entries; dots with the benchmark must not lose what the others hold."""
    model, pool, bench = make_model("qwen2"), make_groups(20, seed=1), make_groups(8, seed=2)
    spec = replace(SPEC, rank=8, dim=60)
    projection = fit_projection(model, pool, spec, benchmark=bench)
    assert projection.dim == 60
    assert projection.layout[-1] == (REST, 59, 60)
    cores = Sketcher(model, replace(spec, basis="random"), replace(projection, kind="random", fold=None))
    new = make_groups(10, seed=3)
    found, whole = Sketcher(model, spec, projection).sketch(new), cores.sketch(new)
    target_D = Sketcher(model, spec, projection).sketch(bench).sketches.mean(0)
    target_C = cores.sketch(bench).sketches.mean(0)
    dots_P, expected_P = found.sketches @ target_D, whole.sketches @ (target_C * of_fitted_directions(projection, 2))
    assert np.allclose(dots_P, expected_P, rtol=1e-3, atol=1e-4 * np.abs(expected_P).max())
    assert np.allclose(found.norms, np.linalg.norm(whole.sketches, axis=1), rtol=1e-5)
    assert (np.linalg.norm(found.sketches, axis=1) < 0.99 * found.norms).all(), "60 of many entries hold a part"
    without = fit_projection(model, [*pool, *bench], spec)
    plain_D = Sketcher(model, spec, without).sketch(bench).sketches.mean(0)
    plain_P = Sketcher(model, spec, without).sketch(new).sketches @ plain_D
    assert np.abs(plain_P - expected_P).max() > 10 * np.abs(dots_P - expected_P).max()
    assert _read_back(_to_bytes(projection), projection.digest()).digest() == projection.digest()


def of_fitted_directions(projection: Projection, n_beside: int) -> np.ndarray:
    """Which core entries are of no random direction, bool [C]; beside all directions of a side there is none."""

    def of_side(side_WR: np.ndarray) -> np.ndarray:
        width, n = side_WR.shape
        return np.arange(n) < (n if n == width else n - n_beside)

    return np.concatenate([np.outer(of_side(b.left_OR), of_side(b.right_IR)).ravel() for b in projection.layers])


def test_norms_are_those_of_the_gradients(make_model, make_groups) -> None:
    """The fitted directions hold a part of a gradient; its length is that of the whole, estimated without bias."""
    model, groups = make_model("qwen2"), make_groups(30, seed=2)
    spec = replace(SPEC, rank=8, dim=60)
    projection = fit_projection(model, make_groups(40, seed=1), spec)
    cores = Sketcher(model, replace(spec, basis="random"), replace(projection, kind="random", fold=None))
    exact_P = np.linalg.norm(Sketcher(model, WHOLE).sketch(groups).sketches, axis=1)
    held_P = np.linalg.norm(cores.sketch(groups).sketches * of_fitted_directions(projection, 2), axis=1) / exact_P
    found_P = Sketcher(model, spec, projection).sketch(groups).norms / exact_P
    assert abs(found_P.mean() - 1) < 4 * found_P.std() / np.sqrt(len(found_P))
    assert held_P.mean() < 0.8


def _read_back(data: bytes, digest: str) -> Projection:
    return _projection({"projection": {"basis": digest}}, {f"projection-{digest}.safetensors": data})


@pytest.mark.parametrize("rank", [2, 16])
def test_a_fresh_adapter_is_fitted(make_model, make_groups, rank: int) -> None:
    """Training begins with B = 0, under which A has no gradient: B's is fitted, and A, which has one later, is kept."""
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    groups, spec = make_groups(16, seed=1), SketchSpec(basis="fitted", rank=rank, dim=400)
    sketcher = Sketcher(model, spec, fit_projection(model, groups, spec))
    assert [basis.name for basis in sketcher.projection.layers] == [layer.name for layer in sketcher.gradients.layers]
    found = sketcher.sketch(groups)
    assert found.states == [State.LIVE] * 16
    exact_P = exact_dots(model, groups, layer_gradients(model, groups[:1], spec), spec).dots[:, 0]
    dots_P = found.sketches @ found.sketches[0]
    assert np.corrcoef(dots_P, exact_P)[0, 1] > (0.8 if rank == 2 else 0.99)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_windows_are_cut_by_the_bytes_of_their_products(make_model, make_groups, monkeypatch, name: str) -> None:
    """Of a large model the products of eight problems are more than its activations; the fit is the same either way."""
    model, groups = make_model(name), make_groups(10, seed=1)
    held: list[int] = []
    windows: list[int] = []
    add = Covariances.add

    def adding(sums: Covariances, totals: dict, of_benchmark: bool) -> None:
        n_problems = len(next(iter(totals.values())))
        windows.append(n_problems)
        held.append(sum(total_PRW.nbytes for total_PRW in totals.values()) // n_problems)
        add(sums, totals, of_benchmark)

    monkeypatch.setattr(Covariances, "add", adding)
    whole = fit_projection(model, groups, SPEC)
    assert max(windows) == 8
    monkeypatch.setattr(fitting, "_HELD", 2 * max(held))
    windows.clear()
    cut = fit_projection(model, groups, SPEC)
    assert max(windows) == 2
    assert cut.captured == pytest.approx(whole.captured, rel=1e-4)
