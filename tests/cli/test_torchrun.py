"""`torchrun --nproc-per-node 2 -m gradstore ...`: one store, as one process would have made it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore

Torchrun = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def torchrun(tmp_path) -> Torchrun:
    """torchrun(*arguments, before="") -> what two ranks of gradstore said; before: Python that each runs first."""

    def run(*arguments: object, before: str = "", n: int = 2) -> subprocess.CompletedProcess:
        program = tmp_path / "program.py"
        program.write_text(f"{before}\nfrom gradstore.cli import main\nmain()\n", encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone", str(program),
             *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    return run


def own_lines(said: str) -> list[str]:
    """The lines of standard error that gradstore wrote, without torchrun's."""
    return [line for line in said.splitlines() if line.startswith("gradstore: ")]


def rows_of(store: Path, collection: str) -> dict[str, np.ndarray]:
    view = gradstore.open(store).view(collection)
    found = {name: getattr(view, name) for name in ("ids", "steps", "states", "norms", "pass_rates")}
    return {**found, "units": np.concatenate([rows for _, rows in view.blocks()])}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name in ("ids", "steps", "states", "pass_rates"):
        assert found[name].tolist() == expected[name].tolist(), name
    for name in ("norms", "units"):
        scale = np.abs(expected[name]).max()
        assert np.abs(found[name] - expected[name]).max() <= tolerance * scale, name


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal but for numbers, which differ by at most the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert found == expected


def test_rows_are_those_of_one_process(cli, torchrun, tmp_path, model_folder, rollout_files, accepted) -> None:
    """The same projection, so the same rows in the same order: bit for bit where each micro-batch is one response, else
    within the rounding of other micro-batches."""
    begun = tmp_path / "begun"
    common = ("--model", model_folder)
    assert (
        cli("collect", begun, "bench", rollout_files["bench"], *common, "--rank", 4, "--dtype", "fp32", *accepted)[0]
        == 0
    )
    for budget, tolerance in ((1, 0.0), (400, 1e-4)):
        stores = [shutil.copytree(begun, tmp_path / f"{name}-{budget}") for name in ("one", "two")]
        asked = ("pool", rollout_files["pool"], *common, "--token-budget", budget, "--json")
        status, alone, error = cli("collect", stores[0], *asked)
        assert status == 0, error
        ended = torchrun("collect", stores[1], *asked)
        assert ended.returncode == 0, ended.stderr
        assert_equal(rows_of(stores[1], "pool"), rows_of(stores[0], "pool"), tolerance)
        told, expected = json.loads(ended.stdout), json.loads(alone)
        for name in ("collected", "live", "no_signal", "n_tokens", "bases"):
            assert told[name] == expected[name]
        assert gradstore.open(stores[1]).verify().ok


@pytest.mark.parametrize("basis", ["fitted", "random"])
def test_new_store(cli, torchrun, tmp_path, model_folder, rollout_files, accepted, basis) -> None:
    """Two ranks begin a store: the fit is divided and added up, the rows that it made are gathered and kept."""
    settings = ("--model", model_folder, "--rank", 4, "--basis", basis, "--dtype", "fp32", *accepted)
    one, two = tmp_path / "one", tmp_path / "two"
    for collection in ("pool", "bench"):
        assert cli("collect", one, collection, rollout_files[collection], *settings)[0] == 0
        ended = torchrun("collect", two, collection, rollout_files[collection], *settings)
        assert ended.returncode == 0, ended.stderr
    opened, expected = gradstore.open(two), gradstore.open(one)
    if basis == "random":
        assert opened.fingerprint == expected.fingerprint
        assert_equal(rows_of(two, "pool"), rows_of(one, "pool"), 1e-4)
    scores = []
    for store in (one, two):
        status, out, error = cli("query", store, "--against", "bench", "--top", 12, "--json")
        assert status == 0, error
        scores.append({hit["id"]: hit["score"] for hit in json.loads(out)["hits"]})
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert opened.view("pool").ids.tolist() == expected.view("pool").ids.tolist()


def test_fidelity_is_that_of_one_process(cli, torchrun, store, model_folder, rollout_files) -> None:
    """Exact gradients are formed by rank; their mean over the benchmark alone is summed."""
    asked = ("fidelity", store, "--pool", "pool", "--against", "bench", "--model", model_folder)
    asked += ("--rollouts", rollout_files["pool"], "--benchmark-rollouts", rollout_files["bench"], "--json")
    status, alone, error = cli(*asked)
    assert status == 0, error
    ended = torchrun(*asked)
    assert ended.returncode == 0, ended.stderr
    assert_close(json.loads(ended.stdout), json.loads(alone), 1e-4)


