"""Claims about loss by position: what is measured, what is written to the run folder, and how failures are handled."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data import train_tokenizer
from data.build import build_tokenizer
from eval import loss_table, per_position, perplexity
from eval.heldout import HeldOut
from eval.per_position import (
    evaluate,
    evaluate_strictly,
    linear_edges,
    log_edges,
    measure,
    standard_error,
)
from eval.run_table import changes
from ovq import config, processes
from ovq.errors import ConfigError
from ovq.inference.losses import losses_by_position, losses_with_restarts
from ovq.inference.run import check_capacity, choose, load_run, override
from ovq.model import ModelOutput
from ovq.processes import Axis, World
from ovq.train.checkpoint import Checkpointer
from tests.helpers import extra_of, relative_error, small_config, small_model

REPO = Path(__file__).resolve().parent.parent
CONTEXT = 96
LENGTHS = (300, 95, 96, 500, 20, 97)  # bytes of the held-out documents; four of them are long enough


def go_on() -> bool:
    return False


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Overrides for held-out text files of LENGTHS bytes (as many tokens), one document each."""
    rng = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for index, length in enumerate(LENGTHS):
        text = "".join(rng.choice("abcdefg  \n") for _ in range(length))
        (folder / f"{index}.txt").write_text(text)
    return [
        "data=text",
        f"data.train=[{folder}/*.txt]",
        f"data.validation=[{folder}/*.txt]",
        f"eval.context={CONTEXT}",
        "eval.piece=40",
    ]


def run_folder(root: Path, model: str, texts: list[str], *overrides: str, steps: tuple[int, ...] = (3,)) -> Path:
    """A run folder with checkpoints of an untrained model; the weights at step n come from seed n."""
    run_dir = root / f"default,model={model}"
    cfg = small_config(model, *texts, *overrides)
    config.save(cfg, run_dir)
    tokenizer = build_tokenizer(cfg)
    tokenizer.save(run_dir / "tokenizer")
    saver = Checkpointer(run_dir, asynchronous=False)
    for step in steps:
        built = small_model(model, *overrides, vocab_size=tokenizer.vocab_size, seed=step)
        saver.save(step, built, torch.optim.SGD(built.parameters()), extra_of(step))
    return run_dir


class Ruler(torch.nn.Module):
    """Stands in for a model: the loss at position p of a document is p + its first letter's code. Needs the state."""

    def mixers(self) -> list[Any]:
        return []

    def forward(self, tokens_BT: torch.Tensor, *, targets_BT: torch.Tensor, state: Any, **_: Any) -> ModelOutput:
        seen, first = (0, targets_BT[:, :1].double()) if state is None else state
        position = torch.arange(seen, seen + tokens_BT.shape[1], dtype=torch.float64)
        return ModelOutput(loss=position + first, state=[seen + tokens_BT.shape[1], first])


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sw_ovq", "sw_nope"])
@pytest.mark.parametrize("piece", [1000, 37, 8])
def test_losses_in_pieces_equal_those_of_one_pass(name: str, piece: int) -> None:
    torch.manual_seed(0)
    model = small_model(name, vocab_size=61).double().eval()
    model.loss_chunk_tokens = 19
    tokens = torch.randint(61, (2, 131))
    one_pass = model(tokens[:, :-1], targets_BT=tokens[:, 1:], reduction="none").loss
    rows = [row.numpy().astype(np.int32) for row in tokens]
    got = losses_by_position(model, rows, positions=130, piece=piece, device=torch.device("cpu"), should_stop=go_on)
    assert got is not None and got.shape == (2, 130)
    assert relative_error(torch.from_numpy(got), one_pass) < 1e-10


