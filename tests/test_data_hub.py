"""Claims about data=pg19, with a local folder in place of the Hub: one listing per job, one commit for a whole run."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data import prepare as preparing
from data import sources
from data.build import build_corpus, build_tokenizer, heldout_documents
from data.describe import describe
from data.loader import check_fingerprint, merge_states
from ovq import processes
from ovq.compose import compose
from ovq.config import Config, save
from ovq.errors import ConfigError
from ovq.inference.run import load_run
from ovq.train.checkpoint import Checkpointer
from tests.data_helpers import config, loader, steps, texts, write_parquet
from tests.helpers import extra_of, small_config, small_model


class Hub:
    """A dataset repository with commits, each a folder of files in the layout of PG19's Parquet copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.head = ""
        self.online = True
        self.requests: Counter[str] = Counter()

    def commit(self, name: str, train: list[list[str]], heldout: list[str]) -> None:
        self.head = name
        for number, documents in enumerate(train):
            path = self.root / name / f"data/train-{number:05d}-of-{len(train):05d}-6a5f1c.parquet"
            write_parquet(path, documents, row_group_size=3)
        for split in ("validation", "test"):
            write_parquet(self.root / name / f"data/{split}-00000-of-00001-1b2c3d.parquet", heldout)
        (self.root / name / "README.md").write_text("a card")

    def info(self, repo: str, revision: str | None = None, **_: Any) -> Any:
        self.request("commit")
        assert repo == "emozilla/pg19"
        commit = revision or self.head
        if not (self.root / commit).is_dir():
            raise ValueError(f"404 Client Error: revision {commit}\n\nnot found")
        return SimpleNamespace(sha=commit)

    def tree(self, repo: str, *, repo_type: str, revision: str, recursive: bool) -> Any:
        from huggingface_hub.hf_api import RepoFile, RepoFolder

        self.request("listing")
        assert repo_type == "dataset" and recursive
        yield RepoFolder(path="data", oid="0")
        for path in sorted((self.root / revision).rglob("*.*"), reverse=True):
            # The hash of a large file is that of its contents; here name and commit stand in for them.
            lfs = {"size": path.stat().st_size, "oid": f"{revision}-{path.name}", "pointerSize": 1}
            yield RepoFile(path=str(path.relative_to(self.root / revision)), size=path.stat().st_size, oid="1", lfs=lfs)

    def download(self, repo: str, inside: str, *, repo_type: str, revision: str) -> str:
        self.request("download")
        assert (repo, repo_type) == ("emozilla/pg19", "dataset")
        return str(self.root / revision / inside)

    def open(self, path: str, mode: str, *, revision: str) -> Any:
        self.request("footer")
        prefix = f"hf://datasets/emozilla/pg19@{revision}/"
        assert mode == "rb" and path.startswith(prefix)
        return open(self.root / revision / path[len(prefix) :], mode)

    def request(self, what: str) -> None:
        self.requests[what] += 1
        if not self.online:
            raise ConnectionError("Name or service\nnot known")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=hub.info, list_repo_tree=hub.tree)
    )
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(open=hub.open))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    forget()
    hub.commit("first", [texts()[:6], texts()[6:]], texts()[5:8])
    return hub


def forget() -> None:
    """Clear what this process has cached about the Hub, as in a new process."""
    sources._list_hub.cache_clear()
    sources._COMMITS.clear()


def pg19(revision: str | None = None) -> Config:
    return config("data=pg19", "data.num_workers=0", f"data.revision={revision or 'null'}")


def test_the_shipped_config_pins_a_commit_and_reads_pg19s_fields() -> None:
    data = compose(["data=pg19"]).data
    assert data.revision is not None and len(data.revision) == 40 and int(data.revision, 16)
    assert (data.text_field, data.title_field) == ("text", "short_book_title")
    assert dict(data.words) == {"train": 1973136207, "validation": 3007061, "test": 6966499}


def test_all_splits_take_one_listing_and_each_file_one_download(hub: Hub) -> None:
    cfg = pg19("first")
    corpora = [build_corpus(cfg, split) for split in ("train", "validation", "test")]
    assert [len(corpus) for corpus in corpora] == [13, 3, 3]
    assert hub.requests == {"commit": 1, "listing": 1, "footer": 4}, "nothing is downloaded before a document is read"
    assert [corpora[0].read(i).text for i in range(13)] == texts()
    assert hub.requests["download"] == 2 and corpora[0].read(7).title == "train-00001-of-00002-6a5f1c book 1"
    assert corpora[0].fingerprint()["commit"] == "first"


def test_a_repository_or_a_folder_of_it_stands_for_the_files_of_its_kind(hub: Hub) -> None:
    cfg = pg19("first")
    for pattern in ("hf://datasets/emozilla/pg19", "hf://datasets/emozilla/pg19@first/data"):
        cfg.data.train = [pattern]
        corpus = build_corpus(cfg, "train")
        assert len(corpus) == 19, "two shards, and those of the held-out splits"
    cfg.data.train = ["hf://datasets/emozilla/pg19/data/train-00001-of-00002-6a5f1c.parquet"]
    assert len(build_corpus(cfg, "train")) == 7
    cfg.data.train = ["hf://datasets/emozilla/pg19/nowhere"]
    with pytest.raises(ConfigError, match="pg19/nowhere: missing"):
        build_corpus(cfg, "train")


