"""What sketches see of the gradient: measured when `collect` makes a store, kept there, refused where it is little."""

import json

import pytest

from gradstore.attachments import read_coverage
from gradstore.engine.gradients.coverage import Coverage, measure
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.sketches.fitting import sample_groups
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.inventory import INVENTORY


@pytest.fixture
def arguments(tmp_path, model_folder, rollout_files) -> list[object]:
    return ["collect", tmp_path / "s", "pool", rollout_files["pool"], "--model", model_folder, "--rank", 4]


def test_a_new_store_keeps_what_was_measured(cli, tmp_path, arguments, model_folder, rollout_files) -> None:
    """By the same groups as `measure` in Python; later runs read it back and measure nothing."""
    status, out, err = cli(*arguments, "--accept-coverage", 0, "--json")
    assert status == 0, err
    kept = read_coverage(tmp_path / "s")
    source = read_rollouts(rollout_files["pool"], tokenizer=load_tokenizer(str(model_folder)))
    model, spec = load_model(str(model_folder), device="cpu"), SketchSpec(rank=4, basis="fitted")
    expected = measure(GradientPass(model, spec), sample_groups(source, 8, spec.seed)).describe()
    assert Coverage.of(kept).gradient == pytest.approx(expected["gradient"], rel=1e-5)
    assert kept["parameters"] == expected["parameters"]
    assert [part["name"] for part in kept["left_out"]] == [part["name"] for part in expected["left_out"]]
    assert json.loads(out)["coverage"] == kept
    assert "the sketch sees" in err
    status, out, err = cli(*arguments, "--step", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["coverage"] == kept == read_coverage(tmp_path / "s")
    assert "the sketch sees" not in err


def test_too_little_is_refused_and_can_be_accepted(cli, tmp_path, arguments) -> None:
    """One line that names what is left out and the option, before a store is made; what it offers is accepted."""
    arguments += ["--modules", "mlp"]
    status, out, err = cli(*arguments, "--accept-coverage", 0.95)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "model.layers.*.self_attn.o_proj.weight (" in err
    assert not (tmp_path / "s").exists()
    offered = err.split()[-1]
    assert err.endswith(f"accept it: --accept-coverage {offered}\n")
    status, _, err = cli(*arguments, "--accept-coverage", offered)
    assert status == 0, err
    assert float(offered) <= Coverage.of(read_coverage(tmp_path / "s")).share < float(offered) + 0.01


def test_what_is_not_sketched_of_a_whole_model_is_refused(cli, tmp_path, arguments) -> None:
    """A lookup that holds much of the gradient is no exception: it is sketched unless that was ruled out."""
    status, _, err = cli(*arguments, "--no-embeddings")
    assert status == 2
    assert "left out: model.embed_tokens.weight (" in err
    assert "--embeddings" in err
    status, _, err = cli(*arguments)
    assert status == 0, err
    assert "the input embedding is sketched too" in err
    kept = read_coverage(tmp_path / "s")
    assert (kept["gradient"], kept["left_out"]) == (pytest.approx(1), [])


def test_chosen_layers_are_no_reason_to_refuse(cli, tmp_path, arguments) -> None:
    """Who names layers wants a part; it is told, and kept, how small that is."""
    status, _, err = cli(*arguments, "--modules", "mlp")
    assert status == 0, err
    assert "the sketch sees" in err
    assert read_coverage(tmp_path / "s")["gradient"] < 0.7


def test_the_report_says_what_is_not_seen(cli, tmp_path, arguments, model_folder, rollout_files) -> None:
    """Who reads a ranking did not see the line that `collect` printed."""
    for name in ("pool", "bench"):
        command = ["collect", tmp_path / "s", name, rollout_files[name], *arguments[4:]]
        status, _, err = cli(*command, "--modules", "mlp")
        assert status == 0, err
    status, out, err = cli("report", tmp_path / "s", "--out", tmp_path / "r.md", "--format", "md", "--json")
    assert status == 0, err
    kept = read_coverage(tmp_path / "s")
    (line,) = [line for line in json.loads(out)["warnings"] if "of the squared gradient" in line]
    assert line.startswith("The sketches see ")
    assert kept["left_out"][0]["name"] in line
    assert line.split("; ")[0] in (tmp_path / "r.md").read_text()


def test_a_store_without_a_coverage_is_as_good_as_before(cli, tmp_path, arguments) -> None:
    """Stores made before it was measured: rows are added, nothing is measured, refused or warned of."""
    status, _, err = cli(*arguments, "--accept-coverage", 0)
    assert status == 0, err
    (kept,) = (tmp_path / "s" / "attachments").glob("coverage.json.*")
    kept.unlink()
    (tmp_path / "s" / INVENTORY).unlink()
    status, out, err = cli(*arguments, "--step", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["coverage"] is None
    assert not list((tmp_path / "s" / "attachments").glob("coverage.json.*"))
    assert cli("verify", tmp_path / "s")[0] == 0