def test_rows_of_unequal_length_do_not_affect_each_other() -> None:
    torch.manual_seed(1)
    model = small_model("sw_ovq", vocab_size=61).double().eval()
    rows = [torch.randint(61, (length,)).numpy().astype(np.int32) for length in (90, 41)]
    common = {"device": torch.device("cpu"), "should_stop": go_on}
    together = losses_by_position(model, rows, positions=89, piece=30, **common)  # type: ignore[arg-type]
    alone = losses_by_position(model, rows[1:], positions=40, piece=40, **common)  # type: ignore[arg-type]
    assert together is not None and alone is not None
    assert relative_error(torch.from_numpy(together[1, :40]), torch.from_numpy(alone[0])) < 1e-10
    assert (together[1, 40:] == 0).all()


@pytest.mark.parametrize("piece", [16, 4096])
def test_context_is_withheld_up_to_what_a_window_sees(piece: int) -> None:
    """Two layers with windows of 4 see 6 tokens back: keeping 6 or more changes nothing, keeping fewer does."""
    common = {"positions": 61, "piece": piece, "device": torch.device("cpu"), "should_stop": lambda: False}
    rows = [torch.randint(61, (length,)).numpy().astype(np.int32) for length in (62, 62, 40)]
    model = small_model("sw", "model.num_layers=2", "model.init_std=0.3").double().eval()
    for mixer in model.mixers():
        mixer.window = 4  # type: ignore[assignment]
    whole = losses_by_position(model, rows, **common)  # type: ignore[arg-type]
    assert whole is not None
    for restart, same in ((6, True), (7, True), (100, True), (5, False), (1, False)):
        got = losses_with_restarts(model, rows, restart=restart, **common)  # type: ignore[arg-type]
        assert got is not None and got.shape == whole.shape
        assert np.allclose(got, whole, rtol=1e-9, atol=1e-9) == same, restart
    by_hand = losses_by_position(model, [rows[0][5:12]], **common | {"positions": 6})  # type: ignore[arg-type]
    got = losses_with_restarts(model, rows, restart=5, **common)  # type: ignore[arg-type]
    assert by_hand is not None and got is not None
    # Positions 10 to 14 of the document are computed from token 5 on.
    np.testing.assert_allclose(got[0, 10], by_hand[0, 5], rtol=1e-9)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 31, 32, 33, 100, 4096, 8193, 65536, 1 << 20])
@pytest.mark.parametrize("edges_of", [log_edges, linear_edges])
def test_buckets_partition_the_positions(edges_of: Any, context: int) -> None:
    edges = edges_of(context)
    assert edges[0] == 0 and edges[-1] == context
    assert all(start < end for start, end in zip(edges, edges[1:]))


def test_log_buckets_are_half_octaves_and_linear_ones_equal() -> None:
    assert log_edges(64) == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    assert log_edges(65)[-2:] == [45, 65]  # no sliver of a bucket at the end
    assert set(np.diff(linear_edges(4096))) == {128}


def test_standard_error_equals_a_hand_computed_example() -> None:
    # Means 1, 2, 6: their mean is 3, squared deviations 4 + 1 + 9 = 14, so sqrt(14 / 2 / 3).
    error = standard_error(np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))
    assert error is not None and error.tolist() == pytest.approx([math.sqrt(7 / 3), 0.0])
    assert standard_error(np.array([[1.0]])) is None


def test_table_holds_the_mean_and_the_error_of_every_bucket(tmp_path: Path, texts: list[str]) -> None:
    cfg = small_config("sw", *texts, "eval.batch=3")
    results = evaluate(Ruler(), cfg, build_tokenizer(cfg), World(), tmp_path / "run", 7, go_on)  # type: ignore[arg-type]
    used = [file.read_text() for file in sorted((tmp_path / "text").glob("*.txt")) if file.stat().st_size >= CONTEXT]
    codes = [ord(text[0]) for text in used]
    assert results is not None and results["documents"] == len(used) == 4

    rows = loss_table.read(tmp_path / "run")
    assert ",".join(list(rows[0])[:8]) == "run,step,context,position_start,position_end,loss,stderr,tokens"
    for kind in ("log", "linear"):
        of_kind = [row for row in rows if row["buckets"] == kind]
        assert [row["position_start"] for row in of_kind[1:]] == [row["position_end"] for row in of_kind[:-1]]
        assert sum(row["tokens"] for row in of_kind) == 4 * CONTEXT
    for row in rows:
        positions = range(row["position_start"], row["position_end"])
        assert row["loss"] == pytest.approx(np.mean(positions) + np.mean(codes))
        assert row["stderr"] == pytest.approx(np.std(codes, ddof=1) / 2)
        assert (row["run"], row["step"], row["context"]) == ("run", 7, CONTEXT)

    nats = sum(CONTEXT * (code + (CONTEXT - 1) / 2) for code in codes)
    words = sum(len(text[:CONTEXT].split()) for text in used)
    assert results["loss"] == pytest.approx(nats / (4 * CONTEXT))
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / (4 * CONTEXT))  # a token is a byte here
    assert results["perplexity"] == math.exp(nats / (4 * CONTEXT))
    assert results["word_perplexity"] == (math.exp(nats / words) if nats / words < 700 else math.inf)


