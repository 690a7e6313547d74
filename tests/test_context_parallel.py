"""Claims about sequences sharded over ranks: R ranks compute what one rank does, with every mixer.

Two ranks (four in the slow tests) are started once for all claims: they compare every mixer on shards with itself on
whole sequences, then train through `train.main` like ranks under torchrun.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from data.loader import Batch
from ovq import processes
from ovq.config import TrainerConfig
from ovq.errors import ConfigError
from ovq.inference.losses import losses_by_position
from ovq.inference.run import load_run
from ovq.model import Transformer, build_model, divides_heads, undivided
from ovq.processes import Axis
from ovq.train import hand_over as handing
from ovq.train.batches import loss_by_source
from ovq.train.metrics import read_rows
from ovq.train.optim import persistent_buffers
from ovq.train.parallelize import recomputed
from tests.helpers import MIXERS, relative_error, small_config, small_model

HEADS = ["model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=4"]  # two query heads share keys and values
Errors = dict[str, float]
VOCAB, ROWS, T = 31, 3, 48  # six chunks of 8; documents and chunks reach from one shard into the next
# Not OVQ, which chooses the nearest centroid: in float32, a sum that rounds differently may choose another one.
TRAIN = [
    *("model=sw_gdn", "model.num_layers=2", "model.dim=32", *HEADS, "model.ffn_dim=48"),
    *("model.mixers.sliding_window.window=7", "model.mixers.gated_deltanet.chunk_size=8"),
    *("data=builtin", "data.isolate_documents=true", "tokenizer=byte", "trainer.device=cpu", "trainer.precision=fp32"),
    *("trainer.context=96", "trainer.lengths={0:48,2:96}", "trainer.global_batch=2", "trainer.steps=4"),
    *("trainer.checkpoint_every=2", "trainer.activation_checkpointing=selective", "trainer.progress=false"),
    *("optim.lr=1e-2", "optim.warmup_steps=1", "eval.context=64", "eval.documents=2"),
]


def model_of(mixer: str) -> Transformer:
    """One layer of the mixer, in float64."""
    others = [f"+model/mixer@model.mixers.{name}={name}" for name in MIXERS if name != "full_attention"]
    cfg = small_config("std_att", *HEADS, "model.num_layers=1", *others, f"model.pattern=[{','.join(MIXERS)}]")
    cfg.model.pattern = [mixer]
    model = build_model(cfg.model, VOCAB)
    model.init_weights(0)
    return model.double().train()


# A mixer supports one of the two ways at least (docs/extending.md).
HEADS_DIVIDED = [name for name in MIXERS if model_of(name).mixers()[0].head_counts() is not None]
HANDED_OVER = [name for name in MIXERS if model_of(name).mixers()[0].differentiable_state]


def batch_of(step: int, packed: bool) -> Batch:
    tokens = torch.randint(VOCAB, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100
    bounds = torch.tensor([0, 5, 30, T, T + 11, T + 41, 2 * T, 3 * T], dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), targets, bounds if packed else None)


def two_steps(model: Transformer, context: Axis, packed: bool, hand_over: bool = False) -> dict[str, torch.Tensor]:
    """Losses, gradients and buffers after two passes, summed over the context axis."""
    for mixer in model.mixers():
        mixer.context_axis = context
        if hand_over:
            handing.hand_over(mixer, context)
    model.collect_health(True)
    results: dict[str, torch.Tensor] = {}
    for step in range(2):  # VQ learns in the first pass what it uses in the second
        batch = batch_of(step, packed).shard(context.rank, context.size)
        out = model(batch.inputs, targets_BT=batch.targets, cu_seqlens=batch.cu_seqlens, z_loss=1e-3)
        parts = {"loss": out.loss, "z_loss": out.z_loss, "aux_loss": out.aux_loss}
        parts = {name: part for name, part in parts.items() if part is not None}
        torch.stack(list(parts.values())).sum().backward()
        results |= {f"{name} {step}": context.sum(part.detach().clone()) for name, part in parts.items()}
    results |= {name: context.sum(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    results |= {f"buffer {index}": buffer for index, buffer in enumerate(persistent_buffers(model))}
    return results | {name: torch.tensor(value) for name, value in model.health().items()}


def errors_of(mixer: str, context: Axis, packed: bool, hand_over: bool = False, recompute: bool = False) -> Errors:
    """Relative difference of every result between whole sequences and shards of them."""
    whole = two_steps(model_of(mixer), Axis("context"), packed)
    model = model_of(mixer)
    if recompute:
        for block in model.blocks():
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
    parts = two_steps(model, context, packed, hand_over)
    assert parts.keys() == whole.keys()
    health = model.health() if hand_over else {}  # each rank has its own, over the tokens up to its last
    return {name: relative_error(parts[name], whole[name]) for name in whole if name not in health}


def losses_of(model: Transformer, context: Axis) -> torch.Tensor:
    """Losses of unequally long rows, in pieces with a carried state; ranks and chunks do not divide a piece evenly."""
    rows = [np.arange(length) ** 2 % VOCAB for length in (46, 31)]
    for mixer in model.mixers():
        mixer.context_axis = context
    losses = losses_by_position(
        *(model.eval(), rows),
        positions=45,
        piece=13,
        device=torch.device("cpu"),
        should_stop=lambda: False,
        context=context,
    )
    assert losses is not None and losses.shape == (2, 45) and not losses[1, 30:].any() and (losses[1, :30] > 0).all()
    return torch.from_numpy(losses)


def evaluated(mixer: str, context: Axis, hand_over: bool) -> Errors:
    """Relative difference between the losses of documents sharded over ranks and those of one rank."""
    model = model_of(mixer)
    for one in model.mixers() if hand_over else ():
        handing.hand_over(one, context)
    return {"losses": relative_error(losses_of(model, context), losses_of(model_of(mixer), Axis("context")))}


def work(rank: int, size: int, ports: list[int], folder: Path, settings: list[str]) -> None:
    """One of `size` ranks: compares all mixers over a context axis of all ranks, then trains with `settings`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    world = processes.init(TrainerConfig(device="cpu", precision="fp32", context_parallel=size))
    errors = {
        f"{mixer}, {'packed' if packed else 'rows'}": errors_of(mixer, world.context, packed, recompute=packed)
        for mixer in HEADS_DIVIDED
        for packed in (False, True)
    }
    errors |= {
        f"{mixer}, handed over{', recomputed' if again else ''}": errors_of(mixer, world.context, False, True, again)
        for mixer in HANDED_OVER
        for again in (False, True)
    }
    errors |= {
        f"{mixer}, evaluated{', handed over' if hand_over else ''}": evaluated(mixer, world.context, hand_over)
        for mixer in MIXERS
        for hand_over in (False, True)
        if hand_over or mixer in HEADS_DIVIDED
    }
    every = processes.gather_objects(errors)
    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(every))
    dist.barrier()
    processes.shutdown()
    os.environ["MASTER_PORT"] = str(ports[1])
    assert train.main([*TRAIN, *settings, f"run_dir={folder / 'run'}"]) == 0


