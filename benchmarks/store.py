"""Speed of writing rows, relative to writing the same bytes to plain files: one command, ratios within one run.

    python -m benchmarks.store [--rows 200000] [--dim 4096] [--repeats 5] [--folder DIR]

write    from float32 sketches in memory to published rows, fsync included. Compared with `write` of their codes to one
         file and an fsync (the second of two in a row, because the first may have to wait for memory), and with
         encoding alone.
append   64 rows and a publication in an open writer. Compared with appending their codes to a file and an fsync.
"""

import os
import shutil
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

import gradstore
from benchmarks.timing import interleaved, print_times
from gradstore.quantise import encode

BLOCK_ROWS = 4096
APPENDED = 64


def main(
    rows: Annotated[int, typer.Option(help="Problems.")] = 200_000,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 4096,
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where to write: a folder on the disk to measure.")] = None,
) -> None:
    """Time writing."""
    random = np.random.default_rng(0)
    sketches = random.standard_normal((BLOCK_ROWS, dim), dtype=np.float32)
    codes = encode(sketches, "int8")[0]
    ids = [f"problem-{i:08d}" for i in range(rows)]
    starts = range(0, rows, BLOCK_ROWS)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        root = Path(place)

        def raw_file() -> float:
            started = perf_counter()
            descriptor = os.open(root / "raw", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for start in starts:
                os.write(descriptor, codes[: rows - start])
            os.fsync(descriptor)
            os.close(descriptor)
            took = perf_counter() - started
            os.unlink(root / "raw")
            return took

        def raw() -> float:
            raw_file()  # warm-up: a virtual machine may first have to get unused memory back from its host
            return raw_file()

        def store() -> float:
            made = _make(root / "store", ids, dim)
            with made.writer("pool", step=0) as writer:
                started = perf_counter()
                for start in starts:
                    writer.append(ids[start : start + BLOCK_ROWS], sketches[: rows - start])
                writer.publish()
                took = perf_counter() - started
            del made, writer
            shutil.rmtree(root / "store")
            return took

        def encoding() -> None:
            for start in starts:
                encode(sketches[: rows - start], "int8")

        seconds = interleaved({"raw file": raw, "store": store, "encoding alone": encoding}, repeats)
        print_times(f"{rows} x {dim} int8 written, {repeats} interleaved repeats", seconds, "raw file")
        share = seconds["raw file"] / seconds["store"]
        print(
            f"store / raw file, speed: {np.median(share):.2f} ({share.min():.2f}-{share.max():.2f}), asked at least 0.8"
        )

        made = _make(root / "store", ids[:4096], dim)
        descriptor = os.open(root / "raw", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        with made.writer("pool", step=0) as writer:

            def append() -> None:
                writer.append(ids[:APPENDED], sketches[:APPENDED])
                writer.publish()

            def raw_append() -> None:
                os.write(descriptor, codes[:APPENDED])
                os.fsync(descriptor)

            seconds = interleaved({"raw append": raw_append, "append and publish": append}, 10 * repeats)
        os.close(descriptor)
        print_times(f"{APPENDED} rows x {dim} int8, {10 * repeats} interleaved repeats", seconds, "raw append")
        print("asked at most 5")


def _make(path: Path, ids: list[str], dim: int) -> gradstore.Store:
    store = gradstore.create(path, dim=dim, fingerprint={"made": "at random"})
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    return store


if __name__ == "__main__":
    typer.run(main)