@pytest.mark.parametrize("restart", ["null", "8"])
def test_every_rank_makes_as_many_forward_passes(
    texts: list[str], monkeypatch: pytest.MonkeyPatch, restart: str
) -> None:
    """With parameters in shards, each of them is a collective operation."""
    cfg = small_config("sw", *texts, "eval.documents=3", "eval.batch=2", f"eval.restart={restart}")
    model = small_model("sw", vocab_size=257).eval()
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(processes, "gather_objects", lambda own: [own])
    made = []
    for rank in range(2):
        passes.clear()
        measured = measure(model, cfg, build_tokenizer(cfg), World(rank, 2, data=Axis("data", rank, 2)), go_on)
        assert measured is not None and len(measured.by_bucket["log"]) == 2 - rank
        made.append(len(passes))
    assert made[0] == made[1] > 0


def test_documents_shorter_than_the_context_are_not_used(texts: list[str]) -> None:
    cfg = small_config("sw", *texts)
    heldout = HeldOut(cfg, build_tokenizer(cfg), CONTEXT, 100)
    taken = [excerpt for _ in range(4) for excerpt in heldout.round(2)]
    assert [excerpt.title for excerpt in taken] == ["0", "2", "3", "5"]
    assert {len(excerpt.tokens) for excerpt in taken} == {CONTEXT + 1}
    assert (heldout.given, heldout.seen, heldout.longest) == (4, 6, 500)
    assert heldout.round(2) == []


def test_a_limit_takes_the_first_documents(texts: list[str]) -> None:
    cfg = small_config("sw", *texts)
    heldout = HeldOut(cfg, build_tokenizer(cfg), CONTEXT, 3)
    assert [excerpt.title for _ in range(3) for excerpt in heldout.round(2)] == ["0", "2", "3"]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_context_times_vocabulary_or_width() -> None:
    context, vocab, piece = 4096, 257, 128
    model = small_model("sw_ovq", vocab_size=vocab).eval()
    rows = [np.random.default_rng(0).integers(vocab, size=context + 1).astype(np.int32)]

    def largest(piece: int, chunk: int) -> int:
        model.loss_chunk_tokens = chunk
        with Largest() as seen:
            losses_by_position(
                model,
                rows,
                positions=context,
                piece=piece,
                device=torch.device("cpu"),
                should_stop=go_on,
            )
        return seen.elements

    assert largest(context, context) >= context * vocab  # the measurement can detect it
    assert largest(piece, 64) < 4 * piece * vocab


# --- what the run folder gets ----------------------------------------------------------------------------------------


