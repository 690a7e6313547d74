"""Claims about the order of tokens: those of step n are a pure function, and a resumed run keeps its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.build import build_tokenizer
from data.corpus import TokenisedDocument
from data.lanes import LaneReader, first_state
from data.loader import LaneDataset, Loader, merge_states
from data.order import permute
from data.tokenizer import ByteTokenizer
from ovq.config import Config
from ovq.errors import ConfigError
from tests.data_helpers import LENGTHS, config, loader, steps, texts, tokens_of, write_jsonl

SEPARATOR = 256
FIRST = 12  # steps compared; an epoch of 13 documents, 426 bytes in total, takes about 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts())


def jsonl(path: Path, *overrides: str) -> Config:
    return config("data=jsonl", f"data.train=[{path}]", "data.num_workers=0", *overrides)


def by_hand(documents: list[str], count: int, *, lanes: int, context: int, seed: int) -> torch.Tensor:
    """An independent implementation of the order's definition: int64 [count, 2, lanes, context]."""
    out = np.zeros((count, 2, lanes, context), np.int64)
    for lane in range(lanes):
        pairs: list[tuple[int, int]] = []
        ordinal = lane
        while len(pairs) < count * context:
            epoch, position = divmod(ordinal, len(documents))
            ids = [SEPARATOR, *documents[permute(position, len(documents), seed << 32 | epoch)].encode(), SEPARATOR]
            pairs += zip(ids[:-1], ids[1:]) if len(ids) > 2 else []
            ordinal += lanes
        out[:, :, lane] = np.array(pairs[: count * context]).reshape(count, context, 2).transpose(0, 2, 1)
    return torch.from_numpy(out)


def test_a_step_holds_the_tokens_of_the_definition(corpus: Path) -> None:
    got = tokens_of(jsonl(corpus, "seed=3"), FIRST)
    assert torch.equal(got, by_hand(texts(), FIRST, lanes=4, context=16, seed=3))
    assert not torch.equal(got, tokens_of(jsonl(corpus, "seed=4"), FIRST))


@pytest.mark.parametrize("size", [1, 2, 3, 13, 64, 1000])
def test_the_order_of_an_epoch_is_a_permutation(size: int) -> None:
    orders = {tuple(permute(i, size, seed) for i in range(size)) for seed in range(5)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) == (1 if size == 1 else 2 if size == 2 else 5)


def test_the_permutation_never_changes_between_versions() -> None:
    assert [permute(i, 13, 7) for i in range(13)] == [6, 5, 7, 8, 3, 9, 10, 12, 0, 11, 1, 4, 2]


@pytest.mark.parametrize(
    "world,workers,micro", [(1, 0, 4), (1, 2, 1), (2, 0, 1), (2, 1, 2), (4, 0, 1), (1, 1, 2), (2, 2, 1)]
)
def test_ranks_workers_and_micro_batches_only_divide_the_tokens(
    corpus: Path, world: int, workers: int, micro: int
) -> None:
    cfg = jsonl(corpus, f"data.num_workers={workers}", f"trainer.micro_batch={micro}")
    assert torch.equal(tokens_of(cfg, FIRST, world), by_hand(texts(), FIRST, lanes=4, context=16, seed=0))


