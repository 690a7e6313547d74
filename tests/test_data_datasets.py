"""Claims about data=datasets: what `datasets` opens is read by random access, resumes exactly and is fingerprinted."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data import dataset_corpus, sources
from data.build import build_corpus, build_tokenizer, check_names_held_out, heldout_documents
from data.describe import describe
from data.prepare import prepare
from data.sources import ChangedError
from eval import preflight
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from tests.data_helpers import config, loader, steps, texts, tokens_of, write_jsonl, write_parquet

DOCUMENTS = texts()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in every format, in the order of DOCUMENTS."""
    import datasets

    folder = tmp_path_factory.mktemp("books")
    write_jsonl(folder / "json/train.jsonl", DOCUMENTS)
    write_jsonl(folder / "json/validation.jsonl", DOCUMENTS[5:])
    write_parquet(folder / "parquet/train.parquet", DOCUMENTS, row_group_size=4)
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": list(range(len(DOCUMENTS)))})
    table.to_csv(folder / "csv/train.csv", index=False)
    table.save_to_disk(folder / "one")
    datasets.DatasetDict(train=table, held=table.select(range(3))).save_to_disk(folder / "several")
    return folder


def of(path: Any, *overrides: str) -> Config:
    return config("data=datasets", f"data.path={path}", "data.num_workers=0", *overrides)


def in_files(books: Path, *overrides: str) -> Config:
    return config("data=jsonl", f"data.train=[{books}/json/train.jsonl]", "data.num_workers=0", *overrides)


FORMATS = ["json", "json/train.jsonl", "parquet", "parquet/train.parquet", "csv/train.csv", "one", "several"]


def test_every_format_gives_the_same_steps_as_its_documents_in_files(books: Path) -> None:
    expected = tokens_of(in_files(books), 8)
    for name in FORMATS:
        assert (tokens_of(of(books / name), 8) == expected).all(), name
    by_builder = of("csv")
    by_builder.data.data_files = compose(
        ["data=datasets", "data.path=csv", f"data.data_files={{train: {books}/csv/train.csv}}"]
    ).data.data_files
    assert (tokens_of(by_builder, 8) == expected).all()


def test_a_run_resumes_exactly_at_any_step_on_other_numbers_of_ranks_and_workers(books: Path) -> None:
    cfg = of(books / "json")
    whole = [(inputs.tolist(), targets.tolist()) for (inputs, targets, _), _ in zip(steps(cfg), range(9))]
    states = [state for (*_, state), _ in zip(steps(cfg), range(6))]
    for after, world, workers in ((1, 2, 0), (4, 1, 2), (6, 4, 0)):
        resumed = steps(
            of(books / "json", f"data.num_workers={workers}"), world, json.loads(json.dumps(states[after - 1]))
        )
        for expected, (inputs, targets, _) in zip(whole[after:], resumed):
            assert (inputs.tolist(), targets.tolist()) == expected


def test_splits_slices_titles_and_held_out_documents(books: Path) -> None:
    corpus = build_corpus(of(books / "several", "data.train=[train,held]"), "train")
    assert [corpus.read(i).text for i in range(len(corpus))] == [*DOCUMENTS, *DOCUMENTS[:3]]
    assert corpus.locate(len(DOCUMENTS) + 1).endswith("several held document 1")
    assert corpus.sizes().tolist() == [len(text) for text in [*DOCUMENTS, *DOCUMENTS[:3]]]
    sliced = of(books / "json", "data.title_field=title")
    sliced.data.train = ["train[3:6]"]
    documents = [build_corpus(sliced, "train").read(i) for i in range(3)]
    assert [d.text for d in documents] == DOCUMENTS[3:6] and [d.title for d in documents] == [
        f"book {i}" for i in (3, 4, 5)
    ]
    for folder, spec, wanted in (
        ("one", "train[3:6]", DOCUMENTS[3:6]),
        ("several", "train[-2:]", DOCUMENTS[-2:]),
        ("several", "train[:2]+held", [*DOCUMENTS[:2], *DOCUMENTS[:3]]),
    ):
        saved = of(books / folder)
        saved.data.train = [spec]
        corpus = build_corpus(saved, "train")
        assert [corpus.read(i).text for i in range(len(corpus))] == wanted
        assert corpus.sizes().tolist() == [len(text) for text in wanted]
    held = of(books / "json", "data.validation=[validation]")
    check_names_held_out(held)
    given = list(heldout_documents(held, build_tokenizer(held), "validation"))
    assert [d.num_bytes for d in given] == [len(text) for text in DOCUMENTS[5:]]
    with pytest.raises(ConfigError, match="data.validation is empty, so loss by position .* give it splits"):
        check_names_held_out(of(books / "json"))
    assert describe(held)["validation"] == {"shards": 0, "documents": 8, "bytes": sum(map(len, DOCUMENTS[5:]))}