def test_an_evaluation_replaces_its_own_rows_and_no_others(tmp_path: Path, texts: list[str]) -> None:
    cfg = small_config("sw_ovq", *texts, "eval.documents=2")
    tokenizer = build_tokenizer(cfg)

    def losses(step: int, num_centroids: int | None = None) -> list[float]:
        rows = loss_table.read(tmp_path)
        return [r["loss"] for r in rows if (r["step"], r["num_centroids"]) == (step, num_centroids)]

    for step in (1, 2):
        evaluate_strictly(
            small_model("sw_ovq", vocab_size=257, seed=step), cfg, tokenizer, World(), tmp_path, step, go_on
        )
    first, second = losses(1), losses(2)
    assert first and len(first) == len(second) and first != second

    evaluate_strictly(small_model("sw_ovq", vocab_size=257, seed=5), cfg, tokenizer, World(), tmp_path, 2, go_on)
    assert losses(1) == first
    assert len(losses(2)) == len(second) and losses(2) != second

    replaced = losses(2)
    cfg.eval.num_centroids = 3
    evaluate_strictly(small_model("sw_ovq", vocab_size=257, seed=5), cfg, tokenizer, World(), tmp_path, 2, go_on)
    assert losses(2) == replaced and losses(2, 3) != replaced
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "loss_by_position_96.png",
        "loss_by_position_96_N3.png",
    ]


def test_capacity_changes_in_evaluation_only(tmp_path: Path, texts: list[str]) -> None:
    cfg = small_config("sw_ovq", *texts, "eval.num_centroids=5")
    model, tokenizer = small_model("sw_ovq", vocab_size=257), build_tokenizer(cfg)
    in_use: list[int | None] = []
    hook = model.register_forward_pre_hook(lambda *_: in_use.append(model.mixers()[1].capacity))
    few = evaluate_strictly(model, cfg, tokenizer, World(), tmp_path, 1, go_on)
    hook.remove()
    assert set(in_use) == {5} and model.mixers()[1].capacity == 12
    cfg.eval.num_centroids = None
    as_trained = evaluate_strictly(model, cfg, tokenizer, World(), tmp_path, 1, go_on)
    cfg.eval.num_centroids = 12
    assert evaluate_strictly(model, cfg, tokenizer, World(), tmp_path, 1, go_on) == as_trained != few


@pytest.mark.parametrize("rule", ["fifo", "reservoir", "learned_compression", "kvm"])
def test_every_memory_rule_accepts_another_capacity(rule: str) -> None:
    name = "sw_compression" if rule == "learned_compression" else f"sw_{rule}"
    torch.manual_seed(2)
    tokens = torch.randint(61, (1, 90))
    changed, built = small_model(name), small_model(name, f"model.mixers.{rule}.capacity=5")
    assert not torch.equal(changed(tokens).logits, built(tokens).logits)
    changed.mixers()[1].set_capacity(5)
    assert torch.equal(changed(tokens).logits, built(tokens).logits)


def test_capacity_of_a_model_without_a_dictionary_is_rejected() -> None:
    cfg = small_config("sw", "eval.num_centroids=64")
    with pytest.raises(ConfigError, match=r"eval.num_centroids=64: no layer has a dictionary .*SlidingWindow"):
        check_capacity(small_model("sw"), cfg)
    with pytest.raises(ConfigError, match="eval.num_centroids=0 must be at least 1"):
        check_capacity(small_model("sw_ovq"), small_config("sw_ovq", "eval.num_centroids=0"))