def start(size: int, folder: Path, *settings: str) -> Path:
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (first, second)]
    torch.multiprocessing.spawn(work, args=(size, ports, folder, list(settings)), nprocs=size)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert train.main([*TRAIN, "trainer.micro_batch=2", f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(2, tmp_path_factory.mktemp("two"), "trainer.context_parallel=2", "trainer.micro_batch=2")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(4, tmp_path_factory.mktemp("four"), "trainer.context_parallel=2", "trainer.micro_batch=1")


def check_errors(folder: Path, mixer: str, *cases: str) -> None:
    for errors in json.loads((folder / "errors.json").read_text()):
        for case in cases or ("rows", "packed"):
            assert max(errors[f"{mixer}, {case}"].values()) < 1e-13, errors[f"{mixer}, {case}"]


@pytest.mark.parametrize("mixer", HEADS_DIVIDED)
def test_losses_gradients_and_buffers_of_two_ranks_equal_those_of_one(two: Path, mixer: str) -> None:
    check_errors(two, mixer)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", HEADS_DIVIDED)
def test_losses_gradients_and_buffers_of_four_ranks_equal_those_of_one(four: Path, mixer: str) -> None:
    check_errors(four, mixer)


@pytest.mark.parametrize("mixer", HANDED_OVER)
def test_two_ranks_that_hand_the_state_over_compute_what_one_does(two: Path, mixer: str) -> None:
    check_errors(two, mixer, "handed over", "handed over, recomputed")


@pytest.mark.slow
@pytest.mark.parametrize("mixer", HANDED_OVER)
def test_four_ranks_that_hand_the_state_over_compute_what_one_does(four: Path, mixer: str) -> None:
    check_errors(four, mixer, "handed over", "handed over, recomputed")


def evaluations(mixer: str) -> list[str]:
    return ["evaluated, handed over", *(["evaluated"] if mixer in HEADS_DIVIDED else [])]


@pytest.mark.parametrize("mixer", MIXERS)
def test_losses_of_documents_that_two_ranks_share_equal_those_of_one(two: Path, mixer: str) -> None:
    check_errors(two, mixer, *evaluations(mixer))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_losses_of_documents_that_four_ranks_share_equal_those_of_one(four: Path, mixer: str) -> None:
    check_errors(four, mixer, *evaluations(mixer))


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def check_run(run_dir: Path, one: Path) -> None:
    got, want = steps_of(run_dir), steps_of(one)
    assert len(got) == len(want) == 4
    for exact in ("step", "token_hash", "tokens", "data/bytes", "data/documents"):
        assert [row.get(exact) for row in got] == [row.get(exact) for row in want], exact
    for name in ("loss", "grad_norm", "bits_per_byte"):
        assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=1e-4), name


def evaluations_of(run_dir: Path) -> list[float]:
    return [row["eval/loss"] for row in read_rows(run_dir / "metrics.jsonl") if "eval/loss" in row]


def test_a_run_that_two_ranks_share_sequences_in_logs_what_one_rank_does(two: Path, one: Path) -> None:
    check_run(two / "run", one)
    assert evaluations_of(two / "run") == pytest.approx(evaluations_of(one), rel=1e-4) and len(evaluations_of(one)) == 1


@pytest.mark.slow
def test_a_run_on_two_by_two_ranks_logs_what_one_rank_does(four: Path, one: Path) -> None:
    check_run(four / "run", one)


def test_a_checkpoint_of_ranks_that_share_sequences_is_resumed_and_opened_by_one(two: Path, one: Path) -> None:
    run_dir = two / "run"
    assert load_run(run_dir).step == 4
    with pytest.raises(
        ConfigError, match="^trainer.context_parallel=2: ranks share documents in eval.per_position and"
    ):
        load_run(run_dir, ["trainer.context_parallel=2"])
    branch = f"resume={run_dir / 'checkpoints' / 'step_00000002'}"
    assert train.main([*TRAIN, "trainer.micro_batch=2", "eval.at_end=false", f"run_dir={run_dir}", branch]) == 0
    check_run(run_dir, one)


def test_a_shard_holds_labels_shifted_before_and_packed_rows_end_to_end() -> None:
    tokens = torch.arange(18).view(2, 9)
    rows = Batch(tokens[:, :-1], tokens[:, 1:])
    last = rows.shard(1, 2)
    assert last.inputs.tolist() == [[4, 5, 6, 7], [13, 14, 15, 16]]
    assert last.targets.tolist() == [[5, 6, 7, 8], [14, 15, 16, 17]]
    bounds = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
    packed = Batch(rows.inputs, rows.targets, bounds).shard(1, 2)
    assert packed.inputs.tolist() == [[9, 10, 11, 12, 13, 14, 15, 16]]
    assert packed.cu_seqlens is bounds
    with pytest.raises(ConfigError, match="trainer.context_parallel=3 must divide the 8 tokens of every row"):
        rows.shard(0, 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "ranks"), [(4, 2), (3, 2), (2, 4), (3, 4), (6, 4), (1, 4)])