def test_a_mistyped_split_is_found_before_the_first_step(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = of(books / "several", "data.validation=[hedl]")
    saved = of(books / "several")
    for spec, problem in (
        ("hedl[:2]", "there is no split hedl.*; legal: train, held"),
        ("train[:x]", "Unrecognized"),
        ("train[20:10]", r"train\[20:10\] holds no documents"),
    ):
        saved.data.train = [spec]
        with pytest.raises(ConfigError, match=f"^data.train: {problem}"):
            build_corpus(saved, "train")
    with pytest.raises(ConfigError, match="^data.validation: there is no split hedl; legal: train, held"):
        preflight.check_held_out(cfg, build_tokenizer(cfg))
    cfg.data.validation = ["held"]
    cfg.eval.context = 14
    assert preflight.check_held_out(cfg, build_tokenizer(cfg)) == []
    monkeypatch.setattr(preflight, "build_tokens", lambda *_: pytest.fail("opened"))
    on_hub = of("owner/name", "data.validation=[validation]")
    assert preflight.check_held_out(on_hub, build_tokenizer(on_hub)) == []


def test_the_fingerprint_is_of_the_documents_not_of_the_cache(books: Path, cache: Path, tmp_path: Path) -> None:
    cfg = of(books / "json/train.jsonl")
    first = loader(cfg).state_dict()
    shutil.rmtree(cache)
    loader(cfg, state=first)  # rebuilds the cache
    copy = write_jsonl(tmp_path / "copy.jsonl", DOCUMENTS)
    assert loader(of(copy)).fingerprint == first["fingerprint"]
    write_jsonl(copy, [DOCUMENTS[0], "x" + DOCUMENTS[1][1:], *DOCUMENTS[2:]])
    with pytest.raises(ConfigError, match=r"the data differ from those of the checkpoint \(files: "):
        loader(of(copy), state=first)


def test_another_process_maps_the_same_files_or_opens_them_again(books: Path, cache: Path, tmp_path: Path) -> None:
    copy = write_jsonl(tmp_path / "copy.jsonl", DOCUMENTS)
    pickled = pickle.dumps(build_corpus(of(copy), "train"))
    assert pickle.loads(pickled).read(7).text == DOCUMENTS[7]
    shutil.rmtree(cache)
    assert pickle.loads(pickle.dumps(pickle.loads(pickled))).read(7).text == DOCUMENTS[7]
    shutil.rmtree(cache)
    write_jsonl(copy, DOCUMENTS[1:])
    with pytest.raises(ChangedError, match="copy.jsonl has changed since this run opened its data"):
        pickle.loads(pickled).read(7)


def test_missing_texts_are_empty_and_bad_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["whole", None, b"ab\xffc"])
    corpus = build_corpus(of(path), "train")
    assert [corpus.read(i).text for i in range(3)] == ["whole", "", "ab\ufffdc"]
    assert corpus.read(2).flags == {"bad_utf8": 1} and corpus.sizes().tolist() == [5, 0, 4]


def test_prepared_from_datasets_gives_the_same_steps(books: Path, tmp_path: Path) -> None:
    cfg = of(books / "one")
    prepare(cfg, tmp_path / "out", processes=1, part_mb=0.0001)
    maps = config("data=memmap", f"data.train=[{tmp_path}/out]")
    assert (tokens_of(maps, 6) == tokens_of(cfg, 6)).all()
    assert loader(maps).fingerprint == loader(cfg).fingerprint


def test_a_data_set_of_the_hub_is_read_at_one_commit(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []
    head = ["c1"]

    def info(self: Any, repo: str, revision: str | None = None) -> Any:
        if revision == "gone":
            raise OSError("no network")
        return SimpleNamespace(sha=revision or head[0])

    def opened(path: str, name: str | None, **more: Any) -> Any:
        asked.append((path, name, more["revision"], more["split"], more["streaming"]))
        return original("json", data_files=f"{books}/json/train.jsonl", split=more["split"])

    original = datasets.load_dataset
    monkeypatch.setattr(sources, "_COMMITS", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", opened)
    cfg = of("some/one", "data.config_name=en")
    state = loader(cfg).state_dict()
    assert asked == [("some/one", "en", "c1", "train", False)] and state["fingerprint"]["commit"] == "c1"
    head[0] = "c2"
    sources._COMMITS.clear()
    assert loader(cfg, state=state).fingerprint == state["fingerprint"] and asked[-1][2] == "c1"
    assert build_corpus(cfg, "validation").fingerprint()["commit"] == "c1", "as the training documents"
    assert sources.hub_commit("some/one", "gone") == "gone", "without a network the revision is left to `datasets`"


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["data.path={books}/nowhere"], "data.path=.*/nowhere cannot be opened: Couldn't find any data file"),
        (["data.path={books}/json", "data.train=[dev]"], r'data.train: Unknown split "dev". Should be one of'),
        (["data.path={books}/several", "data.train=[dev]"], "data.train: there is no split dev; legal: train, held"),
        (["data.path={books}/json", "data.text_field=body"], "data.text_field=body is not a field .*: text, title"),
        (["data.path={books}/csv/train.csv", "data.text_field=n"], "data.text_field=n of .* holds int64, not text"),
        (["data.path={books}/json", "data.title_field=x"], "data.title_field=x is not a field .*: text, title"),
        (["data.path={books}/json", "data.config_name=xx"], "data.config_name=xx: BuilderConfig 'xx' not found"),
        (["data.path=books/nowhere.csv"], "data.path=books/nowhere.csv does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_named_in_one_line(books: Path, overrides: list[str], words: str) -> None:
    cfg = config("data=datasets", *(text.replace("{books}", str(books)) for text in overrides))
    with pytest.raises(ConfigError, match=words) as error:
        build_corpus(cfg, "train")
    assert "\n" not in str(error.value)


def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'some/one' on the Hub\n(timeout)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(dataset_corpus, "hub_commit", lambda repo, revision: revision)
    with pytest.raises(
        ConfigError, match=r"data.path=some/one cannot be opened: .*\(timeout\); without a network, name"
    ):
        build_corpus(of("some/one"), "train")
    with pytest.raises(ConfigError, match="data.path is required with data.kind=datasets"):
        compose(["data=datasets"])


def test_reading_a_document_costs_no_others(tmp_path: Path) -> None:
    """A read maps one row, whatever the size of the record batches that the writer chose."""
    path = write_jsonl(tmp_path / "many.jsonl", [f"{i} " * 50 for i in range(2000)])
    corpus = build_corpus(of(path), "train")
    order = np.random.default_rng(0).permutation(2000)[:200]
    assert all(corpus.read(int(i)).text == f"{i} " * 50 for i in order)