@pytest.mark.parametrize("calls", [1, 2, 4, 9])
def test_stopped_evaluation_returns_none_and_leaves_the_folder_unchanged(
    tmp_path: Path, texts: list[str], calls: int
) -> None:
    cfg = small_config("sw", *texts)
    tokenizer = build_tokenizer(cfg)
    evaluate_strictly(Ruler(), cfg, tokenizer, World(), tmp_path, 1, go_on)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    answers = iter([False] * (calls - 1) + [True])
    assert evaluate(Ruler(), cfg, tokenizer, World(), tmp_path, 2, lambda: next(answers)) is None  # type: ignore[arg-type]
    assert next(answers, None) is None  # every answer was used, including the last, which said stop
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_document_long_enough_is_one_line_and_training_continues(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small_config("sw", *texts, "eval.context=4000")
    assert evaluate(Ruler(), cfg, build_tokenizer(cfg), World(), tmp_path, 5, go_on) == {"documents": 0}  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 5" in line and "eval.context=4000" in line and "longest has 500: set eval.context to that" in line
    assert not (tmp_path / loss_table.FILE).exists()


def test_fewer_documents_than_requested_are_used_and_reported(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small_config("sw", *texts, "eval.documents=9")
    results = evaluate(Ruler(), cfg, build_tokenizer(cfg), World(), tmp_path, 5, go_on)  # type: ignore[arg-type]
    assert results is not None and results["documents"] == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "eval.documents=9: only 4 of 6 validation documents" in line


def test_evaluations_that_write_at_the_same_time_keep_each_others_rows(tmp_path: Path) -> None:
    def write(writer: int) -> None:
        for step in range(8):
            row = dict.fromkeys(loss_table.SCHEMA.names) | {"step": step, "split": str(writer), "loss": 1.0}
            loss_table.write(tmp_path, [row])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(loss_table.read(tmp_path)) == 4 * 8
    assert [path.name for path in tmp_path.iterdir()] == [loss_table.FILE]


@pytest.mark.parametrize("content", [b"", b"PAR1 not a table PAR1", "foreign columns", "flipped bit"])
def test_damaged_table_is_renamed_in_one_line_and_the_evaluation_is_kept(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str], content: bytes | str
) -> None:
    path = tmp_path / loss_table.FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "foreign columns":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        row = dict.fromkeys(loss_table.SCHEMA.names) | {"loss": 2.5}
        whole = loss_table.write(tmp_path, [row]).read_bytes()
        at = whole.index(struct.pack("<d", 2.5))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    damaged = path.read_bytes()
    cfg = small_config("sw", *texts, "eval.documents=4")
    with pytest.raises(ConfigError, match="is not a table of loss by position"):
        loss_table.read(tmp_path)
    results = evaluate(Ruler(), cfg, build_tokenizer(cfg), World(), tmp_path, 5, go_on)  # type: ignore[arg-type]
    assert results is not None and results["documents"] == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is not a table of loss by position" in line
    assert line.endswith("it is now per_position_loss.damaged.parquet")
    assert path.with_name("per_position_loss.damaged.parquet").read_bytes() == damaged
    assert {row["step"] for row in loss_table.read(tmp_path)} == {5}


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["trainer.device=cpu", "eval.batch=2", "logger=none", "trainer.timeout_s=8"], ""),
        (["trainer.precision=fp32", "data.validation=[a]"], "data.validation=[a] trainer.precision=fp32"),
        (["eval.weights=ema"], "eval.weights=ema"),
        (["trainer.context_parallel=2", "trainer.threads=1", "trainer.loss_chunk_tokens=64"], ""),
    ],
)
def test_changes_are_overrides_that_change_losses(overrides: list[str], kept: str) -> None:
    assert changes(overrides, text=True) == kept
    assert "data." not in changes(overrides)


def test_an_evaluation_on_other_text_does_not_replace_the_runs_own(tmp_path: Path, texts: list[str]) -> None:
    run_dir = run_folder(tmp_path, "sw", texts)
    (tmp_path / "other.txt").write_text("some other text " * 50)
    line = [f"run={run_dir}", "context=64"]
    assert per_position.main(line) == 0
    own = loss_table.read(run_dir)
    pictures = {path: path.read_bytes() for path in run_dir.glob("plots/*.png")}
    assert per_position.main([*line, f"data.validation=[{tmp_path}/other.txt]"]) == 0
    both = loss_table.read(run_dir)
    assert both[: len(own)] == own and {row["changes"] for row in both[len(own) :]} == {
        f"data.validation=[{tmp_path}/other.txt]"
    }
    assert {path: path.read_bytes() for path in pictures} == pictures
    assert len(list(run_dir.glob("plots/*.png"))) == 2


