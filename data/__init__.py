"""Text into batches: files, tokenizers, the order of tokens, and loaders that resume exactly.

Names are imported on first use: describing a data set must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.loader import Batch, Loader, build_loader, merge_states
    from data.sources import DataError
    from data.splits import Document, describe, heldout_documents
    from data.tokenizer import Tokenizer, build_tokenizer

_HOME = {
    "Batch": "loader",
    "Loader": "loader",
    "build_loader": "loader",
    "merge_states": "loader",
    "DataError": "sources",
    "Document": "splits",
    "describe": "splits",
    "heldout_documents": "splits",
    "Tokenizer": "tokenizer",
    "build_tokenizer": "tokenizer",
}
__all__ = [
    "Batch",
    "DataError",
    "Document",
    "Loader",
    "Tokenizer",
    "build_loader",
    "build_tokenizer",
    "describe",
    "heldout_documents",
    "merge_states",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute '{name}'")
    return getattr(import_module(f"data.{_HOME[name]}"), name)
