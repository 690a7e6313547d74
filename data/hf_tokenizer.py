"""Tokenizers of the Hugging Face Hub: any lossless tokenizer.json, read with the `tokenizers` package.

    tokenizer=hf tokenizer.model_path=FILE | FOLDER | hf://OWNER/NAME[@REVISION]

Ids are those of `tokenizers`, with four exceptions, so that every id stands for a fixed byte string and every text is
restored exactly: no tokens are added to a text or cut off; no space is added before its first word (as with
`add_prefix_space=False`); no Unicode normalization is applied (nearly all text is in NFC already); and a special token
spelled out in a text is treated as text. A tokenizer that changes text in any other way is refused.

The separator of documents is `tokenizer.separator`; by default the end-of-text token that tokenizer_config.json names
(eos_token, else bos_token), or, without that file, the file's only special token, or the first of END_OF_TEXT.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import PROBE, TableTokenizer
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole

HUB = "hf://"
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<document>", "<s>")
_RESTORED = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}  # kinds of decoders

_NOT_APPLIED = ("Prepend", "NFC", "NFD", "NFKC", "NFKD")  # normalizers
_BYTE = re.compile("<0x[0-9A-F]{2}>")

Spec = dict[str, Any]  # a tokenizer.json


class HFTokenizer(TableTokenizer):
    """A lossless tokenizer.json.

    Args:
        model: contents of the file.
        separator: the token that separates documents.
        origin: where the file comes from, for messages.

    Attributes:
        model, separator: as given.

    Raises:
        ConfigError: the file is not a tokenizer.json, lacks the separator, or its tokenizer changes text.
    """

    def __init__(self, model: bytes, separator: str, origin: str = "model") -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        from tokenizers import Tokenizer as Processor

        self.model, self.separator, self._origin = model, separator, origin
        spec = parse(model, origin)
        try:
            decoders = _parts(spec.get("decoder"))
            _keep_text(spec)
            lossy = sorted({part["type"] for part in decoders if not _restores(part)} | _removed(spec, decoders))
            self._processor = Processor.from_str(json.dumps(spec))
        except Exception as error:  # the package raises a bare Exception
            raise ConfigError(f"tokenizer.model_path={origin} is not a tokenizer.json: {one_line(error)}") from None
        if lossy:
            raise ConfigError(
                f"tokenizer.model_path={origin} cannot restore text exactly ({', '.join(lossy)}), so bytes could not "
                "be counted; use a byte-level tokenizer, or one with byte fallback"
            )
        self._processor.encode_special_tokens = True
        added = [token["content"] for token in spec["added_tokens"]]
        special = [token["content"] for token in spec["added_tokens"] if token["special"]]
        if separator not in added:
            raise ConfigError(
                f"tokenizer.separator={separator} is not a token of {origin}; special tokens: {', '.join(special)}"
            )
        separator_id = self._processor.token_to_id(separator)
        assert separator_id is not None  # one of the added tokens
        pieces = self._pieces_of(decoders, {*special, separator})
        super().__init__(pieces, separator_id, f"hf:{hashlib.sha256(model).hexdigest()}:{separator_id}")
        self._make_lossless(added, decoders)

    def _pieces_of(self, decoders: list[Spec], special: set[str]) -> list[bytes]:
        """The byte string of every id; empty for special tokens and unused ids."""
        vocabulary: dict[str, int] = self._processor.get_vocab(with_added_tokens=True)
        learned = self._processor.get_vocab(with_added_tokens=False)
        bytes_of = _decoder(decoders)
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for piece, number in vocabulary.items():
            if piece not in special:
                pieces[number] = bytes_of(piece) if piece in learned else piece.encode()
        return pieces

    def _make_lossless(self, added: list[str], decoders: list[Spec]) -> None:
        """Find the strings that would not survive a round trip, so that they can be encoded byte by byte."""
        single = {piece: number for number, piece in reversed(list(enumerate(self._pieces))) if len(piece) == 1}
        if len(single) < 256:
            raise ConfigError(
                f"tokenizer.model_path={self._origin} has no byte fallback and would lose rare characters"
            )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        spaces = [part["pattern"]["String"] for part in decoders if part["type"] == "Replace"]
        spaces += [part["replacement"] for part in decoders if part["type"] == "Metaspace"]
        self._odd: dict[str, list[int]] = {}
        self._odd_pattern: re.Pattern[str] | None = None
        for text in [*added, *fallback, *spaces]:
            if self.decode(self.encode(text)) != text:
                self._odd[text] = [single[bytes([byte])] for byte in text.encode()]
        if self._odd:
            longest_first = sorted(self._odd, key=len, reverse=True)
            self._odd_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        for text in (PROBE, "The END isn't 12345 \u00c5ngstr\u00f6m,\n\n\n   done."):
            if self.decode(self.encode(text)) != text:
                raise ConfigError(
                    f"tokenizer.model_path={self._origin} changes text, so bytes and words could not be counted; use a "
                    "byte-level tokenizer, or train one with: python -m data.train_tokenizer"
                )

    def encode(self, text: str) -> np.ndarray:
        parts = self._odd_pattern.split(text) if self._odd_pattern else [text]
        if len(parts) == 1:
            return np.array(self._encode(text), self.dtype)
        ids: list[int] = []
        for index, part in enumerate(parts):  # parts at odd indices are the strings that the pattern found
            ids += self._odd[part] if index % 2 else self._encode(part)
        return np.array(ids, self.dtype)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def adapted(self) -> str:
        """A tokenizer.json with which other tools give this tokenizer's ids and texts, except where a text spells an
        added token, or a piece that stands for a byte or a space."""
        spec = json.loads(self._processor.to_str())
        # Without a space before its first word, a text has none there to take away.
        decoders = [part for part in _parts(spec["decoder"]) if part["type"] != "Strip"]
        for part in decoders:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
        spec["decoder"] = {"type": "Sequence", "decoders": decoders}
        return json.dumps(spec)

    def save(self, folder: Path | str) -> None:
        write_whole(Path(folder) / "tokenizer.model", self.model)
        write_whole(Path(folder) / SETTINGS, json.dumps({"eos_token": self.separator}).encode())
        self._save(folder, "hf")

    def __reduce__(self) -> Any:  # a pickled processor would forget `encode_special_tokens`
        return HFTokenizer, (self.model, self.separator, self._origin)


def load(path: str, separator: str | None = None) -> HFTokenizer:
    """The tokenizer at a path; see the module's docstring.

    Args:
        path: a tokenizer.json, a folder that holds one, or hf://OWNER/NAME[@REVISION].
        separator: the token that separates documents; None: chosen as described there.

    Raises:
        ConfigError: there is none, it cannot be read or is not lossless, or a separator must be named.
    """
    file, settings = _download(path) if path.startswith(HUB) else _find(path)
    try:
        model = file.read_bytes()
        named = json.loads(settings.read_bytes()) if settings and settings.is_file() else {}
    except (OSError, ValueError) as error:
        where = settings if isinstance(error, ValueError) else path
        raise ConfigError(f"tokenizer.model_path={where} cannot be read: {one_line(error)}") from None
    return HFTokenizer(model, separator or _separator_of(parse(model, path), named, path), path)


def parse(model: bytes, origin: str) -> Spec:
    """The contents of a tokenizer.json.

    Raises:
        ConfigError: it is not one.
    """
    try:
        spec = json.loads(model)
        if isinstance(spec["model"], dict) and isinstance(spec["added_tokens"], list):
            return spec
        wrong = "it has no model"
    except (ValueError, TypeError, KeyError) as error:
        wrong = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
    raise ConfigError(f"tokenizer.model_path={origin} is not a tokenizer.json: {wrong}")


def _find(path: str) -> tuple[Path, Path]:
    """The file at a local path, and tokenizer_config.json beside it, which may be missing."""
    file = Path(path).expanduser()
    if file.is_dir():
        folder, file = file, file / FILE
        if not file.is_file():
            raise ConfigError(f"tokenizer.model_path={path} has no {FILE}")
        if b'"kind": "hf"' in file.read_bytes()[:100]:  # one of our tokenizer/ folders, where that is only metadata
            file = folder / "tokenizer.model"
    elif not file.is_file():
        raise ConfigError(f"tokenizer.model_path={path} does not exist")
    return file, file.parent / SETTINGS


def _download(path: str) -> tuple[Path, Path | None]:
    """Like `_find`, but for a repository of the Hub, through its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = path.removeprefix(HUB).removesuffix(f"/{FILE}").partition("@")
    try:
        file = Path(hf_hub_download(repo, FILE, revision=revision or None))
        try:
            return file, Path(hf_hub_download(repo, SETTINGS, revision=revision or None))
        except EntryNotFoundError:
            return file, None
    except Exception as error:  # no network, no such repository, revision or file: the message quotes the cause
        raise ConfigError(
            f"tokenizer.model_path={path} cannot be fetched: {one_line(error)}; without a network, give the path of a "
            f"{FILE}"
        ) from None


