"""From a job's sections to its loaders."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.data.build import build_loader, build_tokenizer
from components.data.documents import BadRecord
from components.data.loader import Loader
from components.data.tokenizer import load_tokenizer
from components.mesh.batch import IGNORE
from components.runtime.errors import ConfigError, DataError
from tests.components.data.corpus import fields, readers, texts, tokenizer, write_lines

DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"dataset": "c4_test", "seq_len": 32, "local_batch_size": 2},
    "validation": {"dataset": "c4_test", "seq_len": 32, "local_batch_size": 2},
}


def job(**sections: dict[str, Any]) -> JobConfig:
    """A job over c4_test with short rows; `data={"streams": 3}` changes a key."""
    config = JobConfig()
    for name in DEFAULTS | sections:
        values = DEFAULTS.get(name, {}) | sections.get(name, {})
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    return config


def loader(config: JobConfig, rank: int = 0, degree: int = 1, validation: bool = False, vocab: int = 2048) -> Loader:
    return build_loader(
        config, tokenizer=tokenizer(), data_rank=rank, data_degree=degree, vocab_size=vocab, validation=validation
    )


def first(config: JobConfig, **options: Any) -> torch.Tensor:
    return fields(next(iter(loader(config, **options))))


def refusal(error: type[Exception], config: JobConfig, **options: Any) -> str:
    with pytest.raises(error) as caught:
        next(iter(loader(config, **options)))
    return str(caught.value)


def test_the_tokenizer_of_a_job(tmp_path: Path) -> None:
    assert build_tokenizer(JobConfig()).vocab_size == 2048
    config = job(model={"hf_assets_path": "nowhere", "tokenizer_path": "tests/assets/tokenizer"})
    assert build_tokenizer(config).vocab_size == 2048


def test_a_batch_of_minus_one_follows_the_degree() -> None:
    assert (loader(job()).global_batch, loader(job(), degree=3).global_batch) == (2, 6)
    fixed = job(training={"global_batch_size": 6})
    assert [(x.global_batch, x.rows, x.streams) for x in (loader(fixed), loader(fixed, degree=3))] == [
        (6, 6, 6),
        (6, 2, 6),
    ]


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("data", {"streams": 5}),
        ("data", {"shuffle": False}),
        ("data", {"add_bos": False}),
        ("data", {"add_eos": False}),
        ("data", {"document_mask": True}),
        ("debug", {"seed": 1}),
        ("training", {"seq_len": 16}),
        ("training", {"global_batch_size": 4}),
        ("training", {"dataset": "pystdlib"}),
        ("training", {"dataset": "synthetic"}),
        ("training", {"dataset_path": "tests/assets/c4_test/part-0.jsonl"}),
    ],
)
def test_a_key_changes_the_rows_and_the_fingerprint(section: str, changes: dict[str, Any]) -> None:
    changed = job(**{section: changes})
    before, after = ([fields(x) for x, _ in zip(loader(c), range(60), strict=False)] for c in (job(), changed))
    assert not torch.equal(torch.stack(before), torch.stack(after))
    assert loader(changed).fingerprint != loader(job()).fingerprint


def test_the_fingerprint(tmp_path: Path) -> None:
    assert loader(job()).fingerprint | {"digest": "", "tokenizer": ""} == {
        "files": 2,
        "bytes": 382583,
        "digest": "",
        "text_field": "text",
        "streams": 2,
        "shuffle_seed": 0,
        "tokenizer": "",
        "seq_len": 32,
        "begin_token": 0,
        "end_token": 1,
        "document_mask": False,
        "cross_document_labels": False,
        "packing": "concat",
    }
    path = str(write_lines(tmp_path / "x.jsonl.gz", ["a"] * 9))
    windows = [loader(job(training={"dataset_path": path}, data={"shuffle_window": n})).fingerprint for n in (3, 4)]
    assert [x["shuffle_window"] for x in windows] == [3, 4]


def test_what_may_change_on_resume() -> None:
    same = job(
        data={"on_end": "stop", "on_bad_record": "skip"},
        training={"dataloader": replace(job().training.dataloader, num_workers=1)},
    )
    state = loader(job()).state_dict([])
    loader(same).load_state(state)


def test_best_fit_keeps_its_end(tmp_path: Path) -> None:
    """A window at the end of the data holds the next epoch's documents, or none: its rows are others."""
    path = str(write_lines(tmp_path / "x.jsonl", texts(30)))
    training = {"dataset_path": path, "dataset": "mine"}
    ending, going = (job(training=training, data={"packing": "best_fit", "on_end": x}) for x in ("stop", "repeat"))
    windows = [[x.batch.tokens for x, _ in zip(loader(x), range(9), strict=False)] for x in (ending, going)]
    assert not all(torch.equal(a, b) for a, b in zip(*windows, strict=False))
    with pytest.raises(DataError) as caught:
        loader(going).load_state(loader(ending).state_dict([]))
    said = str(caught.value)
    assert "other data: on_end was 'stop', is 'repeat'; restore these, or start a new job" in said


