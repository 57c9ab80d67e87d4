"""`--shard` of rollout and collect, `--like`, and `merge` of what they wrote."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import Shard

SHORT = ("--reward", "math", "-n", 2, "--max-new-tokens", 4, "--as-text")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("n", [7, 131])
def test_rollouts_of_shards_are_those_of_an_undivided_run(
    cli: Callable, tmp_path: Path, model_folder: Path, write_lines: Callable, n: int
) -> None:
    """Row for row: a seed by the number within the shard would give problems of different shards the same draws.

    131 problems are in blocks of 64 as without shards; 7 are in smaller ones.
    """
    from gradstore.trainer.sampling.backends import load_backend
    from gradstore.trainer.sampling.rewards import load_reward
    from gradstore.trainer.sampling.rollout import rollout

    problems = write_lines(
        tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": f"{i}+1=", "ground_truth": str(i + 1)} for i in range(n)]
    )
    whole = tmp_path / "whole.jsonl"
    rollout(
        gradstore.read_problems(problems),
        load_backend("transformers", model_folder, batch_tokens=512),
        load_reward("math"),
        whole,
        n=2,
        max_new_tokens=4,
        chunk=Shard(0, 2).block(n),
    )
    expected = {}
    for line in _lines(whole):
        expected.setdefault(json.loads(line)["problem_id"], []).append(line)
    found = {}
    for index in range(2):
        out = tmp_path / f"{index}.jsonl"
        arguments = ("rollout", problems, "--model", model_folder, *SHORT, "--batch-tokens", 512, "--out", out)
        status, _, err = cli(*arguments, "--shard", f"{index}/2")
        assert status == 0, err
        for line in _lines(out):
            found.setdefault(json.loads(line)["problem_id"], []).append(line)
    assert found == expected
    status, _, err = cli(*arguments, "--shard", "0/2")
    assert status == 2
    assert "shard was '1/2', now '0/2'" in err


def _collect(cli: Callable, store: Path, rollouts: Path, *arguments: object) -> tuple[int, str]:
    status, _, err = cli("collect", store, "pool", rollouts, *arguments)
    return status, err


def test_shards_of_a_collection(
    cli: Callable, tmp_path: Path, model_folder: Path, rollout_files: dict[str, Path], accepted: tuple
) -> None:
    """Shard 0 fits to all rollouts, the others take its projection: the fingerprint is that of the undivided store,
    and so are the rows, except for the rounding of other batches."""
    own = ("--model", model_folder, "--rank", 4, *accepted)
    rollouts = rollout_files["pool"]
    whole = tmp_path / "whole"
    assert _collect(cli, whole, rollouts, *own)[0] == 0
    first = tmp_path / "0"
    status, err = _collect(cli, first, rollouts, *own, "--shard", "0/3", "--halves")
    assert status == 0, err
    for half in (".even", ".odd"):
        opened = gradstore.open(first)
        assert opened.view(f"pool{half}").ids.tolist() == opened.view("pool").ids.tolist()
    for index in (1, 2):
        more = ("--model", model_folder, "--shard", f"{index}/3")
        status, err = _collect(cli, tmp_path / str(index), rollouts, *more)
        assert status == 2
        assert "give --like STORE, the store of shard 0" in err
        assert not (tmp_path / str(index)).exists()
        for _ in range(2):  # The second finds everything there.
            status, err = _collect(cli, tmp_path / str(index), rollouts, *more, "--like", first)
            assert status == 0, err
    views = {name: gradstore.open(tmp_path / name).view("pool") for name in ("whole", "0", "1", "2")}
    ids = [views[str(index)].ids.tolist() for index in range(3)]
    assert sorted([*ids[0], *ids[1], *ids[2]]) == sorted(views["whole"].ids.tolist())
    for index in range(3):
        part = views[str(index)]
        assert part.store.fingerprint == views["whole"].store.fingerprint
        same = views["whole"].positions(ids[index])
        assert np.array_equal(part.states, views["whole"].states[same])
        assert np.allclose(part.rows(range(len(part))), views["whole"].rows(same), atol=0.02)


def test_settings_that_the_other_store_does_not_have(
    cli: Callable, tmp_path: Path, model_folder: Path, store: Path, rollout_files: dict[str, Path]
) -> None:
    """Refused, and no store is left behind."""
    like = ("--model", model_folder, "--like", store)
    for more, message in (
        (("--rank", 3), "fingerprint differs"),
        (("--objective", "grpo"), "fingerprint differs"),
        (("--dtype", "fp16"), "leave it out"),
        (("--refit", "auto", "--benchmark-rollouts", rollout_files["bench"]), "leave it out"),
        (("--shard", "12/13"), "has 12 problems, too few for 13 shards"),
    ):
        status, err = _collect(cli, tmp_path / "new", rollout_files["pool"], *like, *more)
        assert status == 2, more
        assert message in err
        assert not (tmp_path / "new").exists()
    other = gradstore.create(tmp_path / "other", dim=8, fingerprint={"made": "by hand"})
    status, err = _collect(cli, other.path, rollout_files["pool"], *like)
    assert status == 2
    assert "fingerprint differs" in err


def test_a_likeness(tmp_path: Path, store: Path) -> None:
    """Settings, projection and coverage are the other store's; rows and problems are not."""
    made = gradstore.create_like(tmp_path / "made", store)
    like = gradstore.open(store)
    assert made.fingerprint == like.fingerprint
    assert made.collections == []
    assert made.verify().ok
    names = lambda one: sorted(path.name for path in (one.path / "attachments").iterdir())  # noqa: E731
    assert names(made) == names(like) != []


