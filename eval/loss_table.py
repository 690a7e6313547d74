"""A run folder's per_position_loss.parquet: loss by position for every evaluation, one row per bucket."""

from __future__ import annotations

import pyarrow as pa

from eval.run_table import Row as Row
from eval.run_table import RunTable

FILE = "per_position_loss.parquet"
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("context", pa.int64()),
        ("position_start", pa.int64()),  # position 0 has seen only the separator
        ("position_end", pa.int64()),  # exclusive
        ("loss", pa.float64()),  # nats per token
        ("stderr", pa.float64()),  # over documents; null if there is only one
        ("tokens", pa.int64()),
        ("buckets", pa.string()),  # "log" or "linear"; each set partitions the context
        ("num_centroids", pa.int64()),  # eval.num_centroids; null: as trained
        ("split", pa.string()),
    ]
)
# Rows of one evaluation share these columns; repeating an evaluation replaces its earlier rows.
KEY = ("step", "context", "num_centroids", "split")

TABLE = RunTable(FILE, SCHEMA, KEY, "loss by position")
read, write, key_of = TABLE.read, TABLE.write, TABLE.key_of
