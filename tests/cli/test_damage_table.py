"""The damage table of docs/reliability.md: each kind of damage, and which command refuses to go on.

A refusal is one line on standard error that names the file, exit status 1, and nothing on standard output before it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

import gradstore
from gradstore.attachments import COVERAGE
from gradstore.inventory import INVENTORY
from gradstore.projection_digest import projection_digest
from gradstore.rounds import SCHEMA

DIM, POOL, BENCH = 16, 30, 25
COVERED = {"parameters": 1.0, "gradient": 0.99, "n_groups": 4, "lookups": 0.0, "left_out": []}
COMMANDS = ("query", "select", "report", "verify")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `store`, and beside it what some of its files held after the first step, in `older`.

    The store: two steps of a pool and of a benchmark, rounds, probes, a projection; the last chunks are partly filled.
    """
    folder = tmp_path_factory.mktemp("made")
    left_OR = np.eye(4, 2, dtype=np.float32)
    layout = [("layer", 0, DIM)]
    digest = projection_digest(layout, [(("layer", 0, DIM), (left_OR, None, None))], None)
    about = {"kind": "fitted", "captured": None, "layout": layout, "layers": layout}
    fingerprint = {"projection": {"kind": "fitted", "basis": digest}, "layout": [["layer", 0, DIM]]}
    store = gradstore.create(
        folder / "store",
        dim=DIM,
        fingerprint=fingerprint,
        chunk_rows=8,
        column_rows=12,
        attachments={
            f"projection-{digest}.safetensors": save({"0.left": left_OR}, {"projection": json.dumps(about)}),
            COVERAGE: json.dumps(COVERED).encode(),
        },
    )
    random = np.random.default_rng(0)
    for name, n in (("pool", POOL), ("bench", BENCH)):
        ids = [f"{name}{i}" for i in range(n)]
        store.add_problems(name, [{"id": one, "prompt": f"What is {one}?", "source": "s"} for one in ids])
        for step in (0, 1):
            with store.writer(name, step=step) as writer:
                writer.append(ids, random.normal(size=(n, DIM)), pass_rate=[0.5] * n, n_rollouts=[4] * n)
            if step == 0:
                place = f"collections/{name}"
                shutil.copytree(store.path / place, folder / "older" / place)
            pairs = [np.ones(2), np.ones(2)]
            store.probes(name).add(ids[:2], pairs, pairs, pairs, step=step, target="bench")
    for number in range(3):
        store.rounds("pool").add({"step": 0, "selector": "cosine", "benchmarks": ["bench"]}, _round(number))
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path / "store"


def _round(number: int) -> pa.Table:
    n = 4
    columns = {
        "id": [f"pool{i + number}" for i in range(n)],
        "score": [0.5] * n,
        "low": [0.0] * n,
        "high": [1.0] * n,
        "state": ["live"] * n,
        "step": [0] * n,
        "pass_rate": [0.5] * n,
        "rolled_out": [True] * n,
        "picked": list(range(n)),
        "weight": [1.0] * n,
        "rollouts": [0] * n,
    }
    return pa.table(columns, schema=SCHEMA)


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


def swap(path: Path) -> None:
    """Exchange a chunk with the same one of the other collection."""
    other = Path(str(path).replace("/pool/", "/bench/"))
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def damaged(store: Path, made: Path, kind: str) -> Path:
    """Damage the store; returns the file at fault."""
    pool = store / "collections/pool"
    what, _, how = kind.partition(", ")
    path = {
        "codes": lambda: pool / "g0/codes/c.4.0",
        "codes of the benchmark": lambda: store / "collections/bench/g0/codes/c.4.0",
        "last codes": lambda: pool / "g0/codes/c.7.0",
        "half-filled codes": lambda: pool / "g0/codes/c.3.0",
        "norms": lambda: pool / "g0/norm/c.2",
        "pass rates": lambda: pool / "g0/pass_rate/c.0",
        "steps": lambda: pool / "g0/step/c.2",
        "problems": lambda: one(pool / "g0/problems", "part-*"),
        "projection": lambda: one(store / "attachments", "projection-*"),
        "coverage": lambda: one(store / "attachments", "coverage*"),
        "round in the middle": lambda: one(pool / "rounds", "part-000001-*"),
        "newest round": lambda: one(pool / "rounds", "part-000002-*"),
        "probes in the middle": lambda: one(pool / "probes", "part-000000-*"),
        "newest probes": lambda: one(pool / "probes", "part-000001-*"),
        "manifest": lambda: pool / "manifest.json",
        "inventory": lambda: pool / INVENTORY,
    }[what]()
    if how == "an older one":
        path.write_bytes((made / "older" / path.relative_to(store)).read_bytes())
    else:
        {"deleted": Path.unlink, "changed": flip, "zeroed": zero, "cut": cut, "swapped": swap}[how](path)
    return path


