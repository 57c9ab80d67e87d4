"""Files as somebody else might have made them: honest ones with a few structured faults, by kind and seed.

`mutated(kind, rng)` gives the bytes of a file and what was done to it. Some of the results are still honest: the
property to test is that a reader takes a file or refuses it in one line, and nothing else.
"""

import csv
import datetime
import io
import json
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.reading.csv_rows import SEPARATORS

DIM = 8
"""Dimensions of the sketches."""
KINDS = (
    "problems.jsonl", "problems.json", "problems.parquet", "verl.jsonl", "verl.parquet",
    "rollouts.jsonl", "rollouts.json", "rollouts.parquet", "dump.jsonl",
    "sketches.parquet", "fingerprint.json", "problems.csv", "problems.tsv",
    "problems.jsonl.gz", "problems.json.gz", "rollouts.jsonl.gz", "problems.jsonl.zst", "rollouts.json.zst",
)  # fmt: skip
PACKED = {".gz": "gzip", ".zst": "zstd"}
Change = tuple[bytes, str]


def mutated(kind: str, rng: Random) -> Change:
    """The bytes of a file of this kind with one to three faults, and a description of them."""
    if (suffix := kind[kind.rindex(".") :]) in PACKED:
        return _packed(*mutated(kind.removesuffix(suffix), rng), PACKED[suffix], rng)
    rows = honest_rows(kind.partition(".")[0])
    done = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        if rows and rows[0]:
            rows, what = rng.choice(_ROWS)(rows, rng)
            done.append(what)
    if kind.endswith("parquet"):
        data, what = _parquet(rows, rng)
    elif kind.endswith(tuple(SEPARATORS)):
        data, what = _csv(kind, rows, rng)
    else:
        data, what = _json(kind, rows, rng)
    done.append(what)
    if not any(done) or rng.random() < 0.3:
        data, what = rng.choice(_BYTES)(data, rng)
        done.append(what)
    return data, "; ".join(filter(None, done)) or "nothing"


def honest(kind: str) -> bytes:
    """The bytes of a file of this kind without a fault."""
    if (suffix := kind[kind.rindex(".") :]) in PACKED:
        return pa.compress(honest(kind.removesuffix(suffix)), PACKED[suffix], asbytes=True)
    rows = honest_rows(kind.partition(".")[0])
    if kind.endswith("parquet"):
        return _parquet_bytes(pa.Table.from_pylist(rows))
    if kind.endswith(tuple(SEPARATORS)):
        return _csv_text(kind, rows).encode()
    return _text(kind, [json.dumps(row) for row in rows]).encode()


def honest_rows(name: str) -> list[dict[str, Any]]:
    """The rows of an honest file."""
    if name == "problems":
        return [
            {"id": f"p{i}", "prompt": f"{i}+{i}=", "source": "sums", "ground_truth": str(2 * i), "tags": ["easy"],
             "extra": {"level": i}}
            for i in range(6)
        ]  # fmt: skip
    if name == "verl":
        return [
            {"data_source": "sums", "prompt": [{"role": "user", "content": f"{i}+{i}="}], "ability": "math",
             "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
             "extra_info": {"index": i, "split": "train"}}
            for i in range(6)
        ]  # fmt: skip
    if name == "rollouts":
        return [
            {"problem_id": f"p{i}", "prompt": f"{i}+{i}=", "prompt_ids": [5, 6 + i], "response": "ab",
             "response_ids": [7, 8 + j], "logprobs": [-0.5, -1.25], "reward": float(j), "source": "sums",
             "ground_truth": str(2 * i), "tags": ["easy"], "finish_reason": "stop", "step": 0}
            for i in range(4) for j in range(2)
        ]  # fmt: skip
    if name == "dump":
        return [
            {"input": f"{i}+{i}=", "output": "ab", "gts": str(2 * i), "score": float(j), "step": 1}
            for i in range(4) for j in range(2)
        ]  # fmt: skip
    if name == "sketches":
        return [
            {"id": f"p{i}", "sketch": [float(i + d + 1) for d in range(DIM)], "norm": 2.0, "pass_rate": 0.5,
             "n_rollouts": 4}
            for i in range(6)
        ]  # fmt: skip
    return [{"model": "tiny", "projection": {"kind": "random", "seed": 1}, "modules": ["q", "v"]}]


