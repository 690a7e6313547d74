"""A run's tokenizer as transformers' `PreTrainedTokenizerFast`: the same ids, but for what the model card states.

The byte tokenizer becomes a BPE model without merges; SentencePiece's unigram and BPE models become those of the
`tokenizers` library; a tokenizer.json stays what it is, with the exceptions that `data.hf_tokenizer` lists. As in this
project's own tools, a text begins with the separator (bos); `add_special_tokens=False` leaves it out.
"""

from __future__ import annotations

import importlib
from typing import Any

from ovq.errors import ConfigError

SEPARATOR = "<document>"  # of the byte tokenizer; a SentencePiece model has its own
SPACE = "\u2581"


def byte_tokenizer() -> Any:
    """One token per byte, 256 for the separator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in byte_characters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, SEPARATOR, 256)


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def sentencepiece_tokenizer(model: bytes) -> Any:
    """The pieces of a lossless SentencePiece model, unigram or BPE.

    Raises:
        ConfigError: a model of another type.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = pb.ModelProto.FromString(model)
    kinds = pb.ModelProto.SentencePiece
    pieces, spec = list(proto.pieces), proto.trainer_spec
    if spec.model_type == pb.TrainerSpec.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=True))
    elif spec.model_type == pb.TrainerSpec.BPE:
        from transformers.convert_slow_tokenizer import generate_merges

        vocab = {piece.piece: i for i, piece in enumerate(pieces)}
        ranks = {piece.piece: piece.score for piece in pieces if piece.type == kinds.NORMAL}
        unknown = pieces[spec.unk_id].piece
        # A user-defined piece is split off before any merge, so no merge may produce it.
        merges = [pair for pair in generate_merges(vocab, ranks) if "".join(pair) in ranks]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    else:
        raise ConfigError("only unigram and BPE models of SentencePiece can be exported")
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # Text that looks like the name of a byte or of a special piece stays ordinary text.
    names = "|".join(["0x[0-9A-F]{2}", *(piece.piece[1:-1] for piece in pieces if piece.type == kinds.UNKNOWN)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"<(?=(?:{names})>)"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    own = [piece.piece for piece in pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece.replace(SPACE, " "), normalized=False, special=False) for piece in own])
    separator = spec.bos_id if spec.bos_id >= 0 else spec.eos_id
    return wrapped(tokenizer, pieces[separator].piece, separator)


def hf_tokenizer(model: str, separator: str, separator_id: int) -> Any:
    """The contents of a tokenizer.json that gives the run's ids."""
    from tokenizers import Tokenizer

    return wrapped(Tokenizer.from_str(model), separator, separator_id)


def wrapped(tokenizer: Any, separator: str, separator_id: int) -> Any:
    """The tokenizer, with its separator added, wrapped in transformers' class."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(separator, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{separator} $A", pair=f"{separator} $A {separator} $B", special_tokens=[(separator, separator_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=separator,
        eos_token=separator,
        pad_token=separator,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