ALL = set(COMMANDS)
TABLE = {
    **{f"codes, {how}": ALL for how in ("zeroed", "swapped", "cut", "changed", "deleted")},
    **{f"codes of the benchmark, {how}": ALL for how in ("zeroed", "cut", "deleted")},
    **{f"last codes, {how}": ALL for how in ("zeroed", "cut", "deleted")},
    "half-filled codes, an older one": ALL,
    **{f"norms, {how}": ALL for how in ("zeroed", "swapped", "cut", "deleted", "an older one")},
    **{f"pass rates, {how}": ALL for how in ("zeroed", "changed", "deleted")},
    **{f"steps, {how}": ALL for how in ("zeroed", "an older one")},
    **{f"problems, {how}": ALL for how in ("deleted", "cut", "zeroed")},
    "projection, deleted": ALL,
    "coverage, deleted": ALL,
    **{f"{what}, deleted": ALL for what in ("round in the middle", "newest round", "newest probes")},
    "probes in the middle, deleted": ALL,
    "manifest, an older one": ALL,
    **{f"manifest, {how}": ALL for how in ("zeroed", "cut", "changed")},
    **{f"inventory, {how}": ALL for how in ("zeroed", "cut", "changed")},
    # Not read for a ranking: found by what reads it, and by verify.
    "problems, changed": {"verify"},
    "projection, changed": {"verify"},
    "coverage, changed": {"report", "verify"},
    "round in the middle, changed": {"report", "verify"},
    "newest round, cut": {"report", "verify"},
    "newest probes, changed": {"report", "verify"},
}
"""Kind of damage -> the commands that refuse to go on."""


@pytest.fixture
def run(cli: Callable, store: Path, tmp_path: Path) -> Callable[[str], tuple[int, str, str]]:
    arguments: dict[str, tuple] = {
        "query": ("query", store, "--against", "bench", "--pool", "pool"),
        "select": (
            "select",
            store,
            "-n",
            3,
            "--out",
            tmp_path / "out",
            "--against",
            "bench",
            "--pool",
            "pool",
            "--overwrite",
        ),
        "report": ("report", store, "--out", tmp_path / "report.md", "--format", "md", "--overwrite"),
        "verify": ("verify", store),
    }
    return lambda command: cli(*arguments[command])