# Faults of rows, as Python values. A value of class _Raw stands for JSON text that Python values cannot spell.


class _Raw(str):
    __slots__ = ()


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**31, 2**63, -(2**70), 10**400, 1.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), float("-inf"), "", " ", "a", "é∂😀", "a\x00b", "\x1b[2J", "\u202eabc", "\u009b31m", "line\nline",
    "\ud800", "x\udfff", "1.0", "nan", "{", "[1", '{"a": 1}', "../../etc", "/dev/stdin", "a" * 3000,
    [], {}, [None], [[]], [1, "a"], [1.5],
    [True], [-1], [2**40], [float("nan")], ["\ud800"], {"": ""}, {"a": None}, {"a": float("inf")}, {"role": "user"},
    [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": 1, "content": "a"}],
    [{"role": "user", "content": [{"type": "text"}]}],
    {"index": 1}, {"index": [1]}, {"ground_truth": {"a": [1]}}, _Raw("NaN"), _Raw("-Infinity"), _Raw("1" * 5000),
    _Raw("1E400"), _Raw("[" * 500 + "]" * 500), _Raw("[" * 100_000), _Raw('{"a":' * 300 + "1" + "}" * 300),
    _Raw('{"a": 1, "a": 2}'), _Raw('"\\ud83d"'), _Raw("01"), _Raw("'a'"), _Raw("undefined"),
    b"\xff\x00", datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2), datetime.timedelta(seconds=3),
    datetime.time(1, 2), Decimal("1.5"), [b"a"], {"a": b"a"}, [datetime.date(2026, 1, 2)],
)  # fmt: skip
"""Values that stand where others belong."""