def test_one_rank_queries_the_hub_for_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    alone = [batch.inputs for batch in islice(loader(pg19("first")), 16)]
    wire: list[Any] = []

    def broadcast(box: list[Any], src: int, **_: Any) -> None:
        if dist.get_rank() == src:
            wire[:] = [pickle.dumps(box)]
        box[:] = pickle.loads(wire[0])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(processes, "any_flag", bool)
    hub.requests.clear()
    rows: dict[int, list[torch.Tensor]] = {}
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        forget()  # every rank is a separate process
        rows[rank] = [batch.inputs for batch in islice(loader(pg19("first"), rank, 4), 4)]
    assert hub.requests["commit"] == hub.requests["listing"] == 1 and hub.requests["footer"] == 2
    assert all(torch.equal(alone[4 * step + rank], rows[rank][step]) for step in range(4) for rank in range(4))


def test_a_resumed_run_reads_the_commit_it_started_with(hub: Hub) -> None:
    unbroken = list(islice(steps(pg19()), 8))
    forget()
    state = list(islice(steps(pg19()), 3))[-1][2]
    assert state["fingerprint"]["commit"] == "first"

    hub.commit("second", [texts()[::-1]], texts()[:3])  # the branch moves on
    forget()
    list(heldout_documents(pg19(), build_tokenizer(pg19()), "validation"))  # as in train.py, before the data resume
    resumed = list(islice(steps(pg19(), state=state), 5))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(resumed, unbroken[3:], strict=True))
    tokenizer = build_tokenizer(pg19())
    held_out = [d.num_bytes for d in heldout_documents(pg19(), tokenizer, "validation")]
    assert held_out == [len(text) for text in texts()[5:8]], "held-out documents come from the same commit"

    forget()
    assert loader(pg19()).fingerprint["commit"] == "second", "a new run reads the newest"
    forget()
    with pytest.raises(ConfigError, match="commit: first -> second"):
        loader(pg19("second"), state=merge_states([state]))


@pytest.mark.parametrize(
    ("kind", "was", "now", "same"),
    [
        ("parquet", "a" * 40, "b" * 40, True),  # only the card of the data set has changed
        ("datasets", None, "a" * 40, True),  # begun without a network
        ("datasets", "a" * 40, "main", True),  # resumed without one
        ("datasets", "a" * 40, "b" * 40, False),  # its hash covers a sample of the documents
    ],
)
def test_another_commit_of_the_same_files_is_no_other_data(kind: str, was: Any, now: Any, same: bool) -> None:
    saved, current = ({"b.kind": kind, "b.files": "1", "b.commit": commit} for commit in (was, now))
    if same:
        check_fingerprint(saved, current)
        current["b.files"] = "2"
    with pytest.raises(ConfigError, match="b.commit: .* -> "):
        check_fingerprint(saved, current)


def test_an_evaluation_reads_the_commit_that_the_run_was_trained_on(hub: Hub, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cfg = small_config("sw", "data=pg19", "data.revision=null", "data.num_workers=0", "tokenizer=byte")
    save(cfg, run_dir)
    model = small_model("sw", vocab_size=build_tokenizer(cfg).vocab_size)
    extra = extra_of(1) | {"data": loader(cfg).state_dict()}
    Checkpointer(run_dir, asynchronous=False).save(1, model, torch.optim.SGD(model.parameters()), extra)
    hub.commit("second", [texts()[::-1]], texts()[:3])
    forget()
    run = load_run(run_dir, ["data.num_workers=0"])
    held_out = [d.num_bytes for d in heldout_documents(run.cfg, run.tokenizer, "validation")]
    assert held_out == [len(text) for text in texts()[5:8]]
    run = load_run(run_dir, ["data.revision=second"])
    assert [d.num_bytes for d in heldout_documents(run.cfg, run.tokenizer, "validation")] != held_out


def test_a_preparation_that_was_interrupted_continues_at_its_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_make_all", interrupted)
        preparing.prepare(pg19(), tmp_path / "out", processes=1)
    hub.commit("second", [texts()[::-1]], texts()[:3])
    for _ in ("continued", "finished"):
        forget()
        index = preparing.prepare(pg19(), tmp_path / "out", processes=1)
        assert {split["source"]["commit"] for split in index["plan"]["splits"].values()} == {"first"}
    (tmp_path / "out" / preparing.PLAN).write_text("{")
    with pytest.raises(ConfigError, match="unfinished.json is damaged"):
        preparing.prepare(pg19(), tmp_path / "out", processes=1)


def test_without_a_network_the_error_is_one_line_with_a_remedy(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(ConfigError) as error:
        loader(pg19("first"))
    assert "\n" not in str(error.value)
    assert "emozilla/pg19/data/train-*.parquet (revision first) cannot be listed: Name or service not known" in str(
        error.value
    )
    assert "python -m data.prepare" in str(error.value)
    assert "cannot be listed" in describe(pg19("first"))["train"]["error"]


def test_an_unknown_revision_and_a_missing_shard_are_named(hub: Hub) -> None:
    with pytest.raises(
        ConfigError, match="revision third.* cannot be listed: 404 Client Error: revision third not found"
    ):
        loader(pg19("third"))
    next((hub.root / "first/data").glob("train-00001*")).unlink()
    with pytest.raises(ConfigError, match="train-00001-of-00002: missing"):
        loader(pg19("first"))


def test_a_dry_run_lists_the_shards_without_opening_them(hub: Hub) -> None:
    found = describe(pg19("first"))
    assert found["train"]["shards"] == 2 and found["train"]["commit"] == "first" and found["train"]["bytes"] > 0
    assert hub.requests == {"commit": 1, "listing": 1}
