"""Tokenizers that give back every text exactly: raw bytes, and SentencePiece unigram models trained for it.

    python -m data.tokenizer train data=parquet 'data.train=[books/*.parquet]' vocab_size=16384 out=books-16k.model

One id separates documents (`separator_id`, also called bos and eos): it is fed before a document's first token and
predicted after its last. Every id stands for a fixed byte string, so bytes (for bits per byte) are counted by a table
look-up and decoding is concatenation.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ovq.config import Config, ConfigError, TokenizerConfig, compose
from ovq.files import write_whole

if TYPE_CHECKING:
    from data.recall import RecallTokenizer

_SPACE = "\u2581"  # how SentencePiece spells a space
_PROBE = " a\n\n\tb  c\r\n\u2581 \u00e9\u0301\ufb01 \U0001f9ea\u3000\x00 "
_LINE_LIMIT = 4000  # bytes of a line fed to training; SentencePiece drops longer ones


class Tokenizer(Protocol):
    """Text to ids and back without loss."""

    vocab_size: int
    separator_id: int
    fingerprint: str

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, uint16 (uint32 from 65,536 ids on), without separators."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of ids; separators give nothing, a cut character gives U+FFFD."""
        ...

    def num_bytes(self, ids: Any) -> int:
        """UTF-8 bytes that ids stand for; negative ids (ignored labels) and separators count nothing."""
        ...

    def save(self, folder: Path | str) -> None:
        """Write what `build_tokenizer(..., run_dir)` needs to make this tokenizer again."""
        ...


class _TableTokenizer:
    """What both kinds share once every id has its byte string."""

    def __init__(self, pieces: list[bytes], separator_id: int, fingerprint: str) -> None:
        self.vocab_size, self.separator_id, self.fingerprint = len(pieces), separator_id, fingerprint
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._pieces = pieces
        self._lengths = np.array([len(piece) for piece in pieces], np.int64)

    @property
    def bos_id(self) -> int:
        return self.separator_id

    @property
    def eos_id(self) -> int:
        return self.separator_id

    def decode(self, ids: Any) -> str:
        pieces = self._pieces
        return b"".join([pieces[i] for i in np.asarray(ids).ravel().tolist()]).decode("utf-8", "replace")

    def num_bytes(self, ids: Any) -> int:
        ids = np.asarray(ids).ravel()
        return int(self._lengths[ids[ids >= 0]].sum())

    def _save(self, folder: Path | str, kind: str) -> None:
        card = {"kind": kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        write_whole(Path(folder) / "tokenizer.json", json.dumps(card, indent=1).encode())


class ByteTokenizer(_TableTokenizer):
    """One id a byte, 256 is the separator. Needs no model."""

    def __init__(self) -> None:
        super().__init__([bytes([b]) for b in range(256)] + [b""], 256, "byte:1")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def save(self, folder: Path | str) -> None:
        self._save(folder, "byte")


class SentencePieceTokenizer(_TableTokenizer):
    """A lossless SentencePiece model (identity normalisation, byte fallback).

    Raises:
        ConfigError: the model changes text (normalises, adds a leading space) or has no bos/eos to separate documents.
    """

    def __init__(self, model: bytes, origin: str = "model") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = processor = SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise ConfigError(f"tokenizer.model_path={origin} is no SentencePiece model: {error}") from None
        self._model = model
        separator = processor.bos_id() if processor.bos_id() >= 0 else processor.eos_id()
        if separator < 0:
            raise ConfigError(f"tokenizer.model_path={origin} has neither bos nor eos to separate documents")
        pieces = [self._bytes_of(i) for i in range(processor.get_piece_size())]
        super().__init__(pieces, separator, f"sentencepiece:{hashlib.sha256(model).hexdigest()}")
        byte_ids = {pieces[i]: i for i in range(len(pieces)) if processor.is_byte(i)}
        if len(byte_ids) < 256:
            raise ConfigError(f"tokenizer.model_path={origin} lacks byte fallback and would lose rare characters")
        self._space_bytes = [byte_ids[bytes([b])] for b in _SPACE.encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError(
                f"tokenizer.model_path={origin} changes text, so bytes and words could not be counted; "
                "train a lossless one with: python -m data.tokenizer train"
            )

    def _bytes_of(self, i: int) -> bytes:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i):
            return b""
        piece = processor.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        # The library reads U+2581 as a space; in the text itself it stands for itself, spelled in bytes.
        parts = [self._processor.encode(part) for part in text.split(_SPACE)]
        ids = parts[0]
        for part in parts[1:]:
            ids += self._space_bytes + part
        return np.array(ids, self.dtype)

    def save(self, folder: Path | str) -> None:
        write_whole(Path(folder) / "tokenizer.model", self._model)
        self._save(folder, "sentencepiece")


def build_tokenizer(
    cfg: Config | TokenizerConfig, run_dir: Path | str | None = None
) -> ByteTokenizer | SentencePieceTokenizer | RecallTokenizer:
    """The tokenizer of a run's config; the run's own stored copy if it has one and the model file is gone.

    A generated task (data=recall) has symbols of its own. The tokenizer part of a config alone always means text.

    Raises:
        ConfigError: no model file, or the run was made with another tokenizer.
    """
    whole: Any = cfg
    if "data" in whole:
        if whole.data.kind == "recall":
            from data import recall

            return recall.RecallTokenizer(recall.task_of(whole))
        whole = whole.tokenizer
    return _text_tokenizer(whole, run_dir)


def _text_tokenizer(cfg: TokenizerConfig, run_dir: Path | str | None) -> ByteTokenizer | SentencePieceTokenizer:
    folder = Path(run_dir) / "tokenizer" if run_dir else None
    card = (
        json.loads((folder / "tokenizer.json").read_text()) if folder and (folder / "tokenizer.json").exists() else None
    )
    stored = folder / "tokenizer.model" if folder else None
    tokenizer: ByteTokenizer | SentencePieceTokenizer
    if cfg.kind == "byte":
        tokenizer = ByteTokenizer()
    elif cfg.model_path and Path(cfg.model_path).expanduser().is_file():
        tokenizer = SentencePieceTokenizer(Path(cfg.model_path).expanduser().read_bytes(), cfg.model_path)
    elif stored and stored.is_file():
        tokenizer = SentencePieceTokenizer(stored.read_bytes(), str(stored))
    else:
        raise ConfigError(
            f"tokenizer.model_path={cfg.model_path} does not exist; make one: python -m data.tokenizer train"
        )
    if card and card["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer differs from the one this run was made with ({folder}): "
            f"{tokenizer.fingerprint[:30]} is not {card['fingerprint'][:30]}"
        )
    return tokenizer


def train_sentencepiece(
    lines: Iterator[str], vocab_size: int, out: Path | str, seed: int = 0
) -> SentencePieceTokenizer:
    """Train a lossless unigram model on lines (without line ends, which become a piece of their own) and write it.

    Raises:
        ConfigError: the text is too small for the vocabulary.
    """
    import io

    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            bos_piece="<document>",
            eos_id=-1,
            pad_id=-1,
            character_coverage=0.9999,
            max_sentence_length=_LINE_LIMIT + 200,
            num_threads=os.cpu_count() or 1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ConfigError(f"vocab_size={vocab_size} cannot be trained: {' '.join(str(error).split())}") from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(out))
    write_whole(Path(out), model.getvalue())
    return tokenizer


