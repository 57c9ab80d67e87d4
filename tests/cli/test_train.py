"""`gradstore train --backend local` from problem files to a trained model."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradstore
from gradstore.attachments import read_coverage
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Reference, objective
from gradstore.engine.gradients.coverage import Coverage, LeftOut
from gradstore.engine.gradients.models import load_model
from gradstore.settings import plain, read, read_yaml, write_yaml
from gradstore.trainer import JudgeSettings, RoundSettings, RunSettings, train

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.strip() == ground_truth)
"""

SETTINGS = [
    *("chunk_size=30", "k=5", "train_batch_size=6", "iters_per_select=2", "num_selections=2"),
    *("n_samples_train=8", "n_samples_val=8", "mode=sim", "fit_problems=20"),
    "accept_coverage=0.8",  # a vocabulary this small leaves much to the embedding's lookup
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, records in {"pool": tasks.pool(0, 40), "sums": tasks.benchmark(0, 8)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def _arguments(files: Path, *more: str) -> list[str]:
    options = {
        "--model": MODEL,
        "--pool": files / "pool.jsonl",
        "--benchmark": files / "sums.jsonl",
        "--out": files / "run",
        "--reward": f"{files / 'reward.py'}:compute_score",
        "--max-new-tokens": 8,
        "--train-rollouts": 8,
        "--lr": 1e-4,
    }
    return ["train", *(str(part) for pair in options.items() for part in pair), *more]


def test_trains_and_goes_on(cli, files: Path) -> None:
    """What a person types: GradAlign's names, a second call that refuses to overwrite, --resume that finds it done."""
    first = cli(*_arguments(files, "--json"), *SETTINGS)
    assert first[0] == 0, first[2]
    facts = json.loads(first[1])
    assert (facts["steps"], facts["rounds"]) == (4, 2)
    assert re.search(
        r"round 2 of 2: reward \d\.\d{3}, \d+ % of the problems with a signal, gradient norm \S+", first[2]
    )
    store = gradstore.open(files / "run" / "store")
    assert facts["coverage"] == read_coverage(store.path)
    assert 0.8 < facts["coverage"]["gradient"] <= 1
    assert [len(found.picks) for found in store.rounds("pool")] == [6, 6]
    assert {2, 3} <= set(store.history("pool")["step"].to_pylist())  # the training rollouts were sketched too
    kinds = [json.loads(line)["kind"] for line in (files / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [kinds.count(kind) for kind in ("selection", "round", "step")] == [2, 2, 4]
    assert (files / "run" / "model" / "model.safetensors").exists()

    again = cli(*_arguments(files), *SETTINGS)
    assert again[0] == 2
    assert "--resume" in again[2]
    assert len(again[2].splitlines()) == 1
    done = cli(*_arguments(files, "--resume", "--json"), *SETTINGS)
    assert done[0] == 0, done[2]
    assert json.loads(done[1]) == facts


def test_too_little_coverage_is_refused(cli, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what is left out and the setting that accepts it; the same folder can be used again."""
    little = Coverage(0.5, 0.906, 8, (LeftOut("model.mystery.weight", 0.5, 0.094),))
    monkeypatch.setattr("gradstore.engine.sketches.bases.measure", lambda *given: little)
    found = cli(*_arguments(files), *SETTINGS[:-1])
    assert found[0] == 2
    (line,) = [line for line in found[2].splitlines() if "accept" in line]
    assert "left out: model.mystery.weight (9.4%)" in line
    assert line.endswith("accept it: round setting accept_coverage=0.9")
    assert not (files / "run" / "store").exists()
    found = cli(*_arguments(files), *SETTINGS[:-1], "accept_coverage=0.9")
    assert found[0] == 0, found[2]
    assert little.sentence() in found[2]


def test_an_unknown_logger_is_refused(cli, files: Path) -> None:
    status, _, error = cli(*_arguments(files, "--log", "tensorboard", "--log", "mflow"), *SETTINGS)
    assert status == 2
    assert "did you mean 'mlflow'" in error
    assert not (files / "run").exists()


def test_adapters(cli, files: Path) -> None:
    """With LoRA the base stays as it is on disk and only the adapter is written."""
    found = cli(*_arguments(files, "--lora-rank", "2"), *SETTINGS)
    assert found[0] == 0, found[2]
    assert (files / "run" / "model" / "adapter_model.safetensors").exists()
    assert not (files / "run" / "model" / "model.safetensors").exists()


def test_a_kl_term_in_updates_and_sketches(cli, files: Path) -> None:
    """LearnAlign in rounds: warm up, choose once, by gradients with a KL term to the model that training began from."""
    learnalign = [*SETTINGS[:-3], SETTINGS[-1], "mode=learnalign", "warm_up=1", "once=true", "fit_problems=20"]
    found = cli(*_arguments(files, "--kl-beta", "0.5", "--json"), *learnalign)
    assert found[0] == 0, found[2]
    store = gradstore.open(files / "run" / "store")
    rule = store.fingerprint["objective"]
    digest = Reference(load_model(MODEL, device="cpu")).digest
    assert rule == objective("grpo", kl_beta=0.5, reference=digest).as_dict()
    assert [found.about["warm_up"] for found in store.rounds("pool")] == [True, False]
    other = cli(*_arguments(files, "--kl-beta", "0.1", "--resume"), *learnalign)
    assert other[0] == 2
    elsewhere = [str(files / "other") if own == str(files / "run") else own for own in _arguments(files)]
    probes = cli(*elsewhere, "--kl-beta", "0.5", *SETTINGS[:-3], "mode=lcb")
    assert probes[0] == 2
    assert "leave kl_beta out" in probes[2]
    assert not (files / "other").exists()


def test_a_benchmark_of_solutions(cli, files: Path) -> None:
    """No rollout of the benchmark: the target is of its solutions, with the current weights."""
    records = [{**record, "extra": {"solution": record["ground_truth"]}} for record in tasks.benchmark(0, 8)]
    solved = files / "solved.jsonl"
    solved.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    line = [f"sums.solutions={solved}" if part == str(files / "sums.jsonl") else part for part in _arguments(files)]
    found = cli(*line, *SETTINGS[:-1], "accept_coverage=0.5")
    assert found[0] == 0, found[2]
    store = gradstore.open(files / "run" / "store")
    assert "sums" not in store.collections
    rounds = store.rounds("pool")
    assert [one.about["target"]["kind"] for one in rounds] == ["solutions"] * 2
    assert [one.about["target_rollouts"] for one in rounds] == [0, 0]
    assert [one.about["target"]["steps"] for one in rounds] == [[0, 0], [2, 2]]
    assert all(len(one.picks) == 6 for one in rounds)


def test_the_nucleus_is_an_option(cli, files: Path) -> None:
    """GradAlign samples with top_p; training took it from Python alone."""
    found = cli(*_arguments(files, "--top-p", "1.5"), *SETTINGS)
    assert found[0] == 2
    assert "top_p is 1.5" in found[2]
    usual = {"model": "m", "pool": "p", "out": "o", "top_p": 0.9}
    rounds = {"selected": 2, "train_batch": 2, "steps": 1}
    assert RunSettings.of(None, usual, rounds).sampling.top_p == 0.9


def test_options_that_verl_would_not_see_are_refused(cli) -> None:
    """A seed that goes nowhere is worse than an error."""
    status, _, error = cli("train", "--backend", "verl", "--seed", "3", "--lr", "1e-5", "data.train_files=x")
    assert status == 2
    assert "--seed, --lr: only for --backend local" in error
    status, _, error = cli("train", "--backend", "verl", "--config", "run.yaml", "data.train_files=x")
    assert status == 2
    assert "--config: only for --backend local" in error
    assert "docs/verl.md" in error
    assert len(error.splitlines()) == 1


def _whole(files: Path, **changes: Any) -> dict[str, Any]:
    """A run in one file; smaller than SETTINGS."""
    return {
        "model": str(MODEL),
        "pool": str(files / "pool.jsonl"),
        "benchmarks": {"sums": str(files / "sums.jsonl")},
        "out": str(files / "run"),
        "reward": f"{files / 'reward.py'}:compute_score",
        "train_rollouts": 8,
        "sampling": {"max_new_tokens": 8},
        "lr": "1e-4",
        "rounds": {
            "chunk_size": 30,
            "k": 5,
            "train_batch_size": 6,
            "iters_per_select": 1,
            "num_selections": 2,
            "n_samples_train": 8,
            "n_samples_val": 8,
            "mode": "sim",
            "fit_problems": 20,
            "accept_coverage": 0.8,
            "spec": {"dim": 64},
        },
        **changes,
    }


def _metrics(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_one_file_for_a_run(cli, files: Path, write_yaml_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran stands in OUT/run.yaml, which repeats the run from any folder and goes on with it."""
    out, config = files / "run", write_yaml_file(_whole(files))
    monkeypatch.chdir(files)
    first = cli("train", "--config", "whole.yaml", "--pool", "pool.jsonl", "--seed", 3, "num_selections=1", "--json")
    assert first[0] == 0, first[2]
    facts = json.loads(first[1])
    assert (facts["steps"], facts["rounds"], facts["out"]) == (1, 1, str(out))
    written = RunSettings.of(out / "run.yaml")
    assert (written.pool, written.update.lr, written.rounds.spec.dim) == (files / "pool.jsonl", 1e-4, 64)
    assert (written.rounds.seed, written.rounds.rounds, written.rounds.ratio) == (3, 1, 0.2)
    assert written == RunSettings.of(config, {"seed": 3}, {"rounds": 1}).filled()

    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")
    steps: list[int] = []
    report = train(replace(written, out=files / "again"), on_step=steps.append)
    assert {**facts, "out": str(files / "again")} == {**plain(report)}
    assert steps == [1]
    assert _metrics(files / "again") == _metrics(out)
    assert read_yaml(files / "again" / "run.yaml") == {**read_yaml(out / "run.yaml"), "out": str(files / "again")}

    for more, told in (
        (("--lr", "1e-3"), f"{out / 'run.yaml'}: update.lr is 0.0001, now 0.001"),
        (("mode=dot",), "rounds.selector is 'sim', now 'dot'"),
        (("selected=3",), "rounds.selected is None, now 3"),
        (("num_selections=2", "--benchmark", "sums=../pool.jsonl"), "benchmarks.sums is "),
        (("num_selections=0",), "rounds (num_selections) is 0, expected a whole number of at least 1"),
    ):
        status, _, error = cli("train", "--resume", "--out", out, *more)
        assert status == 2, more
        assert told in error
        assert len(error.splitlines()) == 1
    assert RunSettings.of(out / "run.yaml") == written
    status, printed, error = cli("train", "--resume", "--out", out, "num_selections=2", "window=16", "--json")
    assert status == 0, error
    assert (json.loads(printed)["steps"], json.loads(printed)["rounds"]) == (2, 2)
    assert RunSettings.of(out / "run.yaml").rounds == replace(written.rounds, rounds=2, window=16)
    status, _, error = cli("train", "--resume", "--config", out / "run.yaml", "rounds=1")
    assert status == 2
    assert "rounds.rounds is 2, now 1: a resumed run may have more, not fewer" in error


@pytest.fixture
def write_yaml_file(files: Path):
    """write_yaml_file(values) -> the path of a YAML file with them."""

    def write(values: Any) -> Path:
        (files / "whole.yaml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return files / "whole.yaml"

    return write


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"modle": "x"}, (), "whole.yaml: modle is not known; did you mean 'model'?"),
        ({"lora_rank": "two"}, (), "whole.yaml: lora_rank is 'two', expected a whole number"),
        (
            {"sampling": {"max_tokens": 3}},
            (),
            "whole.yaml: sampling.max_tokens is not known; did you mean 'max_new_tokens'?",
        ),
        ({"sampling": {"max_new_tokens": 0}}, (), "whole.yaml: sampling: max_new_tokens is 0, expected 1 or more"),
        ({"update": {"lr": 1.0}}, (), "whole.yaml: 'lr' and 'update' both give update.lr; give it once"),
        ({"update": {"objective": "gpo"}}, (), "whole.yaml: update.objective: objective 'gpo' is not one of"),
        ({"update": {"objective": {"kl_beta": 1}}}, (), "update.objective.kl_beta: give the run's kl_beta"),
        ({"rounds": {"chunk_sise": 3}}, (), "whole.yaml: rounds.chunk_sise is not known; did you mean 'chunk_size'?"),
        ({"rounds": {"k": 5, "selected": 3}}, (), "whole.yaml: rounds: give either `selected`"),
        ({"rounds": None}, (), "whole.yaml: rounds: give either `selected`"),
        ({"pool": None}, (), "whole.yaml: pool is missing"),
        ({"judge": {"model": "m"}}, (), "whole.yaml: judge: its settings are for reward judge or auto"),
        (
            {"reward": "judge", "judge": {"timeot": 3}},
            (),
            "whole.yaml: judge.timeot is not known; did you mean 'timeout'?",
        ),
        ({}, ("chunk_sise=3",), "round settings: chunk_sise is not known; did you mean 'chunk_size'?"),
        ({}, ("k=many",), "round settings: ratio (1/k) is 'many', expected a number"),
        ({}, ("--lr", "-1"), "whole.yaml with options over it: update: lr is -1.0, expected"),
        ({}, ("--template-kwargs", "{"), "train: sampling.template_kwargs"),
        ({}, ("--config", "none.yaml"), "--config is given twice"),
        ("a: [1\nb: 2", (), "whole.yaml: is not YAML: line 2: "),
        ("- a", (), "whole.yaml: holds no settings, expected lines of NAME: VALUE"),
    ],
)
def test_mistakes_in_the_file(cli, files: Path, write_yaml_file, changes: Any, more: tuple, message: str) -> None:
    """One line with the file and the field, and nothing is made."""
    config = write_yaml_file(changes if isinstance(changes, str) else _whole(files, **changes))
    status, _, error = cli("train", "--config", config, *more)
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1, error
    assert not (files / "run").exists()


def test_options_are_settings(cli, files: Path) -> None:
    """Every option of the command is a setting, with the same default."""
    import inspect

    from gradstore.cli.train import BESIDE
    from gradstore.cli.train import train as command

    made = plain(RunSettings.of(None, {"model": "m", "pool": "p", "out": "o"}, {"selected": 1}))
    for name, parameter in inspect.signature(command).parameters.items():
        if name in (*BESIDE, "context", "model", "pool", "out"):
            continue
        value: Any = made
        for part in RunSettings.ALIASES.get(name, name).split("."):
            value = value[part]
        default = parameter.default
        if name == "objective":
            default = plain(objective(default))
        assert value == (default if default is not None or name != "template_kwargs" else {}), name


class Kept:
    """A logger of a user's own."""

    def __init__(self) -> None:
        self.logged: list[tuple[set[str], int]] = []
        self.closed = False

    def log(self, values: Any, step: int) -> None:
        self.logged.append((set(values), step))

    def close(self) -> None:
        self.closed = True


def test_a_logger_as_an_object(files: Path) -> None:
    own = Kept()
    given = {"model": MODEL, "pool": files / "pool.jsonl", "benchmarks": {"sums": files / "sums.jsonl"}}
    rounds = RoundSettings(
        candidates=6, selected=2, train_batch=2, steps=1, rounds=1, rollouts=4, target_rollouts=4, accept_coverage=0
    )
    settings = RunSettings(**given, out=files / "run", reward=f"{files / 'reward.py'}:compute_score", rounds=rounds)
    settings = replace(settings, sampling=replace(settings.sampling, max_new_tokens=4), train_rollouts=2, log=())
    train(settings, loggers=[own])
    assert own.closed
    assert [step for _, step in own.logged] == [0, 0, 1]
    assert "selection/round/rolled_out" in own.logged[0][0]
    assert "step/reward" in own.logged[2][0]
    assert not (files / "run" / "tensorboard").exists()


def test_settings_of_a_run_and_back(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge stands in the file as it was used, without its key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("GRADSTORE_JUDGE_MODEL", "large")
    settings = RunSettings(
        model="some/model",
        pool=Path("pool.jsonl"),
        benchmarks={"a": Path("a.jsonl"), "b": Path("b.jsonl")},
        out=Path("run"),
        reward="judge:concurrency=3",
        lora_rank=4,
        rounds=RoundSettings(selected=128, quotas={"x": 0.5}),
    )
    filled = settings.filled()
    assert (filled.judge, filled.reward) == (JudgeSettings(model="large", concurrency=3), "judge")
    assert (filled.update.lr, filled.model, filled.pool) == (2e-5, "some/model", Path("pool.jsonl").absolute())
    assert filled.filled() == filled
    write_yaml(tmp_path / "run.yaml", filled)
    monkeypatch.setenv("GRADSTORE_JUDGE_MODEL", "other")
    assert RunSettings.of(tmp_path / "run.yaml") == filled
    assert read(RunSettings, plain(filled), "x: ") == filled
    assert "secret" not in (tmp_path / "run.yaml").read_text()
    assert RunSettings.of(tmp_path / "run.yaml", {"reward": "math"}).judge is None
    assert RunSettings.of(tmp_path / "run.yaml", rounds={"k": 4}).rounds.ratio == 0.25