def _separator_of(spec: Spec, named: dict[str, Any], origin: str) -> str:
    for key in ("eos_token", "bos_token"):
        token = named.get(key)
        if token:
            return token["content"] if isinstance(token, dict) else str(token)
    special = [token["content"] for token in spec["added_tokens"] if token["special"]]
    known = special if len(special) == 1 else [token for token in END_OF_TEXT if token in special]
    if not known:
        raise ConfigError(
            f"tokenizer.model_path={origin} does not say which token ends a text; set tokenizer.separator, to one of: "
            f"{', '.join(special) or 'none, it has no special tokens'}"
        )
    return known[0]


# --- the parts of a tokenizer.json -----------------------------------------------------------------------------------


def _parts(part: Spec | None) -> list[Spec]:
    """The components of a sequence, in order, nested ones included; or the one component given."""
    if part is None:
        return []
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part] if inner is None else [leaf for each in inner for leaf in _parts(each)]


def _restores(decoder: Spec) -> bool:
    """Whether this part of a decoder maps every piece to fixed bytes."""
    return decoder["type"] in _RESTORED and "Regex" not in decoder.get("pattern", {})


def _removed(spec: Spec, decoders: list[Spec]) -> set[str]:
    """The kinds of normalizers and pre-tokenizers that leave out or replace text which no decoder restores."""
    restored = {(part["content"], part["pattern"].get("String")) for part in decoders if part["type"] == "Replace"}
    replaced = [part for part in _parts(spec.get("normalizer")) if part["type"] == "Replace"]
    split = _parts(spec.get("pre_tokenizer"))
    return {part["type"] for part in replaced if (part["pattern"].get("String"), part["content"]) not in restored} | {
        part["type"] for part in split if part.get("behavior") == "Removed" or part["type"] == "CharDelimiterSplit"
    }


