"""Claims about tokenizers: every text is restored exactly, every byte is counted, and a run keeps its own tokenizer."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import hf_tokenizer
from data.build import build_tokenizer
from data.hf_tokenizer import HFTokenizer
from data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from data.train_tokenizer import main, sample_lines, train_sentencepiece
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from tests.data_helpers import config, loader, tokens_of, write_jsonl

SPECIAL = [
    "<document>",
    "<unk>",
    "<0x41>",
    "<|endoftext|>",
    "<think>",
    "</s>",
    "\u2581",
    "\n",
    "\r\n",
    "\x00",
    "  ",
    "\t",
    "\u00a0",
    "e\u0301",
    "\ufb01",
    "\ufeff",
]


def prose(words: int, seed: int) -> str:
    """Text of made-up words with skewed frequencies, in lines and paragraphs."""
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("aeioubdfgklmnprst"), rng.integers(2, 9))) for _ in range(400)]
    rng = np.random.default_rng(seed)
    chosen = rng.choice(made, words, p=(weights := 1 / np.arange(1, 401)) / weights.sum())
    ends = rng.choice([" ", " ", " ", ", ", ".\n", ".\n\n", "  "], words)
    return "".join(word + end for word, end in zip(chosen, ends)) + " caf\u00e9 na\u00efve 1906"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "books.jsonl", [prose(4000, seed) for seed in range(3)])
    return folder


def train(folder: Path, name: str, *more: str) -> Path:
    """Train a model through the command line, as a user would."""
    arguments = ["data=jsonl", f"data.train=[{folder}/books.jsonl]", f"out={folder}/{name}", *more]
    assert main(arguments) == 0
    return folder / name


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return train(folder, "a.model", "vocab_size=600", "sample_mb=1")


def of(model: Path, *overrides: str) -> Config:
    return config("tokenizer=sentencepiece", f"tokenizer.model_path={model}", "data=jsonl", *overrides)


def byte_level(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json like GPT-2's, with what others add: NFC, a prefix space, a first token, truncation, dropout."""
    return json.loads(_byte_level()) | changes