def _one_value(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    row, name = rng.randrange(len(rows)), rng.choice(list(rows[0]))
    value = rng.choice(VALUES)
    return [r | {name: value} if j == row else r for j, r in enumerate(rows)], f"row {row}: {name} is {value!r:.60}"


def _whole_column(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    name, value = rng.choice(list(rows[0])), rng.choice(VALUES)
    return [r | {name: value} for r in rows], f"every {name} is {value!r:.60}"


def _inside(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    row = rng.randrange(len(rows))
    whole = json.loads(json.dumps(rows[row], default=str))
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(whole)
    part, key = rng.choice(places) if places else (whole, "a")
    part[key] = value = rng.choice(VALUES)
    return [whole if j == row else r for j, r in enumerate(rows)], f"row {row}: [{key!r}] is {value!r:.60}"


def _renamed(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    old = rng.choice(list(rows[0]))
    new = rng.choice(
        (old + "s", old[:-1], old.upper(), " " + old, old[::-1], "", old + "\x1b[0m", "é", "a.b", "\udfff")
    )
    return [{(new if k == old else k): v for k, v in r.items()} for r in rows], f"{old} is called {new!r}"


def _dropped(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    name = rng.choice(list(rows[0]))
    only = rng.randrange(len(rows)) if rng.random() < 0.5 else None
    kept = [{k: v for k, v in r.items() if k != name or only not in (None, j)} for j, r in enumerate(rows)]
    return kept, f"no {name} in {'any row' if only is None else f'row {only}'}"


def _added(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    name = rng.choice(("extra2", "id", "problem_id", "norms", "passrate", "data_source", "input", "group_id", "images"))
    value = rng.choice(VALUES)
    return [r | {name: value} for r in rows], f"{name} is added, {value!r:.60}"


def _repeated(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    return [*rows, rng.choice(rows)], "a row stands twice"


def _none(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    return [], "no rows"


def _no_object(rows: list[dict], rng: Random) -> tuple[list[dict], str]:
    place, value = rng.randrange(len(rows)), rng.choice(VALUES)
    return [*rows[:place], value, *rows[place:]], f"row {place} is {value!r:.60}"


_ROWS: tuple[Callable[[list[dict], Random], tuple[list[dict], str]], ...] = (
    _one_value, _one_value, _one_value, _whole_column, _whole_column, _inside, _inside, _renamed, _dropped, _added,
    _repeated, _none,
)  # fmt: skip


# Faults of JSON text.


def _json(kind: str, rows: list[Any], rng: Random) -> Change:
    what = ""
    if rows and rng.random() < 0.1:
        rows, what = _no_object(rows, rng)
    lines = [_spelled(row, ascii_only=rng.random() < 0.5) for row in rows]
    if lines and rng.random() < 0.25:
        place = rng.randrange(len(lines))
        lines[place], what = rng.choice(
            (
                (lines[place].replace("{", '{"id": "twice", ', 1), f"row {place}: id stands twice"),
                (lines[place] + ",", f"row {place}: a comma follows"),
                (lines[place][: rng.randrange(1, len(lines[place]) + 1)], f"row {place} is cut"),
                (lines[place].replace(" ", "\n"), f"row {place} has line breaks"),
                (lines[place] * 2, f"row {place}: two on a line"),
                ("", f"row {place} is blank"),
            )
        )
    data = _text(kind, lines).encode("utf-8", "surrogatepass")
    return rng.choice(
        [(data, what)] * 6
        + [
            (b"\xef\xbb\xbf" + data, f"{what}; a byte order mark"),
            (data.replace(b"\n", b"\r\n"), f"{what}; carriage returns"),
            (data.decode("utf-8", "replace").encode("utf-16", "surrogatepass"), f"{what}; as UTF-16"),
            (data.decode("utf-8", "replace").encode("latin-1", "replace"), f"{what}; as Latin-1"),
            (b"\n \n" + data + b"\n\n", f"{what}; blank lines"),
            (data + b"\x00", f"{what}; a null byte"),
        ]
    )


def _text(kind: str, lines: list[str]) -> str:
    if kind == "fingerprint.json":
        return "\n".join(lines)
    return f"[{', '.join(lines)}]" if kind.endswith(".json") else "".join(line + "\n" for line in lines)


def _spelled(value: Any, ascii_only: bool) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)}: {_spelled(v, ascii_only)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(_spelled(part, ascii_only) for part in value)}]"
    return json.dumps(value, ensure_ascii=ascii_only, default=str)


# Faults of packed files and of CSV.


@cache
def _bomb(packing: str, line: bytes) -> bytes:
    """Few bytes that unpack to 300 MB."""
    packed, block = pa.BufferOutputStream(), line * ((1 << 20) // len(line))
    with pa.CompressedOutputStream(packed, packing) as stream:
        for _ in range(300):
            stream.write(block)
    return packed.getvalue().to_pybytes()


def _packed(data: bytes, what: str, packing: str, rng: Random) -> Change:
    packed = pa.compress(data, packing, asbytes=True)
    return rng.choice(
        [(packed, what)] * 8
        + [
            (data, f"{what}; not packed"),
            (packed + packed, f"{what}; two members"),
            (packed + b"\n", f"{what}; a byte behind it"),
            (pa.compress(packed, packing, asbytes=True), f"{what}; packed twice"),
            (pa.compress(data, "gzip" if packing == "zstd" else "zstd", asbytes=True), f"{what}; packed otherwise"),
            (packed[: rng.randrange(len(packed) + 1)], f"{what}; the packed file is cut"),
            _with(what, _flipped(packed, rng)),
            _with(what, _random_bytes(packed, rng)),
            (_bomb(packing, rng.choice((b" ", b"\n", b"{", b'{"id": "a"}\n'))), "a bomb"),
        ]
    )


def _with(what: str, change: Change) -> Change:
    return change[0], f"{what}; packed, then {change[1]}"


def _csv(kind: str, rows: list[Any], rng: Random) -> Change:
    text = _csv_text(kind, [row for row in rows if isinstance(row, dict)])
    lines = text.splitlines(keepends=True)
    what, place, between = "", rng.randrange(len(lines) + 1), SEPARATORS[kind[-4:]]
    if rng.random() < 0.5:
        odd = (between, '"', '""', "\x00", "\r", "\n\n", between * 50, '"a\nb', "x" * 200_000, "#", "'", "\\", "é∂")
        added = rng.choice(odd)
        lines.insert(place, added)
        text, what = "".join(lines), f"line {place} begins with {added!r:.20}"
    data = text.encode("utf-8", "surrogatepass")
    return rng.choice(
        [(data, what)] * 6
        + [
            (b"\xef\xbb\xbf" + data, f"{what}; a byte order mark"),
            (data.replace(b"\r\n", b"\r"), f"{what}; carriage returns alone"),
            (data.decode("utf-8", "replace").encode("utf-16", "surrogatepass"), f"{what}; as UTF-16"),
            (data.decode("utf-8", "replace").encode("latin-1", "replace"), f"{what}; as Latin-1"),
            (data.replace(between.encode(), b";"), f"{what}; semicolons"),
            (data.split(b"\n", 1)[-1], f"{what}; no heading"),
        ]
    )


def _csv_text(kind: str, rows: list[dict]) -> str:
    """Rows as CSV; cells that are no text are JSON."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=SEPARATORS[kind[-4:]])
    names = list(dict.fromkeys(str(key) for row in rows for key in row))
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow([cell if isinstance(cell, str) else _spelled(cell, True) for cell in cells])
    return buffer.getvalue()


# Faults of Parquet: types of columns, and how the file is written.


def _as(kind: Callable[[], pa.DataType]) -> Callable[[pa.Array], pa.Array]:
    return lambda column: column.cast(kind())


COLUMN_CHANGES: dict[str, Callable[[pa.Array], pa.Array]] = {
    "string_view": _as(pa.string_view),
    "large_string": _as(pa.large_string),
    "binary": _as(pa.binary),
    "dictionary": lambda column: column.dictionary_encode(),
    "bool": _as(pa.bool_),
    "text": _as(pa.string),
    "date": lambda column: column.cast(pa.int32()).cast(pa.date32()),
    "duration": lambda column: column.cast(pa.int64()).cast(pa.duration("s")),
    "timestamp": lambda column: column.cast(pa.int64()).cast(pa.timestamp("us", "UTC")),
    "time": lambda column: column.cast(pa.int32()).cast(pa.time32("s")),
    "decimal": _as(lambda: pa.decimal128(20, 3)),
    "half": _as(pa.float16),
    "double": _as(pa.float64),
    "int8": _as(pa.int8),
    "uint64": _as(pa.uint64),
    "null": lambda column: pa.nulls(len(column)),
    "first null": lambda column: pa.array([None, *column.to_pylist()[1:]], column.type),
    "list": lambda column: pa.array([[value] for value in column.to_pylist()]),
    "list_view": lambda column: column.cast(pa.list_view(column.type.value_type)),
    "large_list": lambda column: column.cast(pa.large_list(column.type.value_type)),
    "fixed list": lambda column: column.cast(pa.list_(column.type.value_type, len(column[0]))),
    "list of text": lambda column: column.cast(pa.list_(pa.string())),
    "list of bool": lambda column: column.cast(pa.list_(pa.bool_())),
    "list of half": lambda column: column.cast(pa.list_(pa.float16())),
    "list with null": lambda column: pa.array([[None, *row[1:]] for row in column.to_pylist()], column.type),
    "list of nan": lambda column: pa.array([[float("nan"), *row[1:]] for row in column.to_pylist()], column.type),
    "shorter list": lambda column: pa.array([column.to_pylist()[0][1:], *column.to_pylist()[1:]], column.type),
    "nested": lambda column: pa.array([[[[row]]] for row in column.to_pylist()]),
    "struct": lambda column: pa.array([{"a": row} for row in column.to_pylist()]),
    "deep": lambda column: pa.array([_deep(row, 60) for row in column.to_pylist()]),
    "map": lambda column: pa.array([[("a", 1)]] * len(column), pa.map_(pa.string(), pa.int64())),
    "json text": lambda column: pa.array([json.dumps(row, default=str) for row in column.to_pylist()]),
    "bad utf-8": lambda column: pa.Array.from_buffers(
        pa.string(), len(column), pa.array([b"\xff\xfe"] * len(column), pa.binary()).buffers()
    ),
}
"""Ways to spell a column with another type; those that do not fit its values are passed over."""


def _deep(value: Any, levels: int) -> Any:
    return [_deep(value, levels - 1)] if levels else value


def _parquet(rows: list[Any], rng: Random) -> Change:
    rows = [row for row in rows if isinstance(row, dict)]
    table, done = _table(rows), []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        if not table.num_columns:
            break
        place = rng.randrange(table.num_columns)
        change = rng.choice(list(COLUMN_CHANGES))
        try:
            column = COLUMN_CHANGES[change](table.column(place).combine_chunks())
            table = table.set_column(place, table.column_names[place], column)
        except (pa.ArrowException, TypeError, ValueError, AttributeError, IndexError, KeyError, OverflowError):
            continue
        done.append(f"{table.column_names[place]} as {change}")
    if table.num_columns and rng.random() < 0.05:
        table = table.append_column(table.column_names[0], table.column(0))
        done.append("the first column stands twice")
    options = {"row_group_size": rng.choice((1, 3, 1000)), "compression": rng.choice(("zstd", "snappy", "none"))}
    try:
        return _parquet_bytes(table, **options), "; ".join(done)
    except (pa.ArrowException, ValueError, OSError):
        return _parquet_bytes(_table(rows)), "; ".join(done)


def _table(rows: list[dict]) -> pa.Table:
    """The rows as far as Arrow takes them; a column of mixed values becomes JSON text."""
    columns = {}
    for name in dict.fromkeys(str(key) for row in rows for key in row):
        values = [str(v) if isinstance(v, _Raw) else v for v in (row.get(name) for row in rows)]
        try:
            column = pa.array(values)
            if "struct<>" in str(column.type):
                raise TypeError("Parquet holds no empty objects")
            columns[name.encode("utf-8", "replace").decode()] = column
        except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
            columns[name.encode("utf-8", "replace").decode()] = pa.array([json.dumps(v, default=str) for v in values])
    return pa.table(columns)


def _parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


# Faults of bytes.


def _flipped(data: bytes, rng: Random) -> Change:
    changed = bytearray(data)
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 4, 16)))] if data else []
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), f"bits flipped at {places[:4]}"


def _end_flipped(data: bytes, rng: Random) -> Change:
    """In the footer of Parquet."""
    start = len(data) // 2
    changed, what = _flipped(data[start:], rng)
    return data[:start] + changed, f"in the second half, {what}"


def _cut(data: bytes, rng: Random) -> Change:
    size = rng.randrange(len(data) + 1)
    return data[:size], f"cut to {size} of {len(data)} bytes"


def _zeroed(data: bytes, rng: Random) -> Change:
    start = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 8, 64)), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :], f"{size} bytes zeroed at {start}"


def _random_bytes(data: bytes, rng: Random) -> Change:
    start = rng.randrange(len(data) + 1)
    more = rng.randbytes(rng.choice((1, 4, 32)))
    return data[:start] + more + data[start + rng.choice((0, len(more))) :], f"{len(more)} random bytes at {start}"


def _doubled(data: bytes, rng: Random) -> Change:
    return data * 2, "the file stands twice"


_BYTES: tuple[Callable[[bytes, Random], Change], ...] = (
    _flipped, _flipped, _end_flipped, _cut, _zeroed, _random_bytes, _doubled
)  # fmt: skip
