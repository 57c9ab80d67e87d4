"""`collect` with its kinds of gradient, and `probe`, from the command line."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gradstore
from gradstore.engine import objective


@pytest.fixture
def files(rollout_files) -> dict[str, Path]:
    return {"pool": rollout_files["pool"], "b": rollout_files["bench"]}


def test_head_mode(cli, tmp_path, model_folder, files) -> None:
    """For those who cannot afford a backward: the store says what its rows are, and refuses others."""
    arguments = ["collect", tmp_path / "s", "pool", files["pool"], "--model", model_folder]
    status, _, err = cli(*arguments, "--head", "--rank", 4, "--right-rank", 8)
    assert status == 0, err
    store = gradstore.open(tmp_path / "s")
    assert "forward" in store.fingerprint["gradient"]
    assert store.dim == 32
    assert cli("collect", tmp_path / "s", "b", files["b"], "--model", model_folder)[0] == 0


def test_kl_term(cli, tmp_path, model_folder, files, tiny_model, accepted) -> None:
    """LearnAlign's gradients: the reference is named once, and rows of another one, or of none, are refused."""
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    pool = ["collect", tmp_path / "s", "pool", files["pool"], "--model", model_folder]
    kind = ["--objective", "grpo", "--rank", 4, "--basis", "random", "--dtype", "fp32", *accepted]
    status, _, err = cli(*pool, "--reference", tmp_path / "other")
    assert (status, "--kl-beta" in err) == (2, True)
    status, _, err = cli(*pool, *kind, "--kl-beta", 0.04)
    assert (status, "has no `reference_logprobs`" in err, (tmp_path / "s").exists()) == (2, True, False)
    status, _, err = cli(*pool, *kind, "--kl-beta", 0.04, "--reference", tmp_path / "other", "--halves")
    assert status == 0, err
    store = gradstore.open(tmp_path / "s")
    assert store.fingerprint["objective"]["kl_beta"] == 0.04
    benchmark = ["collect", tmp_path / "s", "b", files["b"], "--model", model_folder]
    status, _, err = cli(*benchmark)
    assert (status, "--reference" in err) == (2, True)
    status, _, err = cli(*benchmark, "--reference", model_folder)
    assert (status, "objective" in err) == (2, True)
    assert cli(*benchmark, "--reference", tmp_path / "other")[0] == 0
    asked = ["--pool", "pool", "--against", "b", "--rollouts", files["pool"], "--benchmark-rollouts", files["b"]]
    fidelity = ["fidelity", tmp_path / "s", *asked, "--model", model_folder, "--json"]
    status, _, err = cli(*fidelity)
    assert (status, "--reference" in err) == (2, True)
    status, _, err = cli(*fidelity, "--reference", model_folder)
    assert (status, "other weights" in err) == (2, True)
    status, out, err = cli(*fidelity, "--reference", tmp_path / "other")
    assert status == 0, err
    assert json.loads(out)["n_problems"] > 2
    status, _, err = cli("probe", tmp_path / "s", *asked, "--model", model_folder)
    assert (status, "KL term" in err) == (2, True)
    plain = ["collect", tmp_path / "plain", *pool[2:], *kind]
    assert cli(*plain)[0] == 0
    same = ["collect", tmp_path / "same", *pool[2:], *kind, "--kl-beta", 0.04, "--reference", model_folder]
    assert cli(*same)[0] == 0
    rows = [gradstore.open(tmp_path / name).view("pool") for name in ("plain", "same", "s")]
    plain_rows, same_rows, other_rows = (view.take(view.ids) for view in rows)
    np.testing.assert_allclose(same_rows, plain_rows, atol=1e-5)
    assert np.abs(other_rows - plain_rows).max() > 1e-3