def test_text_field_and_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "words of a document"}\n{"no": 1}\n' * 9)
    training = {"dataset": "mine", "dataset_path": str(path)}
    assert "no field 'text'" in refusal(BadRecord, job(training=training))
    skipping = job(
        training=training, data={"text_field": "body", "on_bad_record": "skip", "shuffle": False, "streams": 3}
    )
    found = loader(skipping)
    row = next(iter(found)).batch.tokens[0].tolist()
    assert tokenizer().decode(row).startswith("<|begin_of_text|>words of a document<|end_of_text|>")
    assert found.report()["skipped_records"] > 0


def test_on_end(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "x.jsonl", ["word " * 50] * 4))
    training = {"dataset_path": path, "dataset": "mine"}
    ended = list(loader(job(training=training, data={"on_end": "stop"})))
    repeated = [x for x, _ in zip(loader(job(training=training)), range(len(ended) + 5), strict=False)]
    assert len(repeated) == len(ended) + 5
    assert all(torch.equal(fields(a), fields(b)) for a, b in zip(ended, repeated, strict=False))


def test_validation_sees_each_token_once_in_order() -> None:
    texts = [x() for x in readers("tests/assets/c4_test")]
    labels = sum(len(tokenizer().encode(x)) + 1 for x in texts)
    for degree in (1, 2):
        ranks = [loader(job(), rank=d, degree=degree, validation=True) for d in range(degree)]
        assert sum(int((x.batch.labels != IGNORE).sum()) for r in ranks for x in r) == labels
    row = first(job(), validation=True)[0, 0].tolist()
    assert ("<|begin_of_text|>" + texts[0]).startswith(tokenizer().decode(row))


def test_validation_keys() -> None:
    config = job(validation={"global_batch_size": 4, "seq_len": 16}, data={"streams": 2})
    assert first(config, validation=True).shape == (4, 4, 16)
    assert loader(config, validation=True).fingerprint["shuffle_seed"] is None
    held_out = job(validation={"dataset": "pystdlib_validation"})
    assert loader(held_out, validation=True).fingerprint["split"] == "validation"


def test_synthetic_needs_no_tokenizer() -> None:
    for steps in (3, -1):
        config = job(training={"dataset": "synthetic"}, validation={"dataset": "synthetic", "steps": steps})
        rows = [
            fields(
                next(
                    iter(build_loader(config, tokenizer=None, data_rank=0, data_degree=1, vocab_size=50, validation=v))
                )
            )
            for v in (False, True)[: 1 + (steps > 0)]
        ]
        assert all(x.shape == (2, 4, 32) and int(x[:, 0].max()) < 50 for x in rows)
        assert steps < 0 or not torch.equal(*rows)
    message = "validation.steps = -1: the dataset 'synthetic' has no end; set a number of steps"
    assert refusal(ConfigError, config, validation=True) == message


def test_refusals() -> None:
    assert refusal(ConfigError, job(), vocab=2047) == (
        "the tokenizer has 2048 entries, the model's vocabulary 2047; choose a flavor with a larger vocabulary,"
        " or another model.hf_assets_path"
    )
    assert refusal(ConfigError, job(data={"streams": 1})) == (
        "data.streams = 1: fewer than the global batch of 2 rows; raise it, or set -1"
    )
    with pytest.raises(ConfigError) as error:
        build_loader(job(), tokenizer=None, data_rank=0, data_degree=1, vocab_size=9)
    assert str(error.value) == "dataset 'c4_test': its documents need a tokenizer; set model.hf_assets_path"
    assert refusal(DataError, job(training={"dataset_path": "no.jsonl"})).startswith("no.jsonl: no such file or folder")


def test_the_tokenizer_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path("scripts/train_tokenizer.py")
    monkeypatch.setitem(script["train"].__globals__, "texts", lambda: (x() for x in readers("tests/assets/c4_test")))
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", "--vocab-size", "400", "--out", str(tmp_path)])
    script["main"]()
    trained = load_tokenizer(str(tmp_path))
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (400, 0, 1)
    config = (tmp_path / "tokenizer_config.json").read_bytes()
    assert config == Path("tests/assets/tokenizer/tokenizer_config.json").read_bytes()