def _keep_text(spec: Spec) -> None:
    """Remove what would add to a text, truncate it, or make its tokens random."""
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    kept = [part for part in _parts(spec.get("normalizer")) if part["type"] not in _NOT_APPLIED]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(spec.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            part.pop("add_prefix_space", None)  # the former name
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        elif part["type"] == "Split" and part["invert"] and part["behavior"] == "Removed":
            part |= {"behavior": "Isolated", "invert": False}  # the same pieces, and what lies between them
    for token in spec["added_tokens"]:
        token |= {"lstrip": False, "rstrip": False}


def _decoder(decoders: list[Spec]) -> Callable[[str], bytes]:
    """A function that maps a piece of the vocabulary to the bytes that it stands for."""
    kinds = {part["type"] for part in decoders}
    replaced = [(part["replacement"], " ") for part in decoders if part["type"] == "Metaspace"]
    replaced += [(part["pattern"]["String"], part["content"]) for part in decoders if part["type"] == "Replace"]
    if "ByteLevel" in kinds:
        byte_of = _byte_alphabet()
        return lambda piece: bytes([byte_of[c] for c in piece]) if byte_of.keys() >= set(piece) else piece.encode()

    def decode(piece: str) -> bytes:
        if "ByteFallback" in kinds and _BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return decode


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE (GPT-2) writes bytes: as itself if printable, else as one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