@lru_cache
def _byte_level() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(dropout=0.5))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([prose(2000, 0)], trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<think>", lstrip=True, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing("<|im_end|> $A", None, [("<|im_end|>", 1)])
    tokenizer.enable_truncation(10)
    return tokenizer.to_str()


def llama(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json like Llama 2's: spaces are U+2581, one is prepended, other characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"etaoin", "th", "\u2581t"]
    special = [{"id": i, "content": pieces[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "added_tokens": [token | flags for token in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": ["\u2581 t"],
        },
    } | changes  # fmt: skip


def unigram() -> dict[str, Any]:
    """Like SentencePiece's unigram models, whose Viterbi search would take "</s>" in the text for the token."""
    pieces = llama()["model"]["vocab"]
    model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": [[p, -1.0 - i] for p, i in pieces.items()]}
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    back = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]}
    return llama(model=model, normalizer=None, pre_tokenizer=space, decoder=back)


def hf(spec: dict[str, Any], separator: str) -> HFTokenizer:
    return HFTokenizer(json.dumps(spec).encode(), separator)


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Path:
    return train(folder, "bpe.model", "vocab_size=600", "sample_mb=1", "model_type=bpe")


@pytest.fixture(scope="module")
def tokenizers(model: Path, bpe: Path) -> list[Any]:
    made = [ByteTokenizer(), *(SentencePieceTokenizer(path.read_bytes()) for path in (model, bpe))]
    return [*made, hf(byte_level(), "<|endoftext|>"), hf(llama(), "</s>"), hf(unigram(), "</s>")]


CHARACTERS = [*range(0xD800), *range(0xE000, 0x110000, 97)]  # of every plane


def random_text(rng: random.Random) -> str:
    """A concatenation of characters of any script, strings that look special, runs of spaces and plain words."""
    makers = [
        lambda: chr(rng.choice(CHARACTERS)),
        lambda: chr(rng.randrange(0x250)),
        lambda: rng.choice(SPECIAL),
        lambda: " " * rng.randrange(4),
        lambda: rng.choice(WORDS),
    ]
    return "".join(rng.choice(makers)() for _ in range(rng.randrange(60)))


WORDS = prose(50, 9).split(" ")


def test_every_text_is_restored_exactly_and_its_bytes_are_counted(tokenizers: list[Any]) -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        for tokenizer in tokenizers:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text, ascii(text)
            assert tokenizer.num_bytes(ids) == len(text.encode())
            assert ids.dtype == np.uint16 and (ids < tokenizer.vocab_size).all()
            assert tokenizer.separator_id not in ids, "encoded text never contains the separator"


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", " leading", "trailing ", *SPECIAL, "<s>", "</s>", "<pad>", "a\u2581 b"]
)
def test_strings_that_look_special_are_plain_text(tokenizers: list[Any], text: str) -> None:
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.separator_id not in tokenizer.encode(text)


def test_separators_and_ignored_labels_decode_to_no_text(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode("caf\u00e9").tolist()
        sequence = [tokenizer.separator_id, *ids, tokenizer.separator_id, -100, -100]
        assert tokenizer.num_bytes(sequence) == 5
        assert tokenizer.decode(sequence[:-2]) == "caf\u00e9"
        assert tokenizer.decode(tokenizer.encode("\u20ac")[:1]) in ("\ufffd", "\u20ac")


def test_text_is_shorter_in_pieces_than_in_bytes(tokenizers: list[Any]) -> None:
    text = prose(500, 7)
    for tokenizer in tokenizers[1:4]:
        assert len(tokenizer.encode(text)) < 0.5 * len(tokenizers[0].encode(text))
    assert [tokenizer.vocab_size for tokenizer in tokenizers[1:4]] == [600, 600, 502]


def test_training_again_gives_the_same_model(folder: Path, model: Path) -> None:
    again = train(folder, "again.model", "vocab_size=600", "sample_mb=1")
    assert again.read_bytes() == model.read_bytes()


def test_tokenizers_survive_pickling(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        copy = pickle.loads(pickle.dumps(tokenizer))
        text = prose(50, 3) + "\u2581"
        assert np.array_equal(copy.encode(text), tokenizer.encode(text)) and copy.fingerprint == tokenizer.fingerprint


def test_a_run_keeps_its_tokenizer_and_rejects_another(folder: Path, model: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", train(folder, "b.model", "vocab_size=500", "sample_mb=1")
    first = build_tokenizer(of(model), run)
    first.save(run / "tokenizer")
    assert build_tokenizer(of(model), run).fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="tokenizer differs from the one this run was made with"):
        build_tokenizer(of(other), run)
    with pytest.raises(ConfigError, match="tokenizer differs"):
        build_tokenizer(config("data=jsonl"), run)
    gone = build_tokenizer(of(tmp_path / "moved.model"), run)
    assert gone.fingerprint == first.fingerprint and gone.decode(gone.encode("a b\n")) == "a b\n"
    content = bytearray((run / "tokenizer/tokenizer.model").read_bytes())
    content[-200] ^= 1
    (run / "tokenizer/tokenizer.model").write_bytes(bytes(content))
    with pytest.raises(ConfigError, match="tokenizer differs|not a SentencePiece model|changes text"):
        build_tokenizer(of(tmp_path / "moved.model"), run)


def test_a_resumed_run_rejects_another_tokenizer_model(folder: Path, model: Path) -> None:
    data = f"data.train=[{folder}/books.jsonl]"
    state = loader(of(model, data)).state_dict()
    other = train(folder, "b.model", "vocab_size=500", "sample_mb=1")
    with pytest.raises(ConfigError, match=r"the data differ .*\(tokenizer: sentencepiece:"):
        loader(of(other, data), state=state)


def test_prepared_data_include_their_tokenizer(folder: Path, model: Path, tmp_path: Path) -> None:
    from data.prepare import prepare

    cfg = of(model, f"data.train=[{folder}/books.jsonl]", "data.num_workers=0")
    out = tmp_path / "out"
    prepare(cfg, out, processes=1)
    with pytest.raises(
        ConfigError, match=f"use tokenizer=sentencepiece tokenizer.model_path={out}/tokenizer/tokenizer.model"
    ):
        loader(config("data=memmap", f"data.train=[{out}]"))
    path = f"tokenizer.model_path={out}/tokenizer/tokenizer.model"
    maps = config("tokenizer=sentencepiece", path, "data=memmap", f"data.train=[{out}]")
    assert (tokens_of(maps, 20) == tokens_of(cfg, 20)).all()


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def write_hf(folder: Path, spec: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def of_hf(path: Any, *overrides: str) -> Config:
    return config("tokenizer=hf", f"tokenizer.model_path={path}", "data=jsonl", *overrides)


@pytest.mark.parametrize("make,separator", [(byte_level, "<|endoftext|>"), (llama, "</s>"), (unigram, "</s>")])
def test_ids_are_those_of_the_tokenizers_package(make: Callable[..., dict[str, Any]], separator: str) -> None:
    from tokenizers import Tokenizer

    spec = make()
    theirs = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "model": spec["model"] | {"dropout": None}}))
    text = prose(300, 5)
    # Theirs prepends a space to a text.
    assert hf(spec, separator).encode(" " + text).tolist() == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "make,settings,separator",
    [
        (byte_level, {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, "<|im_end|>"),
        (byte_level, {"eos_token": None, "bos_token": {"content": "<|im_end|>"}}, "<|im_end|>"),
        (byte_level, {}, "<|endoftext|>"),
        (llama, {}, "</s>"),
    ],
)
def test_the_separator_is_the_token_that_ends_a_text(
    make: Callable[[], dict[str, Any]], settings: dict[str, Any], separator: str, tmp_path: Path
) -> None:
    spec = make()
    folder = write_hf(tmp_path, spec, **settings)
    named = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert build_tokenizer(of_hf(folder)).separator_id == named[separator]
    assert build_tokenizer(of_hf(folder / "tokenizer.json")).separator_id == named[separator]
    for name in ("<|endoftext|>", "<s>"):
        if name in named:
            assert build_tokenizer(of_hf(folder, f"tokenizer.separator={name}")).separator_id == named[name]


def test_a_run_keeps_a_copy_of_its_tokenizer_json_and_its_separator(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", write_hf(tmp_path / "hub", byte_level(), eos_token="<|im_end|>")
    first = build_tokenizer(of_hf(folder), run)
    first.save(run / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with pytest.raises(ConfigError, match="tokenizer differs from the one this run was made with"):
        build_tokenizer(of_hf(folder), run)
    for path in (tmp_path / "gone", "hf://someone/gone", run / "tokenizer", run / "tokenizer/tokenizer.model"):
        kept = build_tokenizer(of_hf(path), run)
        assert (kept.fingerprint, kept.separator_id) == (first.fingerprint, first.separator_id)
        assert np.array_equal(kept.encode(text := prose(20, 1)), first.encode(text))


def test_prepared_data_keep_their_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    from data.prepare import prepare
    from data.prepared import verify_prepared

    cfg = of_hf(write_hf(tmp_path / "hub", llama()), f"data.train=[{folder}/books.jsonl]", "data.num_workers=0")
    out = tmp_path / "out"
    prepare(cfg, out, processes=1)
    with pytest.raises(ConfigError, match=f"use tokenizer=hf tokenizer.model_path={out}/tokenizer/tokenizer.model"):
        loader(config("data=memmap", f"data.train=[{out}]"))
    path = f"tokenizer.model_path={out}/tokenizer/tokenizer.model"
    maps = config("tokenizer=hf", path, "data=memmap", f"data.train=[{out}]")
    assert (tokens_of(maps, 20) == tokens_of(cfg, 20)).all() and not verify_prepared(out)
    (out / "tokenizer/tokenizer.model").write_text("{}")
    assert "tokenizer.model is missing or damaged" in verify_prepared(out)[0]


def test_a_tokenizer_of_the_hub_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, asked = write_hf(tmp_path, byte_level(), eos_token="<|im_end|>"), list[Any]()

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.append((repo, file, revision))
        if repo == "away/from":
            raise LocalEntryNotFoundError("no connection\nand no copy")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert build_tokenizer(of_hf("hf://some/one@abc")).separator_id == 1
    assert asked == [("some/one", "tokenizer.json", "abc"), ("some/one", "tokenizer_config.json", "abc")]
    assert build_tokenizer(of_hf("hf://some/one/tokenizer.json")).vocab_size == 502 and asked[-1][2] is None
    with pytest.raises(ConfigError, match="hf://away/from cannot be fetched: no connection and no copy; without a net"):
        build_tokenizer(of_hf("hf://away/from"))


def no_special(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {"added_tokens": []}


REPLACE = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}  # as in ALBERT's
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"String": "~"}, "behavior": "Removed", "invert": False},
        BYTES,
    ],
}