@pytest.mark.parametrize(("how", "tolerance"), [((), 1e-4), (("--rank", 4), 5e-4)])
def test_probes_are_those_of_one_process(
    cli, torchrun, tmp_path, store, model_folder, rollout_files, how, tolerance
) -> None:
    """Each rank probes its own problems along the gradient that all have summed; rank 0 keeps them in the store. Steps
    follow from the rounding of a few micro-batches, which is coarser beside a low-rank branch."""
    stores = [shutil.copytree(store, tmp_path / name) for name in ("one", "two")]
    told, tables = [], []
    for path, run in zip(stores, (cli, torchrun), strict=True):
        asked = ("probe", path, "--pool", "pool", "--against", "bench", "--model", model_folder, "--json", *how)
        ended = run(*asked, "--rollouts", rollout_files["pool"], "--benchmark-rollouts", rollout_files["bench"])
        status, out, error = ended if isinstance(ended, tuple) else (ended.returncode, ended.stdout, ended.stderr)
        assert status == 0, error
        told.append(json.loads(out))
        tables.append(gradstore.open(path).probes("pool").table(step=0, target="bench"))
    one, two = tables
    assert two["id"].to_pylist() == one["id"].to_pylist()
    found, expected = (np.concatenate(table["derivatives"].to_pylist()) for table in (two, one))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected)))
    scores = [{row["id"]: row["dot"] for row in answer["best"]} for answer in told]
    assert scores[1] == pytest.approx(scores[0], abs=tolerance * max(scores[0].values()))
    for name in ("n_problems", "n_live", "step"):
        assert told[1][name] == told[0][name]
    assert len(told[1]["calibration"]["exact"]) == len(told[0]["calibration"]["exact"])


def test_goes_on_after_a_kill(cli, torchrun, tmp_path, model_folder, rollout_files, accepted) -> None:
    """A rank that the system ends takes the others with it; the same command goes on, and makes the same rows."""
    settings = ("--model", model_folder, "--rank", 4, "--dtype", "fp32", "--basis", "random", *accepted)
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli("collect", one, "pool", rollout_files["pool"], *settings)[0] == 0
    kill = (
        "import os, time\n"
        "import gradstore\n"
        "from gradstore.engine.sketches import collector\n"
        "collector._PUBLISH_SECONDS = 0.0\n"
        "inner, n = collector._sketched, [0]\n"
        "windows = collector.windows\n"
        "collector.windows = lambda groups, n_tokens: windows(groups, n_tokens, 4)\n"
        "def sketched(*given):\n"
        "    n[0] += 1\n"
        "    if n[0] == 2 and os.environ['RANK'] == '1':\n"
        f"        while not len(gradstore.open({str(two)!r}).view('pool').ids):\n"  # rank 0 publishes the first window
        "            time.sleep(0.02)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return inner(*given)\n"
        "collector._sketched = sketched\n"
    )
    ended = torchrun("collect", two, "pool", rollout_files["pool"], *settings, before=kill)
    assert ended.returncode != 0
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in ended.stderr
    assert 0 < len(rows_of(two, "pool")["ids"]) < 12
    ended = torchrun("collect", two, "pool", rollout_files["pool"], *settings)
    assert ended.returncode == 0, ended.stderr
    assert_equal(rows_of(two, "pool"), rows_of(one, "pool"), 1e-4)


def test_an_error_on_one_rank_is_one_line(torchrun, tmp_path, model_folder, rollout_files, accepted) -> None:
    """The other rank waits in a collective, fails for it too, and must not bury the reason under its own."""
    fail = (
        "import os\n"
        "from gradstore.errors import RequestError\n"
        "from gradstore.engine.sketches import collector\n"
        "inner = collector._sketched\n"
        "def sketched(*given):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RequestError('out of memory in a micro-batch')\n"
        "    return inner(*given)\n"
        "collector._sketched = sketched\n"
    )
    settings = ("--model", model_folder, "--rank", 4, "--basis", "random", *accepted)
    ended = torchrun("collect", tmp_path / "store", "pool", rollout_files["pool"], *settings, before=fail)
    assert ended.returncode != 0
    assert own_lines(ended.stderr) == ["gradstore: out of memory in a micro-batch"]


def test_wrong_requests(torchrun, tmp_path, model_folder, rollout_files) -> None:
    """Found by every rank, said once; and a command that would only do its work twice is refused."""
    common = ("collect", tmp_path / "store", "pool", rollout_files["pool"])
    for arguments, told in (
        ((*common, "--model", tmp_path / "none"), "there is no such folder"),
        ((*common, "--model", model_folder, "--optimizer", "optimizer.pt"), "--optimizer runs in one process"),
        (("info", tmp_path / "store"), "info runs in one process"),
    ):
        ended = torchrun(*arguments)
        assert ended.returncode != 0
        (line,) = own_lines(ended.stderr)
        assert told in line
    assert not (tmp_path / "store").exists()