def test_open_wandb_run_gets_the_plot_and_the_table(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, Any], int | None]] = []
    run = types.SimpleNamespace(log=lambda row, step=None: logged.append((row, step)))
    fake = types.SimpleNamespace(run=run, Image=lambda path: Path(path), Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = small_config("sw", *texts)
    evaluate(Ruler(), cfg, build_tokenizer(cfg), World(), tmp_path, 5, go_on)  # type: ignore[arg-type]
    ((row, step),) = logged
    assert step == 5 and row["loss_by_position"] == tmp_path / "plots" / "loss_by_position_96.png"
    columns, data = row["loss_by_position_table"]
    assert columns == loss_table.SCHEMA.names and len(data) == len(loss_table.read(tmp_path))


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
import torch
from eval.per_position import evaluate_strictly
from ovq.inference.run import load_run
from ovq import processes

torch.set_num_threads(1)
root = Path(sys.argv[1])
run = load_run(root, ["eval.documents=3", "trainer.device=cpu"])
for stop_after in (4, 1000):
    calls = 0

    def should_stop():  # a signal to rank 1 alone, agreed on by all ranks, as in ovq/train/loop.py
        global calls
        calls += 1
        return processes.any_flag(run.world.rank == 1 and calls > stop_after)

    out = evaluate_strictly(run.model, run.cfg, run.tokenizer, run.world, root, run.step, should_stop)
    table = (root / "per_position_loss.parquet").exists()
    print("RESULT", [calls, table, out], flush=True)
    processes.gather_objects(None)
processes.shutdown()
"""


def two_processes(root: Path) -> list[list[str]]:
    """What each process printed when stopped and when not: calls of should_stop, whether a table exists, the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err[-2000:]
            found.append([line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT")])
    finally:
        for process in started:
            process.kill()
    return found


def test_two_processes_give_the_same_table_as_one(tmp_path: Path, texts: list[str]) -> None:
    """Three documents for two processes: in the second round one makes dummy passes, without which FSDP would hang."""
    run_dir = run_folder(tmp_path, "sw_ovq", texts)
    (stopped, finished), other = two_processes(run_dir)
    assert [stopped, finished] == other  # the same number of calls, the same results
    assert stopped == "[5, False, None]"
    two = loss_table.read(run_dir)

    run = load_run(run_dir, ["eval.documents=3", "trainer.device=cpu"])
    alone = evaluate_strictly(run.model, run.cfg, run.tokenizer, run.world, run_dir, run.step, go_on)
    one = loss_table.read(run_dir)
    assert len(one) == len(two) and [row["tokens"] for row in one] == [row["tokens"] for row in two]
    for column in ("loss", "stderr"):
        assert [row[column] for row in two] == pytest.approx([row[column] for row in one], rel=1e-5)
    calls, table, results = ast.literal_eval(finished)
    assert (calls, table, results) == (2 * math.ceil(CONTEXT / 40), True, pytest.approx(alone, rel=1e-5))


# --- a run folder from the command line ------------------------------------------------------------------------------


def test_command_line_evaluates_the_newest_checkpoint(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw_ovq", texts, steps=(3, 8))
    assert "," in run_dir.name  # as in most run folders' names
    assert per_position.main([f"run={run_dir}", "context=64", "documents=2", "num_centroids=7"]) == 0
    shown = capsys.readouterr().out
    assert "step 8: 2 validation documents of 64 tokens" in shown and str(run_dir / loss_table.FILE) in shown

    cfg = small_config("sw_ovq", *texts, "eval.context=64", "eval.documents=2", "eval.num_centroids=7")
    model = small_model("sw_ovq", vocab_size=257, seed=8).eval()
    evaluate_strictly(model, cfg, build_tokenizer(cfg), World(), tmp_path / "direct", 8, go_on)
    got, want = loss_table.read(run_dir), loss_table.read(tmp_path / "direct")
    assert [{**row, "run": ""} for row in got] == [{**row, "run": ""} for row in want]

    assert per_position.main([f"run={run_dir}", "context=64", "documents=2", "checkpoint=3"]) == 0
    assert "step 3:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "run= is required: the run folder"),
        (["run=no/such/run"], "no/such/run is not a run folder"),
        (
            ["run=RUN", "contxt=5"],
            "there is no option 'contxt'; did you mean context? legal: run, checkpoint, num_centroids, trust, context",
        ),
        (["run=RUN", "eval.contxt=5"], "the run has no setting 'eval.contxt'"),
        (["run=RUN", "model.dim=64"], "model.dim is part of what was trained"),
        (["run=RUN", "context=long"], "context=long must be a whole number"),
        (["run=RUN", "context=0"], "context=0 must be at least 1"),
        (["run=RUN", "split=train"], "split=train is not a legal value; legal: validation, test"),
        (["run=RUN", "checkpoint=77"], "there is no checkpoint"),
        (["run=RUN", "context=9999"], "set eval.context to that or less"),
        (["run=RUN", "num_centroids=8"], "no layer has a dictionary"),
    ],
)
def test_command_line_errors_are_one_line(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    run_dir = run_folder(tmp_path, "sw", texts)
    assert per_position.main([arg.replace("RUN", str(run_dir)) for arg in arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_run_without_a_checkpoint_is_rejected(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw", texts, steps=())
    assert per_position.main([f"run={run_dir}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run_dir} holds no good checkpoint" in line


def test_a_tokenizer_other_than_the_runs_is_rejected(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw", texts)
    card = run_dir / "tokenizer" / "tokenizer.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "fingerprint": "byte:0"}))
    assert per_position.main([f"run={run_dir}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer differs from the one this run was made with" in line
    for damaged in ("", '{"fingerprint": "by', "[]", "{}"):
        card.write_text(damaged)
        assert per_position.main([f"run={run_dir}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{card} cannot be read (" in line


def test_a_run_is_opened_with_its_own_tokenizer_although_the_file_is_another_now(tmp_path: Path) -> None:
    cfg, folder = small_config("sw"), tmp_path / "run" / "tokenizer"
    for name, factor in (("a", 7919), ("b", 104729)):
        (tmp_path / f"{name}.txt").write_text(" ".join(hex(factor * i) for i in range(2000)))
        line = ["data=text", f"data.train=[{tmp_path}/{name}.txt]", "vocab_size=300", f"out={tmp_path}/{name}.model"]
        assert train_tokenizer.main(line) == 0
    cfg.tokenizer.kind, cfg.tokenizer.model_path = "sentencepiece", f"{tmp_path}/a.model"
    first = build_tokenizer(cfg)
    first.save(folder)
    (tmp_path / "b.model").replace(tmp_path / "a.model")
    assert build_tokenizer(cfg, tmp_path / "run", own=True).fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="tokenizer differs from the one this run was made with"):
        build_tokenizer(cfg, tmp_path / "run")


def test_damaged_newest_checkpoint_is_named_and_skipped_and_the_folder_unchanged(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw", texts, steps=(3, 8))
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "saving_step_00000009").mkdir()  # as if a training run were writing it
    part = next((checkpoints / "step_00000008").glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    before = sorted(path.name for path in checkpoints.iterdir())
    with contextlib.ExitStack() as lease:
        assert choose(run_dir, None, lease).name == "step_00000003"
    assert f"{part} is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    with contextlib.ExitStack() as lease:
        for named in ("step_00000003", 3):
            assert choose(run_dir, named, lease) == checkpoints / "step_00000003"


def test_overrides_of_a_run_are_typed_and_checked() -> None:
    texts = small_config("sw_ovq", "data=text", "data.train=[b.txt]")
    cfg = override(texts, ["eval.context=128", "data.validation=[a.txt]", "eval.num_centroids=null"])
    assert (cfg.eval.context, list(cfg.data.validation), cfg.eval.num_centroids) == (128, ["a.txt"], None)
    cfg = override(cfg, ["model.mixers.ovq.backend=reference"])
    assert cfg.model.mixers.ovq.backend == "reference"
    with pytest.raises(ConfigError, match="seed is part of what was trained"):
        override(cfg, ["seed=5"])
    with pytest.raises(ConfigError, match="^data.validation is ignored with data.kind=builtin; leave it out"):
        override(small_config("sw_ovq"), ["data.validation=[a.txt]"])


# --- whole documents -------------------------------------------------------------------------------------------------


def test_the_whole_split_uses_the_published_word_count_if_it_can_be_that_of_this_text(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    counted = sum(len(file.read_text().split()) for file in (tmp_path / "text").glob("*.txt"))
    published = counted + 3
    cfg = small_config("sw", *texts, f"+data.words.validation={published}", "eval.batch=4")
    tokenizer = build_tokenizer(cfg)
    model = small_model("sw_ovq", vocab_size=257).double().eval()
    whole = perplexity.measure(model, cfg, tokenizer, World(), go_on)
    part = perplexity.measure(model, cfg, tokenizer, World(), go_on, documents=2)

    nats, words = [], []
    for file in sorted((tmp_path / "text").glob("*.txt")):
        tokens = torch.tensor([[tokenizer.separator_id, *file.read_bytes()]])
        nats.append(float(model(tokens[:, :-1], targets_BT=tokens[:, 1:]).loss.detach()))
        words.append(len(file.read_text().split()))
    assert whole is not None and part is not None
    assert (whole["documents"], whole["tokens"], whole["words"]) == (len(LENGTHS), sum(LENGTHS), published)
    assert whole["loss"] == pytest.approx(sum(nats) / sum(LENGTHS))
    assert whole["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(LENGTHS))
    assert whole["word_perplexity"] == pytest.approx(math.exp(sum(nats) / published))
    assert (part["words"], part["words_are"]) == (sum(words[:2]), "counted")
    assert part["word_perplexity"] == pytest.approx(math.exp(sum(nats[:2]) / sum(words[:2])))

    cfg.data.words["validation"] = 2 * counted  # of another text than data.validation names now
    other = perplexity.measure(model, cfg, tokenizer, World(), go_on)
    assert other is not None and (other["words"], other["words_are"]) == (counted, "counted")
    assert f"data.words.validation={2 * counted} is not the number of words of this text, {counted}" in (
        capsys.readouterr().err
    )


def test_perplexity_from_the_command_line_is_saved_in_the_run_folder(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw", texts)
    assert perplexity.main([f"run={run_dir}", "piece=64"]) == 0
    (left,) = json.loads((run_dir / "perplexity_validation.json").read_text())
    assert (left["step"], left["documents"], left["words_are"]) == (3, len(LENGTHS), "counted")
    assert f"{left['loss']:.5g}" in capsys.readouterr().out
    assert perplexity.main([f"run={run_dir}", "context=64"]) == 2
    assert "there is no option 'context'" in capsys.readouterr().err
    for unread, says in (
        ("eval.documents=1", "use documents="),
        ("eval.restart=16", "legal: eval.split, eval.piece, eval.batch, eval.num_centroids, eval.weights"),
    ):
        assert perplexity.main([f"run={run_dir}", unread]) == 2
        name = unread.partition("=")[0]
        assert capsys.readouterr().err == f"error: {unread}: this tool does not read {name}; {says}\n"


def test_a_perplexity_replaces_only_one_of_the_same_measurement(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(tmp_path, "sw_ovq", texts)
    file = run_dir / "perplexity_validation.json"
    for more in ([], ["documents=1"], ["num_centroids=7"], ["trainer.precision=fp32"], ["documents=1", "piece=64"]):
        assert perplexity.main([f"run={run_dir}", *more]) == 0
    assert [tuple(each[name] for name in perplexity.KEY) for each in json.loads(file.read_text())] == [
        (3, "trained", None, "", None),
        (3, "trained", 7, "", None),
        (3, "trained", None, "trainer.precision=fp32", None),
        (3, "trained", None, "", 1),
    ]
    file.write_text("[3]")
    capsys.readouterr()
    assert perplexity.main([f"run={run_dir}"]) == 2
    assert f"{file} holds no results of this command" in capsys.readouterr().err and file.read_text() == "[3]"
