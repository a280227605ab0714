"""Bad input: what a user can get wrong, the exact message, the exit code, and never a traceback.

Mistakes within a TOML or an argument have their own table in tests/trainer/config/test_bad_config.py; these are the
ones that meet the file system, the data, the tokenizer, a checkpoint or another package.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.runs import TINY, Outcome, call

SKIP = 'mend the record, or skip such records with data.on_bad_record = "skip"'
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "no such config": (
        ("--job.config_file=missing.toml",),
        "missing.toml: cannot be read: No such file or directory; check the path and the current folder",
    ),
    "not TOML": (("--job.config_file=bad.toml",), "bad.toml:2:9: not valid TOML: Invalid value"),
    "no such model": (
        ("--model.name=lama3", "--experimental.custom_import="),
        "--model.name=lama3: no such model family; allowed: deepseek_v3, gemma3, gpt_oss, llama3, llama4,"
        " mistral, qwen3 (did you mean 'llama3'?)",
    ),
    "no such flavor": (
        ("--model.flavor=9B",),
        "--model.flavor=9B: no such flavor of tiny_llama; allowed: deep, deep_tied, tied, untied",
    ),
    "no such module": (
        ("--experimental.custom_import=no_such_module",),
        "experimental.custom_import = 'no_such_module' cannot be imported: ModuleNotFoundError: No module named"
        " 'no_such_module'",
    ),
    "a module that fails": (
        ("--experimental.custom_import=failing",),
        "experimental.custom_import = 'failing' cannot be imported: ZeroDivisionError: division by zero"
        " ({folder}/failing.py:2)",
    ),
    "a dataset with splits": (
        ("--training.dataset_path=splits",),
        "splits: a saved DatasetDict, which has a dataset for each split; name one of them: splits/test, splits/train",
    ),
    "no rank to report": (
        ("LOG_RANK=9",),
        "environment: LOG_RANK = '9': none of these is there; allowed: 0 to 0",
    ),
    "a full disk": (
        ("--job.dump_folder=full",),
        "full/metrics.jsonl: cannot be written: No space left on device; make room and run again",
    ),
    "no such data": (
        ("--training.dataset_path=nowhere",),
        "nowhere: no such file or folder (looked in the current folder and the project's); check"
        " dataset_path, or the path of the source",
    ),
    "an empty file": (
        ("--training.dataset_path=empty.jsonl",),
        "empty.jsonl: no records in 1 file(s), all empty; give a dataset that is not empty",
    ),
    "an empty folder": (
        ("--training.dataset_path=folder",),
        "folder: no data files in this folder; allowed extensions: .jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz,"
        " .json.zst, .parquet, .txt, .text, .md, .rst, .py",
    ),
    "a truncated line": (
        ("--training.dataset_path=truncated.jsonl",),
        f"truncated.jsonl:2:15: truncated JSON (Expecting ',' delimiter); {SKIP}",
    ),
    "not UTF-8": (("--training.dataset_path=latin.jsonl",), f"latin.jsonl:2:14: not UTF-8 (byte 0xe9); {SKIP}"),
    "no text field": (
        ("--training.dataset_path=body.jsonl",),
        f"body.jsonl:1:1: no field 'text' (fields: 'body'; data.text_field names the field to read); {SKIP}",
    ),
    "a number as text": (
        ("--training.dataset_path=number.jsonl",),
        f"number.jsonl:1:1: field 'text' is int, not text; {SKIP}",
    ),
    "an unknown kind of file": (
        ("--training.dataset_path=data.xyz",),
        "data.xyz: unknown extension '.xyz'; allowed: .jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz, .json.zst,"
        " .parquet, .txt, .text, .md, .rst, .py",
    ),
    "a damaged parquet file": (
        ("--training.dataset_path=damaged.parquet",),
        "damaged.parquet: not a Parquet file, or damaged (Parquet file size is 7 bytes, smaller than the minimum file"
        " footer (8 bytes)); write it again",
    ),
    "too little data": (
        ("--training.dataset_path=small.jsonl", "--data.on_end=stop"),
        "the data end before a global batch of 12 rows is full: lower training.global_batch_size, or go around again"
        ' with data.on_end = "repeat"',
    ),
    "validation without an end": (
        ("--validation.enable", "--validation.dataset=synthetic"),
        "validation.steps = -1: the dataset 'synthetic' has no end; set a number of steps",
    ),
    "no such tokenizer folder": (
        ("--model.hf_assets_path=nowhere",),
        "nowhere: no such folder; set model.hf_assets_path to a folder that holds tokenizer.json",
    ),
    "no tokenizer in the folder": (
        ("--model.hf_assets_path=folder",),
        "folder: no tokenizer.json there (there is: nothing); set model.hf_assets_path to a folder that holds one",
    ),
    "a damaged tokenizer": (
        ("--model.hf_assets_path=tokenizer",),
        "tokenizer/tokenizer.json: not a tokenizer definition (EOF while parsing an object at line 1 column 1); save"
        " it again with the tokenizers library",
    ),
    "a folder that is a file": (
        ("--job.dump_folder=file/out",),
        "job.dump_folder = 'file/out': cannot write there: Not a directory; choose another folder with"
        " --job.dump_folder=…, or make it writable",
    ),
    "a folder that cannot be written to": (
        ("--job.dump_folder=/proc/out",),
        "job.dump_folder = '/proc/out': cannot write there: No such file or directory; choose another folder with"
        " --job.dump_folder=…, or make it writable",
    ),
    "a checkpoint that is not there": (
        ("--checkpoint.enable", "--checkpoint.load_step=7"),
        "checkpoint.load_step = 7: checkpoint step-7: no manifest.json in it: not a checkpoint of Espalier, or one"
        " that was never finished; valid in 'out/checkpoint': none",
    ),
    "weights that are not there": (
        ("--checkpoint.enable", "--checkpoint.initial_load_path=nowhere"),
        "checkpoint 'nowhere': no manifest.json in it: not a checkpoint of Espalier, or one that was never finished",
    ),
    "an optional package": (
        ("--metrics.enable_wandb",),
        "metrics.enable_wandb = true: the package wandb is not installed; install it with"
        " `pip install 'espalier[wandb]'`, or set it to false",
    ),
    "a snapshot of no allocator": (
        ("--profiling.enable_memory_snapshot",),
        "profiling.enable_memory_snapshot = true: the device is cpu, which has no allocator to take snapshots of; run"
        " on CUDA, or set it to false",
    ),
    "a pattern without parameters": (
        ("--optimizer.parameter_groups=[{pattern='nrom', weight_decay=0.0}]",),
        "optimizer.parameter_groups[0].pattern = 'nrom': matches no parameter; there are:"
        " layers.*.attention.wk.weight, layers.*.attention.wo.weight, layers.*.attention.wq.weight,"
        " layers.*.attention.wv.weight, layers.*.attention_norm.weight, layers.*.feed_forward.w1.weight,"
        " layers.*.feed_forward.w2.weight, layers.*.feed_forward.w3.weight, layers.*.ffn_norm.weight, norm.weight,"
        " output.weight, tok_embeddings.weight",
    ),
    "an unknown compiler": (
        ("--compile.enable", "--compile.backend=inducer"),
        "compile.backend = 'inducer': no such back end; allowed: cudagraphs, inductor, openxla, tvm, and those for"
        " debugging",
    ),
    "a negative seed": (
        ("--debug.seed=-1",),
        "--debug.seed=-1: must be an integer from 0 to 9223372036854775807 or none",
    ),
    "more sharding than ranks": (
        ("--parallelism.data_parallel_shard_degree=3",),
        "--parallelism.data_parallel_shard_degree=3: 1 (replicate) × 3 (shard) × 1 (context) × 1 (tensor) ×"
        " 1 (pipeline) = 3 ranks, but there are 1: set `parallelism.data_parallel_shard_degree` to 1 (or to -1: all"
        " that are left), or start 3 ranks",
    ),
    "a malformed rank": (
        ("RANK=one",),
        "environment: RANK = 'one': allowed: a whole number from 0 on; torchrun sets these variables, or unset all of"
        " them",
    ),
    "a malformed list of ranks": (
        ("LOG_RANK=first",),
        "environment: LOG_RANK = 'first': allowed: ranks separated by commas, such as 0 or 0,8",
    ),
    "no network": (
        ("--training.dataset=c4",),
        "allenai/c4: no such file or folder, and as a Hugging Face dataset (split 'train') it cannot be read (Couldn't"
        " reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)); check the name and the network, or set"
        " dataset_path to a local copy",
    ),
}
ENVIRONMENT = {"RANK": "0", "LOG_RANK": "0", "HF_HUB_OFFLINE": "1"}


def write_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full/metrics.jsonl").symlink_to("/dev/full")
    for split in ("train", "test"):
        (folder / "splits" / split).mkdir(parents=True)
        for name in ("state.json", "dataset_info.json"):
            (folder / "splits" / split / name).write_text("{}")
    (folder / "splits/dataset_dict.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    contents = {
        "bad.toml": b"[training]\nsteps = \n",
        "file": b"",
        "failing.py": b"x = 1\nx / 0\n",
        "empty.jsonl": b"",
        "truncated.jsonl": b'{"text": "one"}\n{"text": "two"\n',
        "latin.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n',
        "body.jsonl": b'{"body": "one"}\n',
        "number.jsonl": b'{"text": 5}\n',
        "small.jsonl": b'{"text": "a few words"}\n' * 3,
        "data.xyz": b"x",
        "damaged.parquet": b"PAR1 no",
        "tokenizer/tokenizer.json": b"{",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def run_all(folder: str) -> dict[str, Outcome]:
    """Every case, one after the other, in a process of its own."""
    os.chdir(folder)
    sys.path.insert(0, ".")
    outcomes = {}
    for name, (arguments, _) in CASES.items():
        variables = dict(a.split("=", 1) for a in arguments if not a.startswith("-"))
        argv = [*TINY, "--job.dump_folder=out", *(a for a in arguments if a.startswith("-"))]
        outcomes[name] = call(argv, {**ENVIRONMENT, **variables})
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    write_files(folder)
    return run_ranks(1, run_all, str(folder), backend=None, timeout=200)[0]


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(name: str, outcomes: dict[str, Outcome], folder: Path) -> None:
    outcome = outcomes[name]
    assert outcome.stderr.splitlines()[-1] == f"error: {CASES[name][1].replace('{folder}', str(folder))}"
    assert outcome.code == 2
    assert (outcome.stdout == "") is (name != "a full disk")  # of which only the end of the run is the end
    assert "Traceback" not in outcome.stderr