def sample_lines(corpus: Any, num_bytes: int, seed: int) -> Iterator[str]:
    """Lines of about `num_bytes` of text in all, one stretch of each of a seeded choice of documents."""
    from data.lanes import permute

    share = max(1 << 14, num_bytes // max(1, len(corpus)))
    order = np.array([permute(i, len(corpus), seed) for i in range(len(corpus))], np.int64)
    taken = np.minimum(corpus.sizes()[order], share)
    before = np.cumsum(taken) - taken
    left = num_bytes
    # In file order, which is the fast one; should sizes have been overestimated, the rest follows.
    for index in [*sorted(order[before < num_bytes]), *order[before >= num_bytes]]:
        if left <= 0:
            return
        text = corpus.read(int(index)).text
        # A stretch from the middle of a book is more typical than its title page.
        start = max(0, (len(text) - share) // 2)
        stretch = text[start : start + min(share, left)]
        left -= len(stretch.encode())
        for line in stretch.split("\n"):
            for cut in range(0, len(line), _LINE_LIMIT // 4):
                yield line[cut : cut + _LINE_LIMIT // 4]


def main(argv: list[str]) -> int:
    """`train`: see the module's docstring. Exit status: 0 trained, 1 the data failed, 2 a setting is wrong."""
    from data.sources import DataError
    from data.splits import build_corpus, split_arguments

    usage = "usage: python -m data.tokenizer train data=... out=PATH [vocab_size=16384] [sample_mb=30] [key=value ...]"
    if not argv or argv[0] != "train":
        print(usage, file=sys.stderr)
        return 2
    try:
        own, overrides = split_arguments(argv[1:], {"vocab_size": 16384, "sample_mb": 30, "out": None})
        if not own["out"]:
            raise ConfigError("out=PATH is required: where to write the model")
        cfg = compose([*overrides, "tokenizer=byte"])
        corpus = build_corpus(cfg, "train")
        tokenizer = train_sentencepiece(
            sample_lines(corpus, own["sample_mb"] << 20, cfg.seed), own["vocab_size"], own["out"], cfg.seed
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = corpus.read(0).text[: 1 << 20]
    ids = tokenizer.encode(text)
    print(f"{own['out']}: {tokenizer.vocab_size} pieces, {len(text.encode()) / max(1, len(ids)):.2f} bytes a token")
    print(f"use it with: tokenizer=sentencepiece tokenizer.model_path={own['out']}   ({tokenizer.fingerprint})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