class Numbered:
    """Documents in which every token is unique: token j of document d is 1 + 1000 d + j, and 0 is the separator."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> TokenisedDocument:
        ids = 1 + 1000 * index + np.arange(self.lengths[index], dtype=np.uint32)
        return TokenisedDocument(ids, str(index), len(ids), 1)


def numbered(context: int, lanes: int, **options: Any) -> LaneReader:
    return LaneReader(
        Numbered(LENGTHS), 0, lambda ids: len(ids), context=context, global_batch=lanes, seed=1, **options
    )


@pytest.mark.parametrize("world,workers", [(1, 0), (2, 2), (4, 1)])
def test_every_pair_of_every_document_is_read_once_an_epoch(world: int, workers: int) -> None:
    epochs, lanes, context = 2, 4, 16
    reader = numbered(context, lanes)
    options = {"context": context, "global_batch": lanes, "micro_batch": 1, "num_workers": workers}
    documents: dict[int, list[tuple[int, int]]] = {}  # ordinal -> its pairs, in the order they were read
    for rank in range(world):
        made = Loader(reader, {}, rank=rank, world_size=world, **options)  # type: ignore[arg-type]
        pairs: dict[int, list[tuple[int, int]]] = {lane: [] for lane in made.lanes}
        while any(state["ordinal"] < epochs * len(LENGTHS) for state in made.lanes.values()):
            for batch in islice(made, 40):  # a new iterator continues from the loader's state
                for lane, inputs, targets in zip(batch.lanes, batch.inputs.tolist(), batch.targets.tolist()):
                    pairs[lane] += zip(inputs, targets)
        for lane, read in pairs.items():
            ordinal = lane
            for pair in read:
                while LENGTHS[reader.document_of(ordinal)] == 0:
                    ordinal += lanes
                documents.setdefault(ordinal, []).append(pair)
                ordinal += lanes * (pair[1] == 0)
    for epoch in range(epochs):
        ordinals = range(epoch * len(LENGTHS), (epoch + 1) * len(LENGTHS))
        got = Counter(pair for ordinal in ordinals for pair in documents.get(ordinal, []))
        want: Counter[tuple[int, int]] = Counter()
        for d, length in enumerate(LENGTHS):
            ids = [0, *(1 + 1000 * d + np.arange(length)).tolist(), 0]
            want.update(zip(ids[:-1], ids[1:]) if length else [])
        assert got == want, f"epoch {epoch}"


@pytest.mark.parametrize("documents", [1, 3])
def test_lanes_that_begin_with_the_same_document_begin_at_different_places(documents: int) -> None:
    """A file of text is one document: if every lane began with its first token, all rows would be equal for ever."""
    lanes, length = 8, 800
    reader = LaneReader(Numbered((length,) * documents), 0, len, context=25, global_batch=lanes, seed=0)
    states = [first_state(lane) for lane in range(lanes)]
    seen: set[int] = set()
    for _ in range(length * documents // (25 * lanes)):  # steps of about one epoch
        rows = [reader.row(lane, state) for lane, state in enumerate(states)]
        assert len({row.inputs.tobytes() for row in rows}) == lanes
        seen.update(token for row in rows for token in row.targets.tolist() if token)
        states = [row.state for row in rows]
    assert len(seen) > 0.6 * length * documents  # 1 / lanes of it if they all began alike


def test_labels_never_cross_documents() -> None:
    """A document's first token is predicted only from the separator, and its last token predicts only the separator."""
    reader = numbered(16, 4)
    for lane in range(4):
        state = first_state(lane)
        for _ in range(20):
            row = reader.row(lane, state)
            state = row.state
            inside = (row.inputs != 0) & (row.targets != 0)
            assert (row.targets[inside] == row.inputs[inside] + 1).all()
            assert not ((row.inputs == 0) & (row.targets == 0)).any()
            assert ((row.targets[row.inputs == 0] - 1) % 1000 == 0).all()
            assert all(row.inputs[start] == 0 for start in row.starts[1:])


