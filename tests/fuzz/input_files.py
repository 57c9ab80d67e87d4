"""Target: input files of others: problems, rollouts, sketches, fingerprints, settings, templates (faults: inputs.py).

A command takes a file, and the store is whole then, or refuses it in one line, and the store is as it was.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import yaml

from gradstore.engine.rollouts import read_rollouts
from gradstore.trainer.local.settings import RunSettings
from tests.fuzz import edits, inputs
from tests.fuzz.honest import write_store
from tests.fuzz.room import read_tree, write_tree
from tests.fuzz.trial import Trial

_RUN = {
    "model": "m", "pool": "pool.jsonl", "benchmarks": {"bench": "b.jsonl"}, "out": "run", "reward": "math",
    "train_rollouts": 8, "lora_rank": 4,
    "sampling": {"max_new_tokens": 64, "temperature": 1.0}, "update": {"lr": 1e-5, "minibatches": 1,
        "objective": "grpo"},
    "rounds": {"candidates": 100, "selected": 10, "train_batch": 5, "steps": 2, "rounds": 3, "rollouts": 4, "seed": 1},
}  # fmt: skip
_KEPT = {"model": "m", "n": 4, "seed": 0, "template_kwargs": {"enable_thinking": False}}
_TEMPLATE = "Problem {problem}\nReference {reference}\nResponse {response}\n"
OTHERS = ("run.yaml", "template.txt", "kept.json")
"""Kinds of files beside those of inputs.py."""

FORKS = True


@dataclass
class Honest:
    """Stores and files without a fault."""

    store: dict[str, bytes]
    small: dict[str, bytes]
    """A store of sketches as wide as those of inputs.py."""
    files: dict[str, bytes]


def prepare(folder: Path) -> Honest:
    """Make the honest stores and files."""
    write_store(folder / "store")
    files = {kind: inputs.honest(kind) for kind in inputs.KINDS}
    files |= {
        "run.yaml": yaml.safe_dump(_RUN).encode(),
        "template.txt": _TEMPLATE.encode(),
        "kept.json": json.dumps(_KEPT).encode(),
    }
    write_tree(folder, files)
    from gradstore.importing import import_sketches

    import_sketches(
        folder / "small", "pool", folder / "sketches.parquet", 0, folder / "problems.jsonl", folder / "fingerprint.json"
    )
    import_sketches(folder / "small", "bench", folder / "sketches.parquet", 0, folder / "problems.jsonl")
    return Honest(read_tree(folder / "store"), read_tree(folder / "small"), files)


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """A file of some kind with faults in it, and what is done with it."""
    kind = random.choice((*inputs.KINDS, *inputs.KINDS, *OTHERS))
    if kind in OTHERS:
        data, what = _other(random, kind, honest.files[kind])
    else:
        data, what = _mutated(kind, random)
    ways = {
        "problems": ("import", "import", "data", "exclude"),
        "verl": ("import", "import", "data"),
        "sketches": ("new", "add", "add"),
    }
    way = random.choice(ways.get(kind.partition(".")[0], ("read",)))
    as_file = random.choice(("fifo", "folder", "link", "/dev/null")) if random.random() < 0.01 else ""
    return {"kind": kind, "data": {"base64": base64.b64encode(data).decode()}, "what": what, "way": way, "as": as_file}


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Give the file to the command that reads its kind."""
    kind, way = case["kind"], case["way"]
    folder = trial.folder / "inputs"
    path = folder / kind
    if case["as"]:
        edits.apply([_as(case["as"], kind)], folder, trial.outside, lambda path, text: text)
    else:
        path.write_bytes(edits.payload(case["data"]))
    if way in ("import", "new", "add"):
        _import(trial, honest, kind, way, path)
    elif way == "data":
        trial.command("data", path, "--out", trial.folder / "out" / "pool.parquet", "--quiet")
    elif way == "exclude":
        (folder / "honest.jsonl").write_bytes(honest.files["problems.jsonl"])
        trial.command(
            "data", folder / "honest.jsonl", "--exclude", path, "--out", trial.folder / "out" / "pool.jsonl", "--quiet"
        )
    elif kind == "fingerprint.json":
        _import(trial, honest, kind, "new", path)
    elif kind == "run.yaml":
        trial.call("settings", RunSettings.of, path)
    elif kind == "template.txt":
        trial.call("template", _template, path)
    else:
        if kind == "kept.json":
            path = folder / "rollouts.jsonl"
            path.write_bytes(honest.files["rollouts.jsonl"])
            (folder / kind).rename(folder / "rollouts.jsonl.settings.json")
        trial.call("rollouts", _read_all, path)


