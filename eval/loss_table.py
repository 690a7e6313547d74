"""A run folder's tables of loss by position, for every evaluation.

per_position_loss.parquet: the mean over documents, one row per bucket.
loss_by_document.parquet: the loss of each document, in logarithmic buckets. Two runs that were tested on the same
documents can be compared document by document, so that differences between documents cancel.
"""

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
        ("position_start", pa.int64()),  # the prediction at position 0 has seen only the separator
        ("position_end", pa.int64()),  # exclusive
        ("loss", pa.float64()),  # nats per token
        ("stderr", pa.float64()),  # over documents; null if there is only one
        ("tokens", pa.int64()),
        ("buckets", pa.string()),  # "log" or "linear"; each set partitions the context
        ("num_centroids", pa.int64()),  # eval.num_centroids; null: as trained
        ("split", pa.string()),
        ("changes", pa.string()),  # overrides of the model, its numerics or the text; empty: the run's own
    ]
)
# Rows of one evaluation share these columns; repeating an evaluation replaces its earlier rows.
KEY = ("step", "context", "num_centroids", "split", "changes")

TABLE = RunTable(FILE, SCHEMA, KEY, "loss by position")
read, write, key_of = TABLE.read, TABLE.write, TABLE.key_of

BY_DOCUMENT = RunTable(
    "loss_by_document.parquet",
    pa.schema(
        [
            ("step", pa.int64()),
            ("context", pa.int64()),
            ("num_centroids", pa.int64()),  # as above
            ("split", pa.string()),
            ("restart", pa.int64()),  # eval.restart; null: all of the context is seen
            ("changes", pa.string()),  # as above
            ("asked", pa.int64()),  # eval.documents; the split may have fewer that are long enough
            ("document", pa.int64()),  # index among those that are long enough, in the order of the split
            ("position_start", pa.int64()),
            ("position_end", pa.int64()),  # exclusive
            ("loss", pa.float64()),  # nats per token
        ]
    ),
    ("step", "context", "num_centroids", "split", "restart", "changes"),
    "loss by document and position",
)


def documents_of(row: Row) -> int:
    """The number of documents that a bucket averages over."""
    return row["tokens"] // (row["position_end"] - row["position_start"])
