"""Claims about mixtures: each row's source is a pure function of its number, shares are exact, and runs resume."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from data.build import (
    build_corpus,
    build_tokenizer,
    check_names_held_out,
    heldout_documents,
    shares_of,
    sources_of,
    splits_of,
)
from data.describe import describe
from data.loader import Batch
from data.mixture import MixtureReader
from data.prepare import main as prepare_main
from data.train_tokenizer import main as train_tokenizer
from eval.preflight import check_training_data
from ovq import config as settings
from ovq import identity
from ovq.compose import compose
from ovq.config import Config
from ovq.errors import ConfigError
from ovq.plan import report
from ovq.train.metrics import read_rows
from tests.data_helpers import LENGTHS, config, loader, steps, text_of, tokens_of, write_jsonl, write_parquet
from tests.training import VOCAB, trainer_for


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for split, count in (("train", 3), ("validation", 1)):
        lower = [text_of(length, seed) for seed in range(count) for length in LENGTHS]
        write_jsonl(folder / f"lower-{split}.jsonl", lower)
        write_parquet(folder / f"upper-{split}.parquet", [text.upper() for text in lower[: len(lower) // count]])
    return folder


def mixture(books: Path, *overrides: str, upper: float = 0.7, lower: float = 0.3) -> Config:
    """A mixture of a Parquet file in upper case and a JSON-lines file in lower case."""
    files = {"upper": ("parquet", "parquet", upper), "lower": ("jsonl", "jsonl", lower)}
    parts = [
        f"{name}: {{data: {kind}, train: [{books}/{name}-train.{end}], validation: [{books}/{name}-validation.{end}], "
        f"weight: {weight}}}"
        for name, (kind, end, weight) in files.items()
    ]
    return config("data=mixture", f"data.mixture={{{', '.join(parts)}}}", "data.num_workers=0", *overrides)


def dictionary(cfg: Config) -> str:
    """A mixture's training data, as typed on the command line."""
    parts = [
        f"{name}: {{data: {source.kind}, train: [{','.join(source.train)}], weight: {source.weight}}}"
        for name, source in cfg.data.mixture.items()
    ]
    return f"{{{', '.join(parts)}}}"


def names_of(inputs: torch.Tensor) -> list[str]:
    """The source of each row, judged by the case of its letters."""
    rows = ["".join(chr(i) for i in row if i < 256) for row in inputs.tolist()]
    return ["upper" if row.upper() == row and row.lower() != row else "lower" for row in rows]


# --- which source a row comes from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": 1, "c": 1}, {"a": 50, "b": 49, "c": 1}])
def test_every_source_has_its_share_of_any_first_rows_and_of_every_step(weights: dict[str, float]) -> None:
    total = sum(weights.values())
    for seed in range(3):
        reader = MixtureReader(dict.fromkeys(weights), weights, global_batch=8, seed=seed)  # type: ignore[arg-type]
        names = [reader.source_of(number) for number in range(20_000)]
        counts: Counter[str] = Counter()
        for number, name in enumerate(names, 1):
            counts[name] += 1
            assert all(abs(counts[each] - number * weights[each] / total) < 5 for each in weights)
        for start in range(0, len(names), 8):
            step = Counter(names[start : start + 8])
            assert all(abs(step[each] - 8 * weights[each] / total) < 2 for each in weights)


def test_the_source_of_a_row_depends_on_the_seed_and_its_number_alone() -> None:
    def order(seed: int, batch: int) -> list[str]:
        reader = MixtureReader({"a": None, "b": None}, {"a": 2, "b": 1}, global_batch=batch, seed=seed)  # type: ignore[dict-item]
        return [reader.source_of(number) for number in range(100)]

    assert order(0, 4) == order(0, 16) != order(1, 4)
    assert MixtureReader({"a": None}, {"a": 3}, global_batch=1, seed=0).source_of(10**15) == "a"  # type: ignore[dict-item]