def test_off_policy_objectives(cli, tmp_path, model_folder, accepted, write_lines) -> None:
    """Every rule and bound can be named on the command line; rollouts that another policy sampled are said to be so."""
    random = np.random.default_rng(0)
    rows = [
        {
            "problem_id": f"p{i}",
            "prompt": f"{i}+{i}=",
            "response": "?",
            "response_ids": random.integers(4, 200, 6).tolist(),
            "logprobs": np.minimum(random.normal(-5.5, 2, 6), -0.1).tolist(),
            "reward": j % 2,
        }
        for i in range(6)
        for j in range(4)
    ]
    rollouts = write_lines(tmp_path / "stale.jsonl", rows)

    def run(name: str, *options: object) -> tuple[int, str, str]:
        kind = ["--rank", 4, "--basis", "random", "--dtype", "fp32", *accepted, "--json"]
        return cli("collect", tmp_path / name, "pool", rollouts, "--model", model_folder, *kind, *options)

    status, out, err = run("plain")
    assert (status, "this policy did not sample the rollouts of" in err) == (0, True), err
    assert json.loads(out)["ess"]["low"] == 6
    assert not json.loads(out)["ess"]["importance"]
    status, out, err = run("gspo", "--objective", "gspo,clip_high=0.001")
    assert (status, "have an effective sample size below 50%" in err) == (0, True), err
    rule = gradstore.open(tmp_path / "gspo").fingerprint["objective"]
    assert rule == objective("gspo", clip_high=0.001).as_dict()
    assert run("gspo")[0] == 0, "a store keeps its objective"
    status, _, err = run("gspo", "--objective", "clip_low=0.01")
    assert (status, "objective" in err) == (2, True)
    assert run("cap", "--objective", "off_policy=truncate,ratio_cap=2", "--importance")[0] == 0
    rule = gradstore.open(tmp_path / "cap").fingerprint["objective"]
    assert rule == objective("gradalign", importance=True, off_policy="truncate", ratio_cap=2.0).as_dict()
    for options, message in (
        (["--objective", "cispo,clip_hi=2"], "did you mean 'clip_high'"),
        (["--objective", "dapo,clip_high=x"], "clip_high is 'x', expected a number"),
        (["--objective", "off_policy=mask"], "off_policy needs importance=True"),
        (["--objective", "off_policy=mask", "--importance"], "mask needs ratio_cap"),
        (["--clip", 0.2], "need importance=True"),
    ):
        status, _, err = run("refused", *options)
        assert (status, message in err, (tmp_path / "refused").exists()) == (2, True, False), err


def test_optimizer_direction(cli, tmp_path, model_folder, files, tiny_model, accepted) -> None:
    """Adam's step instead of the gradient, from a checkpoint; rows of the plain gradient do not belong beside it."""
    trained = copy.deepcopy(tiny_model)  # the session's model stays as it is
    optimizer = torch.optim.Adam(trained.parameters())
    random = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=random)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    arguments = ["collect", tmp_path / "s", "pool", files["pool"], "--model", model_folder]
    adam = ["--optimizer", tmp_path / "optimizer.pt", "--formula", "precondition"]
    status, _, err = cli(*arguments, *adam, "--rank", 4, "--basis", "fitted", *accepted)
    assert status == 2
    assert "--basis dense" in err
    status, _, err = cli(*arguments, *adam, "--rank", 8, "--dim", 64, *accepted)
    assert status == 0, err
    store = gradstore.open(tmp_path / "s")
    assert store.fingerprint["optimizer"]["formula"] == "precondition"
    assert store.dim == 64
    status, _, err = cli("collect", tmp_path / "s", "b", files["b"], "--model", model_folder)
    assert status == 2
    assert "optimizer" in err
    assert cli("collect", tmp_path / "s", "b", files["b"], "--model", model_folder, *adam)[0] == 0


