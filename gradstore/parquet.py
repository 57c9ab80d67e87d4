"""Conversion of Parquet columns from any writer to the plain Arrow types that every kernel supports.

Polars, Delta Lake and pandas write views (string_view, list_view), dictionaries and run-end encoded columns. Arrow
reads them, but `take` does not support all of them. They hold the same values as plain columns, so they are cast once,
on reading.
"""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def table_bytes(table: "pa.Table", *, compression: str = "zstd", **options: Any) -> bytes:
    """A Parquet file as bytes, compressed. options: of `pyarrow.parquet.write_table`."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=compression, **options)
    return buffer.getvalue()


def no_rows(schema: "pa.Schema") -> "pa.Table":
    """A table without rows. (`Schema.empty_table` loads pandas, a fifth of a second.)"""
    import pyarrow as pa

    return pa.Table.from_batches([], schema)


def plain_table(table: "pa.Table") -> "pa.Table":
    """Cast every column to its plain type (see `plain_type`); returns the same table if all are plain."""
    import pyarrow as pa

    schema = pa.schema([field.with_type(plain_type(field.type)) for field in table.schema])
    if schema.equals(table.schema):
        return table
    columns = []
    for field, column in zip(schema, table.columns, strict=True):
        if "list_view" in str(column.type) or "run_end_encoded" in str(column.type):
            # Arrow cannot cast run-ends, and gives null list views offsets that decrease (seen with pyarrow 26).
            columns.append(pa.array(column.to_pylist(), field.type))
        else:
            columns.append(column.cast(field.type))
    return pa.table(columns, schema=schema)


def plain_type(kind: "pa.DataType") -> "pa.DataType":
    """The plain type with the same values, without views, dictionaries and run-ends, also inside lists and structs.

    Converted texts, bytes and lists get 64-bit offsets: a column of views may hold more than two gigabytes.
    """
    import pyarrow.types as is_
    from pyarrow import BaseExtensionType, field, large_binary, large_list, large_string, list_, map_, struct

    if isinstance(kind, BaseExtensionType):
        return plain_type(kind.storage_type)
    if is_.is_dictionary(kind) or is_.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if is_.is_string_view(kind):
        return large_string()
    if is_.is_binary_view(kind):
        return large_binary()
    if is_.is_struct(kind):
        return struct([field(part.name, plain_type(part.type), part.nullable) for part in kind])
    if is_.is_map(kind):
        return map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if is_.is_list_view(kind) or is_.is_large_list_view(kind) or is_.is_large_list(kind):
        return large_list(kind.value_field.with_type(plain_type(kind.value_type)))
    if is_.is_list(kind):
        return list_(kind.value_field.with_type(plain_type(kind.value_type)))
    if is_.is_fixed_size_list(kind):
        return list_(kind.value_field.with_type(plain_type(kind.value_type)), kind.list_size)
    return kind