def test_the_loss_of_each_data_set_is_that_of_all_shards(rows: int, ranks: int, packed: bool) -> None:
    names, sources = ["a", "b"], ["a", "b", "b", "a", "b", "a"][:rows]
    tokens = torch.randint(100, (rows, 8), generator=torch.Generator().manual_seed(rows))
    bounds = torch.tensor([0, 5, 8 * rows], dtype=torch.int32) if packed else None
    whole = Batch(tokens, tokens, bounds, sources=sources)
    shards = [whole.shard(rank, ranks) for rank in range(ranks)]
    parts = [torch.stack(loss_by_source(shard.inputs, shard.sources, names)) for shard in shards]
    assert torch.stack(parts).sum(0).tolist() == torch.stack(loss_by_source(tokens, sources, names)).tolist()
    assert sum(len(shard.inputs.flatten()) for shard in shards) == 8 * rows


@pytest.mark.parametrize(
    ("model", "overrides", "ranks", "says"),
    [
        ("sw_vq", [*HEADS, "model.num_kv_heads=2"], 4, "model.num_kv_heads, which is 2"),
        ("vq", HEADS, 3, "model.num_heads, which is 8"),
        ("vq", [*HEADS, "model.num_heads=12", "model.num_kv_heads=6"], 8, "model.num_heads, which is 12"),
    ],
)
def test_ranks_that_cannot_share_heads_nor_hand_a_state_over_are_one_line(
    model: str, overrides: list[str], ranks: int, says: str
) -> None:
    problem = undivided(small_model(model, *overrides), ranks)
    assert problem.startswith(f"trainer.context_parallel={ranks} must divide {says}") and "\n" not in problem
    advised = int(problem.partition("use trainer.context_parallel=")[2].split()[0])
    assert undivided(small_model(model, *overrides), advised) == ""
    assert undivided(small_model(model, *overrides), 1) == ""