def test_refit_and_every_basis(cli, tmp_path, model_folder, files, accepted) -> None:
    """Wrong words are refused before the model is loaded; too few problems to measure are said."""
    arguments = ["collect", tmp_path / "s", "pool", files["pool"], "--model", model_folder, "--rank", 4]
    assert cli(*arguments, *accepted)[0] == 0
    status, _, err = cli(*arguments, "--refit", "auto", "--step", 1)
    assert status == 2
    assert "--benchmark-rollouts" in err
    assert cli(*arguments, "--refit", "always")[0] == 2
    status, _, err = cli(*arguments, "--measure", "sometimes")
    assert status == 2
    assert "auto, always, never" in err
    status, _, err = cli(*arguments, "--refit", "auto", "--measure", "never", "--benchmark-rollouts", files["b"])
    assert status == 2
    assert "--measure never" in err
    status, _, err = cli(*arguments, "--refit", "auto", "--benchmark-rollouts", files["b"], "--step", 1, "--halves")
    assert status == 0, err
    assert "too few problems" in err
    store = gradstore.open(tmp_path / "s")
    assert len(store.bases) == 1
    assert store.collections == ["pool", "pool.even", "pool.odd"]
    status, out, err = cli(
        "collect", tmp_path / "s", "b", files["b"], "--model", model_folder, "--every-basis", "--step", 1, "--json"
    )
    assert status == 0, err
    assert json.loads(out)["bases"] == [0]
    assert cli("query", tmp_path / "s", "--against", "b")[0] == 0, "halves are no pools of their own"


def test_probe(cli, tmp_path, model_folder, files, accepted) -> None:
    """Derivatives from the command line are in the store, and the selectors that go by them find them."""
    for name in ("pool", "b"):
        collect = ["collect", tmp_path / "s", name, files[name], "--model", model_folder, "--rank", 4]
        assert cli(*collect, *accepted)[0] == 0
    arguments = ["probe", tmp_path / "s", "--pool", "pool", "--rollouts", files["pool"], "--against", "b"]
    status, out, err = cli(*arguments, "--benchmark-rollouts", files["b"], "--model", model_folder, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["n_problems"] == 12
    assert found["calibration"]["relative_error"] < 0.05
    dots = [row["dot"] for row in found["best"]]
    assert dots == sorted(dots, reverse=True)
    table = gradstore.open(tmp_path / "s").probes("pool").table(step=0, target="b")
    assert len(table) == 12
    assert np.isfinite(np.concatenate(table["derivatives"].to_numpy())).any()
    selected = ["select", tmp_path / "s", "-n", 2, "--against", "b", "--pool", "pool", "--out", tmp_path / "out"]
    assert cli(*selected, "--selector", "lcb")[0] == 0
    status, _, err = cli(*arguments, "--benchmark-rollouts", files["b"], "--model", model_folder, "--known")
    assert status == 2
    assert "--known" in err


def test_masked_rollouts(cli, tmp_path, model_folder, write_lines, accepted) -> None:
    """What tools wrote behind the policy's last token changes no row; a mask that does not fit is one line."""
    random, files = np.random.default_rng(0), {}
    bare, masked = [], []
    for i in range(6):
        for j in range(4):
            row = {"problem_id": f"p{i}", "prompt_ids": [5, 6 + i], "reward": float(j % 2)}
            own, tool = (random.integers(4, 60, n).tolist() for n in (1 + j, 3))
            bare.append(row | {"response_ids": own})
            masked.append(row | {"response_ids": own + tool, "response_mask": [1] * len(own) + [0] * 3})
    kind = ["--model", model_folder, "--rank", 4, "--basis", "random", "--dtype", "fp32", *accepted]
    for name, rows in (("bare", bare), ("masked", masked)):
        files[name] = write_lines(tmp_path / f"{name}.jsonl", rows)
        status, _, err = cli("collect", tmp_path / name, "pool", files[name], *kind, "--halves")
        assert status == 0, err
    for collection in ("pool", "pool.even"):
        one, other = (gradstore.open(tmp_path / name).view(collection) for name in ("bare", "masked"))
        assert one.ids.tolist() == other.ids.tolist()
        np.testing.assert_allclose(one.norms, other.norms, rtol=1e-5)
        np.testing.assert_allclose(one.take(one.ids), other.take(one.ids), atol=1e-6)
    masked[5]["response_mask"] = masked[5]["response_mask"][:-1]
    status, _, err = cli("collect", tmp_path / "s", "pool", write_lines(tmp_path / "bad.jsonl", masked), *kind)
    assert (status, err.count("\n")) == (2, 1)
    assert "bad.jsonl, line 6: field 'response_mask' has 4 entries, but 'response_ids' has 5" in err
