"""Columns as other writers make them read to the values that plain columns have, by batch, by row and by place."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore import read_problems
from gradstore.parquet import plain_table, plain_type
from gradstore.reading.parquet_rows import ParquetRows

VIEW = pa.string_view()
LONG = "a text that no view keeps in its own sixteen bytes"
MESSAGE = pa.struct([("role", VIEW), ("content", VIEW)])
MESSAGES = [{"role": "user", "content": LONG}, {"role": "assistant", "content": None}]
COLUMNS: dict[str, pa.Array] = {
    "string_view": pa.array(["a", LONG, None], VIEW),
    "binary_view": pa.array([b"a", LONG.encode(), None], pa.binary_view()),
    "list of views": pa.array([["a", LONG], [], None], pa.list_(VIEW)),
    "large list of views": pa.array([["a", LONG], [], None], pa.large_list(VIEW)),
    "fixed list of views": pa.array([["a", LONG], ["b", "c"], None], pa.list_(VIEW, 2)),
    "struct of views": pa.array([MESSAGES[0], None, MESSAGES[1]], MESSAGE),
    "messages of views": pa.array([MESSAGES, None, []], pa.list_(MESSAGE)),
    "map of views": pa.array([[("a", LONG)], [], None], pa.map_(VIEW, VIEW)),
    "list_view": pa.array([[1, 2], [], None], pa.list_view(pa.int64())),
    "large_list_view": pa.array([[1.5, 2], [], None], pa.large_list_view(pa.float32())),
    "list_view of views": pa.array([["a", LONG], [], None], pa.list_view(VIEW)),
    "dictionary": pa.array(["a", LONG, None]).dictionary_encode(),
    "dictionary in lists": pa.ListArray.from_arrays([0, 1, 2, 2], pa.array(["a", LONG]).dictionary_encode()),
    "large_string": pa.array(["a", LONG, None], pa.large_string()),
    "run-end encoded": pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", None])),
    "plain": pa.array([[1, 2], [], None], pa.list_(pa.int32())),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_plain_column_has_the_same_values(name: str) -> None:
    """And rows of it can be taken in any order, which Arrow does not offer for every type."""
    table = pa.table({"x": COLUMNS[name]})
    plain = plain_table(table)
    plain.validate(full=True)
    assert plain["x"].to_pylist() == table["x"].to_pylist()
    assert plain.take(pa.array([2, 0]))["x"].to_pylist() == [table["x"].to_pylist()[j] for j in (2, 0)]
    assert plain_type(plain["x"].type) == plain["x"].type
    if name == "plain":
        assert plain is table


ROWS = [
    {"id": f"p{j}", "prompt": f"{LONG} {j}", "ground_truth": str(j), "tags": ["t", LONG][: j % 3]} for j in range(5)
]


def test_problems_and_rows_of_views(tmp_path: Path) -> None:
    """Read from start to end, and row by row in another order."""
    path = tmp_path / "views.parquet"
    texts = dict.fromkeys(("id", "prompt", "ground_truth"), VIEW) | {"tags": pa.list_(VIEW)}
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(pa.table([table[name].cast(kind) for name, kind in texts.items()], list(texts)), path)
    assert pq.read_schema(path).field("prompt").type == VIEW
    assert read_problems(path) == [row | {"source": "", "extra": {}} for row in ROWS]
    file = ParquetRows(path, ["id", "prompt", "tags"])
    scanned = [row.value for row in file.scan()]
    assert scanned == [{name: row[name] for name in ("id", "prompt", "tags")} for row in ROWS]
    assert file.fetch([3, 0, 4], [0, 0, 0]) == [scanned[j] for j in (3, 0, 4)]