@pytest.mark.parametrize(("model", "ranks"), [("sw_ovq", 3), ("gdn", 8), ("mamba2", 7), ("sw_kvm", 16)])
def test_ranks_that_do_not_divide_the_heads_hand_the_state_over(model: str, ranks: int) -> None:
    made = small_model(model, *HEADS)
    assert undivided(made, ranks) == ""
    assert not any(divides_heads(mixer, ranks) for mixer in made.mixers())
    problem = undivided(made, ranks, isolated=True)  # packed documents have states of their own
    assert problem.startswith(f"trainer.context_parallel={ranks} must divide") and "isolate_documents=true" in problem


def test_documents_stay_apart_in_evaluation_where_the_state_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Axis, "gather", lambda axis, x: x)  # one rank
    model, x = small_model("std_att").eval(), torch.arange(9)[None] % 5
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        want, joined = model(x, cu_seqlens=bounds).logits, model(x).logits
        for mixer in model.mixers():
            handing.hand_over(mixer, Axis("context"))
        assert torch.equal(model(x, cu_seqlens=bounds).logits, want) and not torch.equal(want, joined)


def test_a_mixer_that_knows_nothing_of_ranks_is_refused() -> None:
    model = small_model("sw")
    model.mixers()[0].head_counts = lambda: None  # type: ignore[method-assign]
    model.mixers()[0].differentiable_state = False
    assert undivided(model, 2) == "trainer.context_parallel=2 is not possible: SlidingWindow needs whole sequences"


def test_ranks_that_do_not_divide_the_context_or_the_processes_are_one_line() -> None:
    with pytest.raises(ConfigError, match="trainer.context_parallel=3 must divide trainer.context=32"):
        small_config("sw", "trainer.context=32", "trainer.context_parallel=3")
    cfg = small_config("sw", "trainer.context=32", "trainer.context_parallel=2")
    with pytest.raises(ConfigError, match="trainer.context_parallel=2 must divide the number of processes, 1; start"):
        processes.init(cfg.trainer)
