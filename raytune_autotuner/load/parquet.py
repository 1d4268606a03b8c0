"""Request records as a Parquet file: one row a request, from which every figure can be computed again.

`pandas.read_parquet(path)` reads it too; the columns are the fields of `RequestRecord`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_autotuner.score.records import RequestRecord

SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("level", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("scheduled_s", pa.float64(), nullable=False),
        pa.field("sent_s", pa.float64(), nullable=False),
        pa.field("first_token_s", pa.float64()),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("token_times_s", pa.list_(pa.float64()), nullable=False),
        pa.field("tokens_in", pa.int64()),
        pa.field("tokens_out", pa.int64()),
        pa.field("tokens_out_wanted", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
_COLUMNS = tuple(field.name for field in fields(RequestRecord))


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """Write `records` to `path`; see `replace_table`."""
    rows = list(records)
    columns = {name: [getattr(record, name) for record in rows] for name in _COLUMNS}
    replace_table(path, pa.Table.from_pydict(columns, schema=SCHEMA))


def replace_table(path: Path, table: pa.Table) -> None:
    """Write `table` to `path`; a file that stands there is replaced as a whole, never left half written."""
    partial = path.with_name(f"{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


def read_records(path: Path) -> list[RequestRecord]:
    """The records of a file written by `write_records`."""
    rows = pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    return [RequestRecord(**{**row, "token_times_s": tuple(row["token_times_s"])}) for row in rows]
