"""Problems of reasoning-gym's tasks: generated from a seed, no network, each with the entry that its verifier needs."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

from gradstore.errors import GradstoreError, RequestError, check_known
from gradstore.trainer.data.prompts import GYM

PREFIX = "reasoning-gym"


def check(task: str, config: Mapping[str, Any]) -> None:
    """RequestError for a task or setting that reasoning-gym does not have."""
    _created(task, 0, 1, config)


def draw(
    task: str, count: int, seed: int, config: Mapping[str, Any], instruction: str | None = None
) -> Iterator[dict[str, Any]]:
    """Generate problems of a task, enough for `count` different ones if the task has them; questions may repeat.

    config: the task's own settings. instruction: text after the question, instead of `prompts.GYM`.
    The same task, seed and settings give the same problems, whatever the count. Neighbouring seeds are unrelated.
    """
    instruction = GYM if instruction is None else instruction
    # reasoning-gym draws entry i with seed + i, so seeds close together would give the same entries; some tasks
    # refuse seeds of 2**32 and more
    first = int.from_bytes(hashlib.blake2b(f"{task} {seed}".encode(), digest_size=4).digest(), "big") // 2
    size = 20 * count + 1000
    for entry in _entries(task, first, size, config):
        yield _record(task, entry, config, instruction)


def _entries(task: str, seed: int, size: int, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A task's entries as JSON values, the same in every process.

    A few tasks iterate over sets of strings, whose order depends on the process's hash seed. So entries are generated
    in a subprocess with a fixed hash seed.
    """
    if os.environ.get("PYTHONHASHSEED") == "0":
        yield from islice(_created(task, seed, size, config), size)
        return
    command = [sys.executable, "-c", "from gradstore.trainer.data.gym import serve; serve()"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the drawing process has no pipes")
        process.stdin.write(json.dumps([task, seed, size, config]))
        process.stdin.close()
        try:
            yield from map(json.loads, process.stdout)
        except GeneratorExit:  # enough were drawn
            process.kill()
            raise
    if process.returncode:
        raise GradstoreError(
            f"{PREFIX}:{task}: drawing ended with exit status {process.returncode}; see the lines above"
        )


def serve() -> None:
    """Subprocess: read [task, seed, size, config] from stdin, write the entries to stdout as lines of JSON."""
    out, sys.stdout = sys.stdout, sys.stderr  # some tasks print to stdout
    task, seed, size, config = json.load(sys.stdin)
    for entry in islice(_created(task, seed, size, config), size):
        out.write(json.dumps(entry) + "\n")
        out.flush()


def _created(task: str, seed: int, size: int, config: Mapping[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name = f"{PREFIX}:{task}"
    if task == "composite":
        raise RequestError(f"{name} mixes other tasks: name those, each with its count")
    if task not in DATASETS:
        raise RequestError(f"{name}: no such task; reasoning-gym has {', '.join(sorted(DATASETS))}")
    known = {field.name for field in fields(DATASETS[task][1])} - {"seed", "size"}
    for setting in config:
        check_known(f"{name}: the setting", setting, sorted(known))
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **config)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in config.items())
        raise RequestError(f"{name}: not with {given or 'these settings'}: {error}") from None


def _record(task: str, entry: Mapping[str, Any], config: Mapping[str, Any], instruction: str) -> dict[str, Any]:
    question = str(entry["question"]).strip()
    kept = {"dataset": task, "entry": entry} | ({"config": config} if config else {})
    digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
    return {
        "id": f"{task}-{digest}",
        "source": f"{PREFIX}/{task}",
        "prompt": [{"role": "user", "content": "\n\n".join(filter(None, (question, instruction)))}],
        "ground_truth": "" if entry["answer"] is None else str(entry["answer"]),
        "tags": ["reasoning", task],
        # as JSON text: entries of different tasks have different schemas, which one table column cannot hold
        "extra": {"reward": PREFIX, "reasoning_gym": json.dumps(kept)},
    }