def test_a_split_that_keeps_only_matches_keeps_the_rest_too() -> None:
    from tokenizers import Tokenizer

    words = {"type": "Split", "pattern": {"Regex": r"\w+| +"}, "behavior": "Removed", "invert": True}
    spec = byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [words, BYTES]})
    tokenizer = hf(spec, "<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("a ~b@c``\n")) == "a ~b@c``\n"
    theirs = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "model": spec["model"] | {"dropout": None}}))
    text = "and the other words"  # of which nothing is removed
    assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda p: p.joinpath("tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda p: p.joinpath("tokenizer.json").write_text("{"), "is not a tokenizer.json: Expecting"),
        (lambda p: p.joinpath("tokenizer.json").write_text("[]"), "is not a tokenizer.json"),
        (lambda p: p.joinpath("tokenizer.json").write_bytes(b"\xff"), "is not a tokenizer.json"),
        (lambda p: p.joinpath("tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"),
        (lambda p: write_hf(p, byte_level(model={"type": "x"})), "is not a tokenizer.json: "),
        (lambda p: write_hf(p, llama(normalizer={"type": "Lowercase"})), "changes text"),
        (
            lambda p: write_hf(p, llama(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})),
            r"restore text exactly \(Replace, WordPi",
        ),
        (lambda p: write_hf(p, llama(normalizer=None, decoder={"type": "Fuse"})), "has no byte fallback"),
        (lambda p: write_hf(p, byte_level(normalizer=REPLACE)), r"cannot restore text exactly \(Replace\)"),
        (lambda p: write_hf(p, byte_level(pre_tokenizer=SPLIT)), r"cannot restore text exactly \(Split\)"),
        (lambda p: write_hf(p, no_special(llama())), "set tokenizer.separator, to one of: none"),
        (lambda p: write_hf(p, llama(), eos_token="<eos>"), "separator=<eos> is not a token of .*: <unk>, <s>, </s>"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused_in_one_line(change: Any, words: str, tmp_path: Path) -> None:
    change(write_hf(tmp_path / "hub", byte_level()))
    with pytest.raises(ConfigError, match=words) as error:
        build_tokenizer(of_hf(tmp_path / "hub"))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tokenizer_json_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.model_path=.*/no.json does not exist"):
        hf_tokenizer.load(f"{tmp_path}/no.json")
    with pytest.raises(ConfigError, match="tokenizer.model_path is required with tokenizer.kind=hf"):
        compose(["tokenizer=hf"])


# --- models that are refused ------------------------------------------------------------------------------------------


def test_models_that_change_text_are_rejected(folder: Path) -> None:
    import sentencepiece

    def trained(**options: Any) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(prose(3000, 1).split("\n")),
            model_writer=model,
            vocab_size=400,
            minloglevel=2,
            **options,
        )
        return model.getvalue()

    lossless: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
    }
    for change, words in (
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False}, "lacks byte fallback"),
        ({"bos_id": -1, "eos_id": -1}, "has neither bos nor eos"),
    ):
        with pytest.raises(ConfigError, match=words):
            SentencePieceTokenizer(trained(**{**lossless, **change}))
    with pytest.raises(ConfigError, match="tokenizer.model_path=x is not a SentencePiece model"):
        SentencePieceTokenizer(b"not a model", "x")


