"""Train a lossless SentencePiece model, unigram or BPE, on the training text of a data set or a mixture.

python -m data.train_tokenizer data=parquet 'data.train=[books/*.parquet]' vocab_size=16384 out=books-16k.model
python -m data.train_tokenizer data=pg19 model_type=bpe out=pg19-16k-bpe.model
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.build import build_corpus, named, shares_of, sources_of
from data.corpus import Corpus
from data.order import permute
from data.tokenizer import SentencePieceTokenizer
from ovq.cli import command
from ovq.compose import compose
from ovq.errors import ConfigError, one_line
from ovq.files import write_whole
from ovq.schema import REQUIRED, one_of, setting

MODEL_TYPES = ("unigram", "bpe")
_LINE_LIMIT = 4000  # bytes of a line used for training; SentencePiece drops longer lines


@dataclass
class Options:
    out: str = setting(REQUIRED, "file to write the model to", writes="file")
    vocab_size: int = setting(16384, "pieces, including the 256 bytes", at_least=1)
    model_type: str = one_of(*MODEL_TYPES, help="how text is divided into pieces")
    sample_mb: float = setting(30.0, "megabytes of text to train on", above=0)
    threads: int = setting(2, "threads of the training; the pieces depend on their number", at_least=1)


@command(Options, overrides=True)
def main(options: Options, overrides: list[str]) -> int:
    """The command line in the module's docstring."""
    cfg = compose([*overrides, "tokenizer=byte"])
    shares = shares_of(cfg) or {"": 1.0}
    corpora = {}
    for name, source in sources_of(cfg).items():
        with named(name):
            corpora[name] = build_corpus(source, "train")
            if not len(corpora[name]):
                raise ConfigError("data.train holds no documents")
    lines = itertools.chain.from_iterable(
        sample_lines(corpus, round(shares[name] * options.sample_mb * (1 << 20)), cfg.seed)
        for name, corpus in corpora.items()
    )
    tokenizer = train_sentencepiece(
        lines, options.vocab_size, options.out, cfg.seed, options.model_type, options.threads
    )
    text = next(iter(corpora.values())).read(0).text[: 1 << 20]
    ids = tokenizer.encode(text)
    print(f"{options.out}: {tokenizer.vocab_size} pieces, {len(text.encode()) / max(1, len(ids)):.2f} bytes per token")
    print(f"use it with: tokenizer=sentencepiece tokenizer.model_path={options.out}   ({tokenizer.fingerprint})")
    return 0


def train_sentencepiece(
    lines: Iterator[str],
    vocab_size: int,
    out: Path | str,
    seed: int = 0,
    model_type: str = "unigram",
    threads: int = 2,
) -> SentencePieceTokenizer:
    """Train a lossless model on lines (without newlines, which are a piece of their own) and write it.

    Args:
        threads: each sums the counts of its share of the text, so another number gives slightly different pieces. It is
            therefore not the number of cores: the same text gives the same model on every machine.

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
            model_type=model_type,
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
            num_threads=threads,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ConfigError(f"vocab_size={vocab_size} cannot be trained: {one_line(error)}") from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(out))
    write_whole(Path(out), model.getvalue())
    return tokenizer


def sample_lines(corpus: Corpus, num_bytes: int, seed: int) -> Iterator[str]:
    """Lines of about `num_bytes` of text in total, from one excerpt of each document in a seeded selection."""
    share = max(1 << 14, num_bytes // max(1, len(corpus)))
    order = np.array([permute(i, len(corpus), seed) for i in range(len(corpus))], np.int64)
    taken = np.minimum(corpus.sizes()[order], share)
    before = np.cumsum(taken) - taken
    left = num_bytes
    # In file order, which is fastest. The other documents follow in case sizes were overestimated.
    for index in [*sorted(order[before < num_bytes]), *order[before >= num_bytes]]:
        if left <= 0:
            return
        text = corpus.read(int(index)).text
        per_byte = len(text) / max(1, len(text.encode()))  # characters
        # The middle of a book is more typical than its title page.
        start = max(0, (len(text) - round(share * per_byte)) // 2)
        stretch = text[start : start + max(1, round(min(share, left) * per_byte))]
        left -= len(stretch.encode())
        for line in stretch.split("\n"):
            for cut in range(0, len(line), _LINE_LIMIT // 4):
                yield line[cut : cut + _LINE_LIMIT // 4]


if __name__ == "__main__":
    sys.exit(main())