def _import(trial: Trial, honest: Honest, kind: str, way: str, path: Path) -> None:
    """Import into a store or a new one; whatever was taken must be whole, and be searched or refused in one line."""
    store, folder = trial.folder / "store", path.parent
    given: list[Any] = ["--problems", path]
    if way == "import":
        write_tree(store, honest.store)
    else:
        for name in ("problems.jsonl", "sketches.parquet", "fingerprint.json"):
            if name != kind:
                (folder / name).write_bytes(honest.files[name])
        given = ["--sketches", folder / "sketches.parquet", "--step", 3, "--problems", folder / "problems.jsonl"]
        if way == "new":
            given += ["--fingerprint", folder / "fingerprint.json"]
        else:
            write_tree(store, honest.small)
    status, _, _ = trial.command("import", store, "pool", *given, "--quiet", store=store, reads=False)
    if status != 0:
        return
    verified, output, errors = trial.command("verify", store, store=store)
    if verified != 0:
        trial.wrong(f"import {kind.partition('.')[0]}: the store is damaged", output + errors)
    against = "pool" if way == "new" else "bench"
    trial.command("query", store, "--against", against, "--pool", "pool", "--quiet", store=store)
    trial.command("info", store, "--quiet", store=store)


def _mutated(kind: str, random: Random) -> tuple[bytes, str]:
    """A file of inputs.py; faults that cannot be written together are drawn again."""
    while True:
        try:
            return inputs.mutated(kind, random)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, pa.ArrowException):
            continue


def _as(what: str, name: str) -> edits.Edit:
    if what == "link":
        return {"op": "link", "file": name, "to": "/dev/zero"}
    if what == "/dev/null":
        return {"op": "link", "file": name, "to": "/dev/null"}
    return {"op": what, "file": name}


def _read_all(path: Path) -> int:
    """Every rollout of a file, as `collect` reads them."""
    source = read_rollouts(path)
    list(source.records())
    return sum(len(rollouts) for rollouts in source.rollouts())


def _template(path: Path) -> None:
    from gradstore.trainer.sampling.judge import Judge, JudgeSettings

    Judge(JudgeSettings(model="m", base_url="http://127.0.0.1:9/v1", cache="none", template=str(path)))


def _other(random: Random, kind: str, data: bytes) -> tuple[bytes, str]:
    """A file of settings or a template with faults in it."""
    if kind == "template.txt" or random.random() < 0.3:
        edit = edits.text_edit(random, kind, data)
        changed = bytearray(data)
        if edit["op"] == "size":
            return data[: edit["size"]] if edit["size"] < len(data) else data + bytes(
                min(edit["size"], 1 << 20) - len(data)
            ), "size"
        if edit["op"] == "flip":
            changed[edit["byte"]] ^= 1 << edit["bit"]
        else:
            changed[edit["start"] : edit["stop"]] = edits.payload(edit["data"])
        return bytes(changed), edit["op"]
    value = json.loads(data) if kind.endswith("json") else yaml.safe_load(data)
    for _ in range(random.choice((1, 1, 2))):
        path = random.choice(list(edits.places(value)) or [("model",)])
        holder = edits.at(value, path[:-1])
        if random.random() < 0.15:
            del holder[path[-1]]
        elif random.random() < 0.15 and isinstance(holder, dict):
            holder[random.choice((f"{path[-1]}s", str(path[-1])[:-1], "\x1b[2J", "", "a.b"))] = holder.pop(path[-1])
        else:
            holder[path[-1]] = edits.nasty(random)
    if kind.endswith("json") or random.random() < 0.3:
        return edits.dumped(value), "values"  # JSON is YAML
    try:
        text = yaml.safe_dump(value, allow_unicode=True)
    except (RecursionError, ValueError, yaml.YAMLError):
        return edits.dumped(value), "values"
    odd = ("", "", "&a [*a]\n", "a: &a [x]\nb: *a\n", "? {a: 1}\n: 2\n", "!!python/object/apply:os.system ['true']\n",
        "%YAML 9\n---\n", "\t- x\n", "<<: {a: 1}\n",
           "a: 2026-01-01\n", "o: 0o17\n", "---\n---\n", "x: |\n  y\n", "a: !!binary x\n", "k: 1:30\n",
           _bomb())  # fmt: skip
    return (text + random.choice(odd)).encode("utf-8", "surrogatepass"), "values"


def _bomb() -> str:
    """A document of aliases that would be ten to the ninth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines) + "\n"
