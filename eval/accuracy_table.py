"""The table of accuracies in a run folder: what `eval.accuracy` writes, and plots read."""

from __future__ import annotations

import json

import pyarrow as pa

from eval.run_table import RunTable
from ovq.config import Config

TABLE = RunTable(
    "accuracy.parquet",
    pa.schema(
        [
            ("run", pa.string()),
            ("step", pa.int64()),
            ("task", pa.string()),
            ("settings", pa.string()),  # of the task in this test, JSON
            ("num_centroids", pa.int64()),  # eval.num_centroids; null: as trained
            ("changes", pa.string()),  # other settings that differ from the run's
            ("length", pa.int64()),  # tokens of a sequence
            ("index", pa.int64()),  # null: all answers
            ("accuracy", pa.float64()),  # 0 to 1
            ("answers", pa.int64()),
            ("sequences", pa.int64()),
            ("standard_error", pa.float64()),  # over sequences; null: only one, or of an index
            ("model", pa.string()),
            ("state_numbers", pa.int64()),  # elements of one sequence's state at this length
            ("state_bytes", pa.int64()),  # and its bytes, at the precision of this evaluation
            ("train_context", pa.int64()),
        ]
    ),
    ("step", "settings", "num_centroids", "changes", "length"),
    "accuracy",
)


def task_settings(cfg: Config) -> str:
    """The settings of a config's task in JSON, as the table stores them."""
    return json.dumps({name: value for name, value in cfg.data.task.items() if name != "_target_"}, sort_keys=True)