def test_each_lane_reads_of_each_source_what_it_would_read_alone(books: Path) -> None:
    cfg = mixture(books)
    alone = {name: steps(source) for name, source in sources_of(cfg).items()}
    rows: dict[str, list[list[Any]]] = {name: [[] for _ in range(4)] for name in alone}
    for name, stream in alone.items():
        for inputs, targets, _ in islice(stream, 30):
            for lane in range(4):
                rows[name][lane].append((inputs[lane].tolist(), targets[lane].tolist()))
    seen: Counter[tuple[str, int]] = Counter()
    reader = MixtureReader({"upper": None, "lower": None}, shares_of(cfg), global_batch=4, seed=0)  # type: ignore[dict-item]
    for step, (inputs, targets, _) in enumerate(islice(steps(cfg), 30)):
        for lane in range(4):
            name = reader.source_of(4 * step + lane)
            assert (inputs[lane].tolist(), targets[lane].tolist()) == rows[name][lane][seen[name, lane]]
            seen[name, lane] += 1
        assert all(name == reader.source_of(4 * step + lane) for lane, name in enumerate(names_of(inputs)))


def test_steps_do_not_depend_on_ranks_workers_or_micro_batches(books: Path) -> None:
    expected = tokens_of(mixture(books), 6)
    assert (tokens_of(mixture(books, "trainer.micro_batch=2", "data.num_workers=2"), 6, world=2) == expected).all()
    assert not (tokens_of(mixture(books, "seed=1"), 6) == expected).all()


def test_a_schedule_longer_than_one_data_set_is_reported(books: Path) -> None:
    cfg = mixture(books, "data.packing=document", "trainer.steps=50", "trainer.global_batch=4")
    documents = {name: len(tokens) for name, tokens in loader(cfg).tokens.items()}
    lines = check_training_data(cfg, loader(cfg).tokens, build_tokenizer(cfg))
    assert lines == [
        f"trainer.steps=50 is longer than the data: about {200 * share / documents[name]:.3g} epochs of "
        f"data.mixture.{name}.train ({documents[name]:,} documents)"
        for name, share in (("upper", 0.7), ("lower", 0.3))
    ]


def test_a_mixture_resumes_exactly_at_any_step(books: Path) -> None:
    whole = list(islice(steps(mixture(books)), 12))
    for after, world, workers in ((1, 2, 0), (5, 4, 0), (8, 1, 2)):
        state = json.loads(json.dumps(whole[after - 1][2]))
        resumed = steps(mixture(books, f"data.num_workers={workers}"), world, state)
        for (inputs, targets, end), (again, labels, last) in zip(whole[after:], resumed):
            assert (inputs == again).all() and (targets == labels).all() and end["lanes"] == last["lanes"]


def test_isolated_documents_and_one_document_a_row_work_as_for_one_source(books: Path) -> None:
    for batch in islice(loader(mixture(books, "data.isolate_documents=true")), 20):
        starts = batch.cu_seqlens.tolist()
        separators = [i for i, token in enumerate(batch.inputs[0].tolist()) if token == 256]
        assert set(separators) <= set(starts) and starts[-1] == 16
        assert batch.counts[f"tokens/{batch.sources[0]}"] == 16
    padded = [batch for batch in islice(loader(mixture(books, "data.packing=document")), 20)]
    assert all(batch.inputs[0, 0] == 256 for batch in padded) and any("padding" in batch.counts for batch in padded)


def test_a_resumed_mixture_names_what_differs(books: Path) -> None:
    state = loader(mixture(books)).state_dict()
    with pytest.raises(ConfigError, match=r"upper.share: 0.7 -> 0.5; lower.share: 0.3 -> 0.5"):
        loader(mixture(books, upper=1, lower=1), state=state)
    changed = mixture(books)
    changed.data.mixture.lower.train = [f"{books}/lower-validation.jsonl"]
    with pytest.raises(ConfigError, match=r"\(lower.files: "):
        loader(changed, state=state)
    turned = mixture(books)
    turned.data.mixture = {name: turned.data.mixture[name] for name in ("lower", "upper")}
    with pytest.raises(ConfigError, match=r"\(order: .*upper.*lower.* -> .*lower.*upper"):
        loader(turned, state=state)
    assert identity.changed(mixture(books), turned) == [
        "data.mixture (order): ['upper', 'lower'] -> ['lower', 'upper']"
    ]


# --- what the config says --------------------------------------------------------------------------------------------


