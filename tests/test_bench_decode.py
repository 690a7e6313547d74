"""Claims about the decoding benchmark: each row says how its context was reached, what it holds, and when it failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench import decode
from eval.bench.reading import Reader
from eval.bench.steps import Plan, config_of
from ovq.mixers import attention_layer
from tests.helpers import TINY, small_model

SMALL = [*TINY, "threads=1", "contexts=[16,100,600]", "read_limit=100", "piece=32", "tokens=3"]


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = decode.main([*SMALL, *arguments, f"out={out}"])
    return status, json.loads(out.read_text())


def test_all_contexts_are_measured_and_only_caches_of_everything_are_filled(tmp_path: Path) -> None:
    names = ["sw_ovq", "gdn", "std_att", "sw_nope"]
    status, found = run(tmp_path / "a.json", f"models=[{','.join(names)}]", "model.mixers.sliding_window.window=9")
    assert status == 0 and found["finished"] and "command" in found["machine"]
    rows = {(row["model"], row["context"]): row for row in found["rows"]}
    assert list(rows) == [(name, context) for name in names for context in (16, 100, 600)]
    for (name, context), row in rows.items():
        filled = context == 600 and name in ("std_att", "sw_nope")
        assert row["reached"] == ("filled" if filled else "read")
        pieces = {16: 1, 100: 3, 600: 1 if filled else 16}[context]
        assert len(row["piece_ms"]) == pieces and len(row["token_ms"]) == 3 and row["mode"] == "eager"
        assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] == 1e3 / row["token_median_ms"]
    # Keys and values of two heads of 16, in float32: of all tokens, and of a window.
    assert rows["std_att", 600]["state_bytes"] == 2 * 600 * 2 * 2 * 16 * 4
    assert rows["sw_nope", 600]["state_bytes"] == (600 + 8) * 2 * 2 * 16 * 4
    assert rows["gdn", 16]["state_bytes"] == rows["gdn", 600]["state_bytes"]


def test_what_fails_is_a_row_and_a_graph_that_cannot_be_captured_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = run(tmp_path / "a.json", "models=[sw]", "contexts=[16]", "mode=graph", "device=cpu")
    assert status == 0 and found["rows"][0]["mode"] == "eager"
    assert found["notes"][0].startswith("sw at 16: mode=graph failed, so the step runs eagerly")
    monkeypatch.setattr(decode, "free_memory", lambda device: 10_000)
    status, found = run(tmp_path / "b.json", "models=[std_att]")
    assert status == 1 and found["finished"]
    assert [row.get("error", "")[:22] for row in found["rows"]] == ["", "the state takes 0.0 Gi"]
    assert "error: 1 of 2 measurements failed" in capsys.readouterr().err


def test_a_filled_cache_continues_like_one_that_was_read() -> None:
    """Same sizes and positions, so that the next token costs the same."""
    model = small_model("sw_nope").eval()
    _, state = (out := model(torch.zeros(1, 20, dtype=torch.int64), return_state=True)).logits, out.state
    filled = [decode._fill(mixer, held, 50) for mixer, held in zip(model.mixers(), state)]
    assert [(each.key.shape[1], each.position) for each in filled] == [(6, 50), (50, 50)]


def test_a_repeated_step_copies_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that follows the same context again is written where it was before."""
    cfg = config_of("std_att", 1100, Plan("tiny", 1, 1, 0, tuple(TINY)))
    text_BT = torch.randint(257, (1, 1100), generator=torch.Generator().manual_seed(0))
    reader = Reader(cfg, text_BT, 1100)
    reader.read()
    reader.write()
    token_BT, before = reader.next_BT, reader.state
    reader.run(token_BT, before)
    expected_BT = reader.next_BT
    reader.run(text_BT, None)
    once = decode._same_token(reader)
    monkeypatch.setattr(attention_layer, "Room", None)  # a new one could not be made
    assert [once().tolist() for _ in range(3)] == [expected_BT.tolist()] * 3
