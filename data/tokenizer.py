"""Lossless tokenizers: raw bytes, and SentencePiece models trained to be lossless (`data.train_tokenizer`).

Those of the Hugging Face Hub are in `data.hf_tokenizer`.

One id separates documents (`separator_id`, also called bos and eos): it is the input before a document's first token
and the label after its last. Every id represents a fixed byte string, so bytes (for bits per byte) are counted by table
look-up and decoding is concatenation.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ovq.errors import ConfigError
from ovq.files import write_whole

_SPACE = "\u2581"  # how SentencePiece writes a space
PROBE = " a\n\n\tb  c\r\n\u2581 \u00e9\u0301\ufb01 \U0001f9ea\u3000\x00 "


class Tokenizer(Protocol):
    """Converts text to ids and back without loss."""

    vocab_size: int
    separator_id: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text without separators, uint16 (uint32 if the vocabulary exceeds 65,536 ids)."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of ids. Separators decode to nothing, an incomplete character to U+FFFD."""
        ...

    def num_bytes(self, ids: Any) -> int:
        """UTF-8 bytes that ids represent. Negative ids (ignored labels) and separators count as 0."""
        ...

    def save(self, folder: Path | str) -> None:
        """Write what `data.build.build_tokenizer(..., run_dir)` needs to restore this tokenizer."""
        ...


class TableTokenizer:
    """What all kinds of tokenizers share, given the byte string of every id."""

    def __init__(self, pieces: list[bytes], separator_id: int, fingerprint: str) -> None:
        self.vocab_size, self.separator_id, self.fingerprint = len(pieces), separator_id, fingerprint
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._pieces = pieces
        self._lengths = np.array([len(piece) for piece in pieces], np.int64)

    def decode(self, ids: Any) -> str:
        pieces = self._pieces
        return b"".join([pieces[i] for i in np.asarray(ids).ravel().tolist()]).decode("utf-8", "replace")

    def num_bytes(self, ids: Any) -> int:
        ids = np.asarray(ids).ravel()
        return int(self._lengths[ids[ids >= 0]].sum())

    def _save(self, folder: Path | str, kind: str) -> None:
        card = {"kind": kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        write_whole(Path(folder) / "tokenizer.json", json.dumps(card, indent=1).encode())


class ByteTokenizer(TableTokenizer):
    """One id per byte; 256 is the separator. Needs no model."""

    def __init__(self) -> None:
        super().__init__([bytes([b]) for b in range(256)] + [b""], 256, "byte:1")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def save(self, folder: Path | str) -> None:
        self._save(folder, "byte")


class SentencePieceTokenizer(TableTokenizer):
    """A lossless SentencePiece model (identity normalisation, byte fallback).

    Raises:
        ConfigError: the model changes text (normalises, adds a leading space) or has no bos/eos to separate documents.
    """

    def __init__(self, model: bytes, origin: str = "model") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = processor = SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise ConfigError(f"tokenizer.model_path={origin} is not a SentencePiece model: {error}") from None
        self.model = model
        separator = processor.bos_id() if processor.bos_id() >= 0 else processor.eos_id()
        if separator < 0:
            raise ConfigError(f"tokenizer.model_path={origin} has neither bos nor eos to separate documents")
        pieces = [self._bytes_of(i) for i in range(processor.get_piece_size())]
        super().__init__(pieces, separator, f"sentencepiece:{hashlib.sha256(model).hexdigest()}")
        byte_ids = {pieces[i]: i for i in range(len(pieces)) if processor.is_byte(i)}
        if len(byte_ids) < 256:
            raise ConfigError(f"tokenizer.model_path={origin} lacks byte fallback and would lose rare characters")
        self._space_bytes = [byte_ids[bytes([b])] for b in _SPACE.encode()]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ConfigError(
                f"tokenizer.model_path={origin} changes text, so bytes and words could not be counted; "
                "train a lossless one with: python -m data.train_tokenizer"
            )

    def _bytes_of(self, i: int) -> bytes:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        # SentencePiece would take U+2581 for a space, so a U+2581 in the text is encoded as bytes.
        parts = [self._processor.encode(part) for part in text.split(_SPACE)]
        ids = parts[0]
        for part in parts[1:]:
            ids += self._space_bytes + part
        return np.array(ids, self.dtype)

    def save(self, folder: Path | str) -> None:
        write_whole(Path(folder) / "tokenizer.model", self.model)
        self._save(folder, "sentencepiece")
