"""Claims about prepared data: written once and completely, with the same rows as the text, and never silently wrong."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data.prepare as preparing
from data.build import build_tokenizer, check_names_held_out, heldout_documents, splits_of
from data.describe import describe
from data.loader import merge_states
from data.prepare import main, prepare
from data.prepared import DOCUMENT, PreparedTokens, load_index
from data.sources import DataError
from ovq.config import Config
from ovq.errors import ConfigError
from tests.data_helpers import config, loader, steps, texts, tokens_of, tree, write_jsonl, write_parquet
from tests.faults import children_of, running, wait_until

PART_MB = 100 / 2**20  # parts of about 100 bytes of text, so that there are several


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def source(folder: Path) -> Config:
    """Two Parquet shards for training (one with bad UTF-8 and a missing text) and one for validation."""
    write_parquet(folder / "train-0.parquet", texts()[:7], row_group_size=3)
    write_parquet(folder / "train-1.parquet", [*texts()[7:], b"bad \xff byte", None], row_group_size=3)
    write_parquet(folder / "validation.parquet", texts()[5:8])
    return from_parquet(folder)


def from_parquet(folder: Path, *overrides: str) -> Config:
    files = [f"data.train=[{folder}/train-0.parquet,{folder}/train-1.parquet]", "data.title_field=short_book_title"]
    return config(
        "data=parquet", *files, f"data.validation=[{folder}/validation.parquet]", "data.num_workers=0", *overrides
    )


@pytest.fixture(scope="module")
def prepared(folder: Path, source: Config) -> Path:
    prepare(source, folder / "out", processes=1, part_mb=PART_MB)
    return folder / "out"


def from_memmap(*folders: Path, overrides: tuple[str, ...] = ()) -> Config:
    return config("data=memmap", f"data.train=[{','.join(map(str, folders))}]", *overrides)


def copy(prepared: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(prepared, to))


@pytest.mark.parametrize(
    "overrides", [(), ("data.packing=document",), ("seed=5", "data.isolate_documents=true")], ids=str
)
def test_prepared_data_give_the_same_batches_as_the_text(
    source: Config, folder: Path, prepared: Path, overrides: Any
) -> None:
    text, maps = loader(from_parquet(folder, *overrides)), loader(from_memmap(prepared, overrides=overrides))
    assert text.fingerprint == maps.fingerprint
    for one, other in islice(zip(text, maps), 40):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
        assert (one.lanes, one.counts, one.documents) == (other.lanes, other.counts, other.documents)
        assert (one.cu_seqlens is None) == (other.cu_seqlens is None)
        assert one.cu_seqlens is None or torch.equal(one.cu_seqlens, other.cu_seqlens)
    assert text.counts["bad_utf8"] and text.counts["empty_documents"] and text.state_dict() == maps.state_dict()


def test_a_run_started_on_text_continues_on_prepared_data(source: Config, prepared: Path) -> None:
    whole = tokens_of(source, 9)
    state = list(islice(steps(source), 4))[-1][2]
    assert torch.equal(tokens_of(from_memmap(prepared), 5, 2, state), whole[4:])


def test_resuming_does_not_reread_earlier_documents(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = from_memmap(prepared)
    state = list(islice(steps(cfg), 11))[-1][2]
    read: list[int] = []
    original = PreparedTokens.read

    def watched(self: PreparedTokens, index: int) -> Any:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(PreparedTokens, "read", watched)
    next(steps(cfg, 1, state))
    begun = [lane for lane in state["lanes"].values() if lane["offset"]]
    assert begun and len(read) <= 4 + 8, "each lane's current document, and those that its row continues with"


def test_held_out_documents_come_from_the_same_folder(source: Config, prepared: Path) -> None:
    text, maps = (
        [d for d in heldout_documents(cfg, build_tokenizer(cfg), "validation") if len(d.tokens) >= 20]
        for cfg in (source, from_memmap(prepared))
    )
    assert len(text) == 2 and text[0].title == "validation book 1" and text[0].tokens.dtype == np.int64
    for one, other in zip(text, maps, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert (one.title, one.num_bytes, one.num_words) == (other.title, other.num_bytes, other.num_words)
    with pytest.raises(ConfigError, match="has no test split; it has: train, validation"):
        list(heldout_documents(from_memmap(prepared), build_tokenizer(source), "test"))


def test_a_mixture_reads_the_held_out_folders_that_its_data_sets_name(
    source: Config, prepared: Path, tmp_path: Path
) -> None:
    prepare(source, tmp_path / "only", splits=["train"], processes=1)
    alone = f"{{data: memmap, train: [{tmp_path}/only]}}"
    cfg = config("data=mixture", f"data.mixture={{a: {alone}}}")
    with pytest.raises(ConfigError, match="data.mixture.a.validation is empty, .* give it a folder that has a valid"):
        check_names_held_out(cfg)
    cfg.data.mixture.a.validation = [str(prepared)]
    check_names_held_out(cfg)
    found = list(heldout_documents(cfg, build_tokenizer(cfg), "validation"))
    assert len(found) == 3 and splits_of(cfg) == ["train", "validation"]
    cfg.data.mixture.a.train = ["nowhere"]
    assert splits_of(cfg) == ["train"]
    check_names_held_out(cfg)  # opening it reports what is wrong
    with pytest.raises(ConfigError, match="data.mixture.a: nowhere is not completely prepared"):
        loader(cfg)


def test_several_folders_are_concatenated(source: Config, prepared: Path) -> None:
    once, twice = (PreparedTokens([str(prepared)] * n, "train", build_tokenizer(source)) for n in (1, 2))
    assert len(twice) == 2 * len(once) == 30
    for i in range(15):
        assert np.array_equal(once.read(i).ids, twice.read(i).ids)
        assert np.array_equal(once.read(i).ids, twice.read(15 + i).ids)
    assert once.fingerprint() != twice.fingerprint()


def test_the_index_counts_and_locates_every_document(prepared: Path) -> None:
    index = load_index(prepared)["splits"]["train"]
    assert index["documents"] == 15 and index["bad_utf8"] == 1 and len(index["parts"]) > 3
    assert index["tokens"] == index["bytes"] == sum(len(text) for text in texts()) + len("bad \ufffd byte".encode())
    part = index["parts"][1]
    rows = np.fromfile(prepared / f"{part['name']}.documents", DOCUMENT)
    ids = np.memmap(prepared / f"{part['name']}.tokens", np.uint16, "r")
    row = rows[-1]
    text = bytes(ids[row["start"] : row["start"] + row["tokens"]].astype(np.uint8)).decode()
    assert text == texts()[part["first_document"] + part["documents"] - 1]


def test_the_number_of_processes_does_not_change_the_result(source: Config, prepared: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", processes=2, part_mb=PART_MB)
    assert tree(tmp_path / "out") == tree(prepared)


class Killed(BaseException):
    """Stands in for a kill: handlers of ordinary exceptions do not catch it."""


def test_a_killed_preparation_resumes_and_writes_the_same_bytes(
    source: Config, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made: list[str] = []
    original = preparing.make_part

    def dies_at(count: int) -> Any:
        def make(job: Any, wanted: Any) -> Any:
            if len(made) == count:
                (out / f"{wanted.name}.tokens.123.tmp").write_bytes(b"half")
                raise Killed
            made.append(wanted.name)
            return original(job, wanted)

        return make

    for count in (2, 3):
        monkeypatch.setattr(preparing, "make_part", dies_at(count))
        with pytest.raises(Killed):
            prepare(source, out, processes=1, part_mb=PART_MB)
        with pytest.raises(ConfigError, match="is not completely prepared"):
            loader(from_memmap(out))
    monkeypatch.setattr(preparing, "make_part", dies_at(-1))
    prepare(source, out, processes=1, part_mb=PART_MB)
    assert len(made) == len(set(made)), "no part was made twice"
    assert tree(out) == tree(prepared)
    monkeypatch.setattr(preparing, "make_part", dies_at(len(made)))
    prepare(source, out, processes=1, part_mb=PART_MB)  # already complete: nothing is redone
    assert tree(out) == tree(prepared)


def test_kill_9_of_the_command_ends_its_processes_and_the_next_goes_on(
    folder: Path, source: Config, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.prepare", "data=parquet", f"part_mb={PART_MB:.12f}", "processes=2"]
    command += [f"data.train=[{folder}/train-0.parquet,{folder}/train-1.parquet]", "data.title_field=short_book_title"]
    command += [f"data.validation=[{folder}/validation.parquet]", f"out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: any(out.glob("*.done")) or process.poll() is not None, 120)
    children = children_of(process.pid) if process.poll() is None else []
    process.kill()
    process.wait()
    wait_until(lambda: not any(running(child) for child in children), 3)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "data=memmap 'data.train=[" in again.stdout, again.stderr
    assert tree(out).keys() == tree(prepared).keys()
    assert load_index(out)["splits"] == load_index(prepared)["splits"]


def test_a_second_preparation_of_a_folder_leaves_the_first_alone(
    source: Config, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, refused = preparing.make_part, []

    def make(job: Any, wanted: Any) -> Any:
        monkeypatch.setattr(preparing, "make_part", original)
        (tmp_path / "out" / "half.tmp").write_bytes(b"of the first")
        with pytest.raises(DataError, match=rf"out is being written by process {os.getpid()} on .*; wait for it") as no:
            prepare(source, tmp_path / "out", processes=1, part_mb=PART_MB)
        assert (tmp_path / "out" / "half.tmp").exists()
        refused.append(no)
        return original(job, wanted)

    monkeypatch.setattr(preparing, "make_part", make)
    prepare(source, tmp_path / "out", processes=1, part_mb=PART_MB)
    assert len(refused) == 1 and tree(tmp_path / "out") == tree(prepared), "no lock is left either"


def test_what_a_kill_between_index_and_tidying_leaves_is_removed_later(
    source: Config, prepared: Path, tmp_path: Path
) -> None:
    out = copy(prepared, tmp_path / "out")
    for name in (preparing.PLAN, "train-00000.done"):
        (out / name).write_text("{}")
    prepare(source, out, processes=1, part_mb=PART_MB)
    assert tree(out) == tree(prepared)


def test_a_full_disk_stops_preparation_in_one_line_and_it_resumes_later(
    source: Config, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # prepared.json is larger than this, parts are not
    try:
        with pytest.raises(
            DataError, match=r"File too large; finished parts are kept, the same command continues"
        ) as error:
            prepare(source, out, processes=1, part_mb=PART_MB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not list(out.glob("*.tmp")) and list(out.glob("*.done"))
    prepare(source, out, processes=1, part_mb=PART_MB)
    assert tree(out) == tree(prepared)


def test_another_preparation_in_the_same_folder_is_rejected(folder: Path, source: Config, prepared: Path) -> None:
    for cfg, what in (
        (from_parquet(folder, "data.title_field=url"), "title_field"),
        (only_train(folder), "data.train"),
    ):
        with pytest.raises(ConfigError, match=f"holds another preparation .differs in .*{what}"):
            prepare(cfg, prepared, part_mb=PART_MB)
    with pytest.raises(ConfigError, match="differs in part_mb"):
        prepare(source, prepared)


def only_train(folder: Path) -> Config:
    return from_parquet(folder, f"data.train=[{folder}/train-0.parquet]")


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("suffix", ["tokens", "documents", "titles"])
def test_a_changed_byte_is_an_error_that_names_the_file(prepared: Path, tmp_path: Path, suffix: str) -> None:
    out = copy(prepared, tmp_path / "out")
    damage(out / f"train-00002.{suffix}", 3)
    tokens = PreparedTokens([str(out)], "train", build_tokenizer(config("data=memmap")))
    with pytest.raises(DataError, match=rf"out/train-00002.{suffix} is damaged"):
        for i in range(len(tokens)):
            tokens.read(i)


@pytest.mark.parametrize("suffix", ["tokens", "documents", "titles"])
def test_documents_of_a_damaged_part_can_be_skipped_and_counted(
    prepared: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy(prepared, tmp_path / "out")
    damage(out / f"train-00002.{suffix}", 3)
    made = loader(from_memmap(out, overrides=("data.on_bad_shard=skip",)))
    list(islice(made, 40))
    assert made.counts["unreadable_documents"] >= 1
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {out}/train-00002.tokens document ")
    assert f"left out: {out}/train-00002.{suffix} is damaged" in said


@pytest.mark.parametrize("suffix", ["tokens", "documents", "titles"])
def test_a_truncated_or_missing_file_is_named_at_once(prepared: Path, tmp_path: Path, suffix: str) -> None:
    out = copy(prepared, tmp_path / "out")
    path = out / f"train-00002.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"out/train-00002.{suffix} has \d+ bytes instead of \d+"):
        loader(from_memmap(out))
    assert "instead of" in describe(from_memmap(out))["train"]["error"]
    path.unlink()
    with pytest.raises(ConfigError, match=rf"out/train-00002.{suffix} is missing"):
        loader(from_memmap(out))


def test_a_file_that_disappears_during_a_run_is_named(prepared: Path, tmp_path: Path) -> None:
    out = copy(prepared, tmp_path / "out")
    made = loader(from_memmap(out))
    (out / "train-00002.tokens").unlink()
    with pytest.raises(DataError, match="train-00002.tokens cannot be read: No such file"):
        for _ in islice(made, 60):
            pass


def test_verify_finds_every_damaged_file(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copy(prepared, tmp_path / "out")
    assert main(["verify", str(out)]) == 0 and "every file is as it was written" in capsys.readouterr().out
    damage(out / "train-00003.tokens", 5)
    damage(out / "validation-00000.titles", 0)
    (out / "train-00000.documents").unlink()
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" is ")[0].rpartition("/")[2] for line in lines] == [
        "train-00000.documents",
        "train-00003.tokens",
        "validation-00000.titles",
    ]


@pytest.mark.parametrize("at", [40, 900])
def test_a_damaged_index_is_rejected(prepared: Path, tmp_path: Path, at: int) -> None:
    out = copy(prepared, tmp_path / "out")
    damage(out / "prepared.json", at)
    with pytest.raises(ConfigError, match="prepared.json (is damaged|cannot be read)"):
        load_index(out)


def test_another_tokenizer_is_rejected_with_the_right_setting(prepared: Path) -> None:
    class Other:
        fingerprint, vocab_size, separator_id = "sentencepiece:abc", 99, 1

    with pytest.raises(ConfigError, match=r"prepared with another tokenizer .* use tokenizer=byte"):
        PreparedTokens([str(prepared)], "train", Other())  # type: ignore[arg-type]


def test_wide_vocabularies_take_four_bytes(source: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.tokenizer import ByteTokenizer, TableTokenizer

    class Wide(ByteTokenizer):
        """Bytes with ids that start at 70,000."""

        def __init__(self) -> None:
            pieces = [b""] * 70_000 + [bytes([b]) for b in range(256)] + [b""]
            TableTokenizer.__init__(self, pieces, 70_256, "wide:1")

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text) + np.uint32(70_000)

    monkeypatch.setattr(preparing, "build_tokenizer", lambda cfg: Wide())
    prepare(source, tmp_path / "out", processes=1)
    tokens = PreparedTokens([str(tmp_path / "out")], "train", Wide())
    assert load_index(tmp_path / "out")["plan"]["dtype"] == "uint32"
    assert Wide().decode(tokens.read(7).ids) == texts()[7] and tokens.read(7).ids.min() >= 70_000


def test_bad_shards_and_documents_are_counted_as_from_the_text(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [*texts()[5:9], {"title": "no text"}, {"text": "\ud800 half"}])
    cfg = config("data=jsonl", f"data.train=[{good},{tmp_path}/gone.jsonl]", "data.on_bad_shard=skip")
    cfg.data.num_workers = 0
    index = prepare(cfg, tmp_path / "out", processes=1)
    assert index["splits"]["train"]["unreadable_documents"] == 1 and index["splits"]["train"]["bad_utf8"] == 3
    counts = []
    for one in (cfg, from_memmap(tmp_path / "out")):
        made = loader(one)
        list(islice(made, 40))
        counts.append(merge_states([{**made.state_dict()}])["counts"])
    assert counts[0] == counts[1] and counts[0]["bad_shards"] == 1 and counts[0]["unreadable_documents"] > 0


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["data=builtin"], "out=DIR is required"),
        (["data=builtin", "out=x", "processes=0"], "processes=0 must be at least 1"),
        (["data=builtin", "out=x", "splits=[dev]"], "splits=[dev] is not a legal value; legal: train, validation"),
        (["data=text", "out=x"], "nothing to prepare"),
        (["data=recall", "out=x", "splits=[train]"], "holds no text"),
        (["data=builtin", "out=x", "outt=x"], "there is no option 'outt'; did you mean out?"),
        (["verify", "/nowhere"], "it has no prepared.json"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and not Path("x").exists()