SCHEDULES = [
    [(1, 0, 5), (1, 0, 4), (1, 0, 3)],
    [(1, 2, 5), (1, 1, 4), (1, 0, 3)],
    [(2, 0, 5), (4, 0, 4), (1, 2, 3)],
    [(2, 1, 3), (1, 0, 5), (2, 2, 4)],
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_run_killed_twice_sees_what_an_unbroken_one_sees(corpus: Path, schedule: list[tuple[int, int, int]]) -> None:
    """Each entry: ranks, workers, steps until the checkpoint. Two more steps run before the kill and are lost."""
    parts, state = [], None
    for number, (world, workers, count) in enumerate(schedule):
        cfg = jsonl(corpus, f"data.num_workers={workers}")
        made = list(islice(steps(cfg, world, state), count + 2))
        parts += [torch.stack([inputs, targets]) for inputs, targets, _ in made[:count]]
        state = through_json(made[count - 1][2]) if number % 2 else through_torch(made[count - 1][2])
    unbroken = list(islice(steps(jsonl(corpus)), FIRST))
    assert torch.equal(torch.stack(parts), torch.stack([torch.stack([i, t]) for i, t, _ in unbroken]))
    assert through_json(state) == through_json(unbroken[-1][2]), "lanes and counts equal those of an unbroken run"


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def through_torch(state: Any) -> Any:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_lanes_also_resume_through_torchdatas_own_state(workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Any:
        lanes = {lane: first_state(lane) for lane in range(4)}
        return StatefulDataLoader(LaneDataset(numbered(16, 4), lanes), batch_size=None, num_workers=workers)

    unbroken = [row.inputs for row in islice(make(), 20)]
    got, state = [], None
    for count in (7, 6, 7):
        stateful = make()
        if state is not None:
            stateful.load_state_dict(state)
        rows = iter(stateful)
        got += [next(rows).inputs for _ in range(count)]
        state = stateful.state_dict()
    assert np.array_equal(np.stack(got), np.stack(unbroken))


def test_counts_equal_those_of_the_text(tmp_path: Path) -> None:
    """One lane whose row the documents fill exactly, so that one row is an epoch."""
    documents = ["caf\u00e9 au lait", "", "one two  three\nfour", "x", "fi\ufb01"]
    pairs = sum(len(text.encode()) + 1 for text in documents if text)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    made = loader(jsonl(path, "trainer.global_batch=1", f"trainer.context={pairs}", "data.shuffle=false"))
    batch = next(iter(made))
    assert batch.counts == made.state_dict()["counts"] == {
        "tokens": pairs,
        "bytes": sum(len(text.encode()) for text in documents),
        "words": 3 + 4 + 1 + 1,
        "documents": 4,
        "empty_documents": 1,
        "short_documents": 4,
    }  # fmt: skip
    assert batch.documents == ["a.jsonl#0", "a.jsonl#2", "a.jsonl#3", "a.jsonl#4"]
    assert batch.lanes == {0: {"ordinal": 5, "offset": 0, "rows": 1}}


def test_isolated_documents_have_bounds_where_they_begin(corpus: Path) -> None:
    cfg = jsonl(corpus, "data.isolate_documents=true", "trainer.micro_batch=2")
    for batch in islice(loader(cfg), 12):
        flat = batch.inputs.flatten()
        bounds = {0, 16, 32} | {int(i) for i in np.flatnonzero(flat.numpy() == SEPARATOR)}
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == sorted(bounds)
    assert next(iter(loader(jsonl(corpus)))).cu_seqlens is None


@pytest.mark.parametrize("workers", [0, 1])
def test_one_document_per_row_truncates_and_pads_and_counts_both(corpus: Path, workers: int) -> None:
    cfg = jsonl(corpus, "data.packing=document", "data.isolate_documents=true", f"data.num_workers={workers}")
    want = {text[:16] for text in texts() if text}
    made, seen = loader(cfg), []
    counts: Counter[str] = Counter()
    for batch in islice(made, 12):  # 12 documents that are not empty: at least the first of each lane's epoch
        counts.update(batch.counts)
        inputs, targets = batch.inputs[0], batch.targets[0]
        length = int((targets != -100).sum())
        assert inputs[0] == SEPARATOR and (targets[length:] == -100).all() and (inputs[length:] == SEPARATOR).all()
        assert torch.equal(inputs[1:length], targets[: length - 1])
        assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == (
            [0, 16] if length == 16 else [0, length, 16]
        )
        seen.append(ByteTokenizer().decode(targets[:length]))
    assert set(seen) <= want and counts["tokens"] + counts["padding"] == 12 * 16
    pairs = [len(text) + 1 for text in texts() for one in seen if text and text[:16] == one]
    assert counts["truncated"] == sum(max(0, n - 16) for n in pairs)
    assert counts["padding"] == sum(max(0, 16 - n) for n in pairs)


def test_a_program_with_workers_exits(corpus: Path) -> None:
    """Workers survive the SIGTERM that Python sends its children at exit, so they must be told to stop."""
    code = f"""
from tests.data_helpers import config, loader
made = loader(config("data=jsonl", "data.train=[{corpus}]", "data.num_workers=2"))
batches = iter(made)
next(batches)
print("read")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "read", "")


def test_changed_data_are_rejected_with_everything_that_changed(corpus: Path, tmp_path: Path) -> None:
    state = through_json(next(steps(jsonl(corpus)))[2])
    other = write_jsonl(
        tmp_path / "a.jsonl", [*texts()[:-1], texts()[-1][:-1] + "!"]
    )  # same length, one letter differs
    cases = {
        "files": jsonl(other),
        "context": jsonl(corpus, "trainer.context=32"),
        "seed": jsonl(corpus, "seed=1"),
        "packing": jsonl(corpus, "data.packing=document"),
        "global_batch": jsonl(corpus, "trainer.global_batch=8"),
        "text_field": jsonl(corpus, "data.text_field=title"),
        "shuffle": jsonl(corpus, "data.shuffle=false"),
        "isolate_documents": jsonl(corpus, "data.isolate_documents=true"),
    }
    for name, cfg in cases.items():
        with pytest.raises(ConfigError, match=rf"the data differ.*\({name}: [^;]*\), and a run keeps its data"):
            loader(cfg, state=state)
    with pytest.raises(ConfigError) as error:
        loader(jsonl(other, "trainer.context=32", "seed=1"), state=state)
    assert all(f"{name}: " in str(error.value) for name in ("files", "context", "seed"))
    assert "context: 16 -> 32" in str(error.value) and "\n" not in str(error.value)


def test_another_tokenizer_is_rejected_at_resume(corpus: Path) -> None:
    cfg = jsonl(corpus)
    state = merge_states([loader(cfg).state_dict()])
    state["fingerprint"]["tokenizer"] = "sentencepiece:0123"
    with pytest.raises(ConfigError, match=r"\(tokenizer: sentencepiece:0123 -> byte:1\)"):
        loader(cfg, state=state)


def test_a_missing_rank_or_a_state_within_a_step_is_rejected(corpus: Path) -> None:
    made = [loader(jsonl(corpus, "trainer.micro_batch=1"), rank, 2) for rank in range(2)]
    for one in made:
        list(islice(one, 2))
    states = [one.state_dict() for one in made]
    assert merge_states(states[::-1])["lanes"] == merge_states(states)["lanes"]
    for wrong in (states[:1], [states[0], states[0]]):
        with pytest.raises(ConfigError, match="a rank's state is missing"):
            merge_states(wrong)
    next(iter(made[1]))
    with pytest.raises(ConfigError, match="saved within a step"):
        merge_states([states[0], made[1].state_dict()])


def test_a_batch_that_cannot_be_divided_is_rejected(corpus: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trainer.global_batch=4 must be a multiple of trainer.micro_batch=2 times 4"
    ):
        loader(jsonl(corpus, "trainer.micro_batch=2"), 0, 4)


@pytest.mark.parametrize("empty", [1, 7])
def test_some_empty_documents_are_passed_over_however_often_they_come(tmp_path: Path, empty: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*("" for _ in range(empty)), "the only text " * 4])
    for seed in range(3):
        assert len(list(islice(loader(jsonl(path, f"seed={seed}")), 200))) == 200


def test_only_empty_documents_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "", ""])
    with pytest.raises(Exception, match="every document of the training data that lane .* reads is empty"):
        next(iter(loader(jsonl(path))))
    assert build_tokenizer(jsonl(path)).fingerprint == "byte:1"