def test_the_sample_is_spread_and_bounded() -> None:
    class Books:
        def __init__(self, lengths: list[int]) -> None:
            self.lengths, self.read_at = lengths, list[int]()

        def __len__(self) -> int:
            return len(self.lengths)

        def sizes(self) -> np.ndarray:
            return np.array(self.lengths)

        def read(self, index: int) -> Any:
            self.read_at.append(index)
            return type("Text", (), {"text": f"{index:05d}" * (self.lengths[index] // 5)})

    many = Books([40_000] * 500)
    lines = list(sample_lines(many, 1 << 20, seed=0))
    assert len(many.read_at) == 64 and many.read_at == sorted(many.read_at) and max(many.read_at) > 250
    assert sum(map(len, lines)) == 1 << 20 and max(map(len, lines)) <= 4000
    few = Books([1000, 0, 500])
    assert sum(len(line) for line in sample_lines(few, 1 << 20, seed=0)) == 1500

    class Cyrillic(Books):
        def read(self, index: int) -> Any:
            self.read_at.append(index)
            return type("Text", (), {"text": "ж" * (self.lengths[index] // 2)})

    russian = Cyrillic([40_000] * 64)
    assert sum(len(line.encode()) for line in sample_lines(russian, 1 << 20, seed=0)) == 1 << 20
    assert len(russian.read_at) == 64, "a share is counted in bytes, not in characters"


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["data=builtin"], "out= is required: file to write the model to"),
        (["data=builtin", "out=x", "vocab=5"], "there is no setting 'vocab'"),
        (["data=text", "out=x"], "data.train is empty"),
        (["train", "data=builtin", "out=x"], "'train' cannot be read; options are key=value"),
    ],
)  # fmt: skip
def test_command_line_mistakes_are_reported(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2 and words in capsys.readouterr().err and not Path("x").exists()


def test_data_without_documents_are_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    empty, other = f"data: jsonl, train: [{tmp_path}/empty.jsonl]", "data: builtin"
    for words, where in (
        (["data=jsonl", f"data.train=[{tmp_path}/empty.jsonl]"], "data.train"),
        (["data=mixture", f"data.mixture={{a: {{{other}}}, b: {{{empty}}}}}"], "data.mixture.b: data.train"),
    ):
        assert main([*words, f"out={tmp_path}/x.model"]) == 2
        assert capsys.readouterr().err == f"error: {where} holds no documents\n"


def test_a_vocabulary_too_large_for_its_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=5000 cannot be trained: .*5000"):
        train_sentencepiece(iter(["a few words"]), 5000, tmp_path / "x.model")
    with pytest.raises(ConfigError, match="does not exist; make one"):
        build_tokenizer(compose(["tokenizer=sentencepiece", f"tokenizer.model_path={tmp_path}/x.model"]))


def test_a_trained_model_does_not_depend_on_the_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(__file__).with_name("test_tokenizer.py").read_text().splitlines()
    made = []
    for count in (1, 5):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        made.append(train_sentencepiece(iter(lines), 400, tmp_path / "x.model").fingerprint)
    assert made[0] == made[1] != train_sentencepiece(iter(lines), 400, tmp_path / "x.model", threads=5).fingerprint
