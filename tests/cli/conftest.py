"""The command line, called in this process, with a model and a store to call it on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore.cli import main


@pytest.fixture
def cli(capsys, monkeypatch):
    """gradstore ARGUMENTS -> (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gradstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def _write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_lines() -> Callable[[Path, list], Path]:
    """write_lines(path, rows) -> the path, with one JSON object a line."""
    return _write_lines


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    _write_lines(folder / "problems.jsonl", [{"id": "a", "prompt": "1+1=", "ground_truth": "2"}])
    return folder


@pytest.fixture
def rollout_files(tmp_path) -> dict[str, Path]:
    """Rollouts, four a problem, of a pool of 12 problems and a benchmark of 4; every fifth problem is always right."""
    files = {}
    for name, n in (("pool", 12), ("bench", 4)):
        random = np.random.default_rng(0)
        rows = [
            {
                "problem_id": f"{name}{i}",
                "prompt": f"{i}+{i}=",
                "response": str(int(random.integers(0, 99))),
                "reward": float(j % 2 if i % 5 else 1),
                "source": f"source{i % 2}",
            }
            for i in range(n)
            for j in range(4)
        ]
        files[name] = _write_lines(tmp_path / f"{name}.jsonl", rows)
    return files


@pytest.fixture
def accepted() -> tuple[str, int]:
    """For new stores of tiny models, of whose gradient the embedding, which is not sketched, holds much."""
    return "--accept-coverage", 0


@pytest.fixture
def store(cli, tmp_path, model_folder, rollout_files, accepted) -> Path:
    """The pool and the benchmark collected from the command line."""
    path = tmp_path / "store"
    for name, rollouts in rollout_files.items():
        status, _, err = cli("collect", path, name, rollouts, "--model", model_folder, "--rank", 4, *accepted)
        assert status == 0, err
    return path


@pytest.fixture
def snapshot() -> Callable[[Path], dict]:
    """snapshot(store) -> every row as published, to compare before and after a request."""

    def rows(store: Path) -> dict:
        opened = gradstore.open(store)
        return {
            name: (opened.commit(name), opened.view(name).ids.tolist(), opened.view(name).norms.tolist())
            for name in opened.collections
        }

    return rows