def test_a_mixture_of_named_data_sets_is_stored_with_all_their_settings() -> None:
    cfg = compose(["data=mixture", "data.mixture={pg19: 3, builtin: {weight: 1}}", "data.packing=document"])
    assert shares_of(cfg) == {"pg19": 0.75, "builtin": 0.25}
    stored = settings.from_dict(settings.to_dict(cfg), stored=True)
    assert identity.changed(cfg, stored) == []
    source = sources_of(stored)["pg19"]
    assert source.data.train[0].startswith("hf://datasets/") and source.data.packing == "document"
    assert (
        cfg.data.kind == "mixture"
        and source.data.kind == "parquet"
        and splits_of(cfg) == ["train", "validation", "test"]
    )
    more = compose(["data=mixture", "data.mixture={pg19: 3}", "data.mixture.builtin=2", "data.mixture.pg19=1"])
    assert shares_of(more) == {"pg19": 1 / 3, "builtin": 2 / 3}


@pytest.mark.parametrize(
    "given,words",
    [
        ("{}", "data.mixture is empty; give it data sets and weights"),
        ("{code: 1}", "data.mixture.code: there is no data set 'code'; legal: builtin, .*{data: parquet, train:"),
        ("{builtin: 0}", "data.mixture.builtin.weight=0.* must be above 0"),
        ("{builtin: much}", "data.mixture.builtin.weight: Value 'much' of type 'str' could not be converted to Float"),
        ("{builtin: {weigth: 1}}", "there is no setting 'data.mixture.builtin.weigth'; legal: data, name"),
        ("{builtin: {shuffle: false}}", "'data.mixture.builtin.shuffle'; data.shuffle holds for the whole mixture"),
        ("{task: 1}", "data.mixture.task is a task; a mixture is made of data sets of text"),
        ("{datasets: 1}", "data.mixture.datasets.path is required"),
        ("3", "data.mixture"),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        compose(["data=mixture", f"data.mixture={given}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["train=[a.txt]", "text_field=body", "title_field=name", "revision=abc", "path=a"])
def test_a_setting_that_only_the_data_sets_of_a_mixture_have_is_refused_for_the_whole(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"data.{key} is ignored with .* data sets: data.mixture.NAME.{key}$"):
        compose(["data=mixture", "data.mixture={builtin: 1}", f"data.{setting}"])
    cfg = compose(["data=mixture", "data.mixture={builtin: 1}"])
    setattr(cfg.data, key, ["a.txt"] if key == "train" else "a")
    settings.from_dict(settings.to_dict(cfg), stored=True)  # an older run may have it


def test_a_mixture_must_be_chosen() -> None:
    with pytest.raises(
        ConfigError, match="data.mixture is set, but data.kind=builtin; a mixture is chosen with data=mix"
    ):
        compose(["data.mixture={builtin: 1}"])


def test_a_source_that_cannot_be_opened_is_named(books: Path) -> None:
    cfg = mixture(books)
    cfg.data.mixture.lower.train = [f"{books}/nothing-*.jsonl"]
    with pytest.raises(ConfigError, match=r"data.mixture.lower: data.train: no file matches .*/nothing-\*.jsonl"):
        loader(cfg)
    assert "no file matches" in describe(cfg)["train lower"]["error"]
    cfg.data.mixture.lower.validation = cfg.data.mixture.upper.validation = []
    with pytest.raises(ConfigError, match="data.mixture.upper.validation is empty, so loss by position cannot be"):
        check_names_held_out(cfg)


def test_a_dry_run_tells_how_often_each_source_is_read(books: Path) -> None:
    cfg = OmegaConf.merge(mixture(books), {"trainer": {"steps": 100}})
    lines = describe(cfg)
    pairs = sum(length + 1 for length in LENGTHS if length)
    assert lines["train upper"] | {"bytes": 0, "shards": 0} == {
        "shards": 0, "missing": 0, "bytes": 0, "documents": len(LENGTHS), "share": 0.7,
        "epochs": pytest.approx(0.7 * 100 * 4 * 16 / pairs),
    }  # fmt: skip
    assert lines["train lower"]["epochs"] == pytest.approx(0.3 * 100 * 4 * 16 / (3 * pairs))
    text = report(cfg, 257, lines, 1, "runs/x")
    assert "data train lower" in text and "0.3 of the rows, read 1.46 times" in text


# --- what else reads a mixture ---------------------------------------------------------------------------------------


def test_bad_documents_of_every_source_can_be_skipped_at_a_resume(books: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a text"}\nno JSON\n{"text": "another"}\n')
    cfg = mixture(books)
    cfg.data.mixture.lower.train = [str(tmp_path / "bad.jsonl")]
    assert {name: source.data.on_bad_shard for name, source in sources_of(cfg).items()} == dict.fromkeys(
        ("upper", "lower"), "error"
    )
    cfg.data.on_bad_shard = "skip"  # as the error says
    assert {source.data.on_bad_shard for source in sources_of(cfg).values()} == {"skip"}


def test_held_out_documents_come_in_turns_from_the_sources_that_have_them(books: Path) -> None:
    cfg = mixture(books)
    given = list(itertools.islice(heldout_documents(cfg, build_tokenizer(cfg), "validation"), 4))
    assert [document.source for document in given] == ["upper", "lower", "upper", "lower"]
    cfg.data.mixture.upper.validation = []
    check_names_held_out(cfg)
    rest = list(heldout_documents(cfg, build_tokenizer(cfg), "validation"))
    assert {document.source for document in rest} == {"lower"} and len(rest) == len(LENGTHS) - 1


def test_a_prepared_mixture_gives_the_same_rows(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = mixture(books)
    given = f"data.mixture={dictionary(cfg)}"
    assert prepare_main(["data=mixture", given, "tokenizer=byte", f"out={tmp_path}", "processes=1"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].partition("use it with: ")[2]
    assert printed.startswith("data=mixture 'data.mixture={upper: {data: memmap, train: [")
    prepared = config("data=mixture", printed.split("'")[1], "data.num_workers=0")
    assert (tokens_of(prepared, 8) == tokens_of(cfg, 8)).all()


def test_a_tokenizer_is_trained_on_all_sources_in_their_shares(books: Path, tmp_path: Path) -> None:
    cfg = mixture(books)
    with pytest.raises(ConfigError, match="data.kind=mixture holds no text"):
        build_corpus(cfg, "train")
    arguments = ["data=mixture", f"data.mixture={dictionary(cfg)}", f"out={tmp_path}/m.model", "vocab_size=310"]
    assert train_tokenizer(arguments) == 0
    tokenizer = build_tokenizer(config("tokenizer=sentencepiece", f"tokenizer.model_path={tmp_path}/m.model"))
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    longer = "".join(piece for piece in pieces if len(piece) > 1)
    assert any(c.isupper() for c in longer) and any(c.islower() for c in longer)


# --- loss by source --------------------------------------------------------------------------------------------------


class Mixed:
    """A loader whose rows come from two sources; in rows of the second, the first half has no labels."""

    micro_batches_per_step = 2

    def __iter__(self) -> Any:
        while True:
            for part in range(2):
                generator = torch.Generator().manual_seed(part)
                tokens = torch.randint(VOCAB, (2, 25), generator=generator)
                targets = tokens[:, 1:].clone()
                targets[1, :12] = -100
                counts = {"bytes": 36, "tokens/whole": 24, "tokens/half": 12}
                yield Batch(tokens[:, :-1], targets, lanes={0: {}, 1: {}}, counts=counts, sources=["whole", "half"])

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_the_loss_of_each_source_is_logged(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "trainer.micro_batch=2", "trainer.steps=1", model="sw")
    trainer.sources, trainer.loader = ["whole", "half", "absent"], Mixed()
    trainer.counted = (*trainer.counted, "tokens/whole", "tokens/half", "tokens/absent")
    expected = {"whole": 0.0, "half": 0.0}
    with torch.no_grad():
        for batch in islice(Mixed(), 2):
            loss = trainer.model(batch.inputs, targets_BT=batch.targets, reduction="none").loss.sum(1)
            expected = {name: expected[name] + float(loss[row]) for row, name in enumerate(expected)}
    trainer.fit()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["loss/whole"] == pytest.approx(expected["whole"] / 48, rel=1e-5)
    assert row["loss/half"] == pytest.approx(expected["half"] / 24, rel=1e-5)
    assert row["loss"] == pytest.approx((2 * row["loss/whole"] + row["loss/half"]) / 3, rel=1e-5)
    assert row["data/tokens/whole"] == 48 and row["data/tokens/half"] == 24 and "loss/absent" not in row