def test_merged_shards_answer_as_the_undivided_store(
    cli: Callable, tmp_path: Path, model_folder: Path, rollout_files: dict[str, Path], store: Path
) -> None:
    """The same ranking, but for the rounding of other batches, whatever the order of the shards."""
    arguments = ("--model", model_folder, "--like", store)
    for index in range(3):
        for name, rollouts in rollout_files.items():
            part = ("--shard", f"{index}/3") if name == "pool" else ()
            status, _, err = cli("collect", tmp_path / f"{index}", name, rollouts, *arguments, *part)
            assert status == 0, err
    shards = [tmp_path / f"{index}" for index in range(3)]
    status, out, err = cli("merge", *shards, "--out", tmp_path / "merged", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["left_out"] == []
    assert report["collections"]["pool"]["problems"] == 12
    assert report["collections"]["bench"] | {"again": 0} == {
        "stores": 3,
        "problems": 4,
        "rows": 4,
        "again": 0,
        "deleted": 0,
        "probes": 0,
        "rounds": 0,
    }
    assert report["collections"]["bench"]["again"] == 8
    status, out, err = cli("merge", *shards, "--out", tmp_path / "merged")
    assert status == 0, err
    assert out.splitlines()[-1] == f"{tmp_path / 'merged'}: was merged already"
    status, _, err = cli("merge", *shards[::-1], "--out", tmp_path / "other")
    assert status == 0, err
    answers = []
    for path in (store, tmp_path / "merged", tmp_path / "other"):
        status, out, err = cli("query", path, "--against", "bench", "--pool", "pool", "--top", 12, "--json")
        assert status == 0, err
        answers.append([(hit["id"], hit["score"]) for hit in json.loads(out)["hits"]])
    assert answers[1] == answers[2]
    assert [one for one, _ in answers[0]] == [one for one, _ in answers[1]]
    assert np.allclose([score for _, score in answers[0]], [score for _, score in answers[1]], atol=0.02)


def test_stores_that_cannot_be_merged(
    cli: Callable, tmp_path: Path, model_folder: Path, rollout_files: dict[str, Path], store: Path, accepted: tuple
) -> None:
    """Exit status 2, one line with field, values and both stores; projections fitted apart are named as such."""
    arguments = ("--model", model_folder, "--rank", 4, *accepted)
    status, _, err = cli("collect", tmp_path / "apart", "pool", rollout_files["bench"], *arguments)
    assert status == 0, err
    status, _, err = cli("merge", store, tmp_path / "apart", "--out", tmp_path / "out")
    assert status == 2
    assert "projection.basis" in err
    assert str(store) in err
    assert "fitted apart: collect one with --like the other" in err
    assert err.count("\n") == 1
    status, _, err = cli("merge", store, "--out", store)
    assert status == 2
    assert "something else here already" in err