def files(store: Path) -> dict[str, bytes]:
    """Every file of the store but the indexes, to which the report adds a matrix."""
    found = {path.relative_to(store): path for path in sorted(store.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if "indexes" not in name.parts}


@pytest.mark.parametrize("kind", TABLE)
def test_damage_is_refused_before_a_number_is_shown(
    made: Path, store: Path, run: Callable, tmp_path: Path, kind: str
) -> None:
    """A ranking by zeroed, foreign, cut or older bytes looks like any other."""
    path = damaged(store, made, kind)
    before = files(store)
    for command in COMMANDS:
        status, out, err = run(command)
        if command not in TABLE[kind]:
            assert status == 0, (command, err)
            continue
        assert status == 1, (command, out, err)
        named = out if command == "verify" else err
        stem = path.name.removesuffix(".parquet").rsplit("-", 1)[0] if path.name.startswith("part-") else path.name
        assert stem in named, (command, named)
        if command != "verify":
            assert out == "", command
            assert err.startswith("gradstore: ")
            assert err.count("\n") == 1, err
    assert ("select" in TABLE[kind]) == (not (tmp_path / "out").exists())
    assert ("report" in TABLE[kind]) == (not (tmp_path / "report.md").exists())
    assert files(store) == before


def test_a_whole_store_passes_every_command(store: Path, run: Callable) -> None:
    """The commands of the table refuse nothing that is whole."""
    for command in COMMANDS:
        status, _, err = run(command)
        assert status == 0, (command, err)
    assert gradstore.open(store).verify().notes == []


def test_a_store_without_inventories_is_read_as_before(store: Path, run: Callable) -> None:
    """Stores of earlier versions have none: they stay readable, and verify says what it cannot see."""
    for file in [store / INVENTORY, *store.glob(f"collections/*/{INVENTORY}")]:
        file.unlink()
    for command in COMMANDS:
        assert run(command)[0] == 0, command
    notes = gradstore.open(store).verify().notes
    assert len(notes) == 3
    assert all("nothing would show it" in note for note in notes)
    one(store / "collections/pool/rounds", "part-000001-*").unlink()
    for command in COMMANDS:
        status, out, err = run(command)
        assert (status, "part-000001" in out + err) == (1, True), command


def test_a_store_of_elsewhere_in_the_same_numbers_is_noticed(store: Path, run: Callable) -> None:
    """A newest part replaced by another, whole in itself, is not the one that was added."""
    path = one(store / "collections/pool/rounds", "part-000002-*")
    other = one(store / "collections/pool/rounds", "part-000000-*")
    path.unlink()
    (path.parent / other.name.replace("part-000000", "part-000002")).write_bytes(other.read_bytes())
    for command in COMMANDS:
        assert run(command)[0] == 1, command


def test_a_lost_part_is_never_replaced_by_a_new_one(store: Path) -> None:
    """The next round would take the lost one's number, and the loss would never show."""
    opened = gradstore.open(store, "a")
    one(store / "collections/pool/rounds", "part-000002-*").unlink()
    for attempt in (
        lambda: opened.rounds("pool").add({"step": 1}, _round(0)),
        lambda: list(opened.rounds("pool")),
        lambda: len(opened.rounds("pool")),
        lambda: opened.rounds("pool")[-1],
    ):
        with pytest.raises(gradstore.DamagedError, match=r"part-000002-.*the file is missing; restore it, or accept"):
            attempt()
    (store / "collections/pool" / INVENTORY).unlink()
    assert opened.rounds("pool").add({"step": 1}, _round(0)) == 2
    assert opened.verify().ok


def test_codes_are_checked_once_in_a_process(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later queries, views and commits cost nothing more; only chunks that changed are checked again."""
    from gradstore import chunks
    from gradstore.engine import search, target

    checked: list[int] = []
    real = chunks.crc32c_of

    def counting(codes: np.ndarray) -> int:
        checked.append(len(codes))
        return real(codes)

    monkeypatch.setattr(chunks, "crc32c_of", counting)
    opened = gradstore.open(store, "a")
    wanted = target(opened, "bench")
    search(opened.view("pool"), wanted, 3)
    assert len(checked) == 4 + 5  # chunks of the newest rows: 25 to 49 of the benchmark, 30 to 59 of the pool
    checked.clear()
    search(gradstore.open(store).view("pool"), target(gradstore.open(store), "bench"), 3)
    assert not checked
    with opened.writer("pool", step=2) as writer:
        writer.append(["pool0"], np.ones((1, DIM)))
    search(opened.view("pool"), wanted, 3)
    assert checked == [5]  # only the last chunk has changed: rows 56 to 60


def test_an_open_view_goes_on_beside_a_writer(store: Path) -> None:
    """Rows added to the last chunk do not make its published part look damaged."""
    opened = gradstore.open(store, "a")
    view = opened.view("pool")
    with opened.writer("pool", step=2) as writer:
        writer.append(["pool1", "pool2"], np.ones((2, DIM)))
        writer.publish()
        assert len(view.take(view.ids.tolist())) == POOL
        opened.check_files()
    fresh = opened.view("pool")
    assert fresh.steps.max() == 2
    assert len(fresh.take(fresh.ids.tolist())) == POOL
    assert np.array_equal(view.take(["pool5"]), fresh.take(["pool5"]))
