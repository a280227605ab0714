"""What a user can do wrong in a configuration, and exactly what they are told."""

from pathlib import Path

import pytest

from components.runtime.errors import ConfigError
from models.train_spec import families
from tests.trainer.runs import ROOT
from trainer.config.load import resolve
from trainer.config.validate import require_valid


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    built_in = {name: families[name] for name in families if (ROOT / "models" / name).is_dir()}
    monkeypatch.setattr(families, "_entries", built_in)  # other tests may have brought in more


def told(files: dict[str, str], argv: list[str], ranks: int = 1) -> list[str]:
    """Every problem that the user is told of, as `check` finds them."""
    for name, text in files.items():
        Path(name).write_text(text)
    argv = [f"--job.config_file={next(iter(files))}", *argv] if files else argv
    try:
        require_valid(resolve(argv, {}), ranks)
    except ConfigError as error:
        return list(error.problems)
    return []


FILES: dict[str, tuple[str, ...]] = {
    "unknown key": (
        "[training]\nstepss = 4\n",
        "a.toml:2: training.stepss: unknown key; did you mean training.steps?",
    ),
    "unknown key of another section": (
        "[training]\nwarmup_steps = 4\n",
        "a.toml:2: training.warmup_steps: unknown key; did you mean lr_scheduler.warmup_steps?",
    ),
    "key of an older release": (
        "[training]\nbatch_size = 4\n",
        "a.toml:2: training.batch_size: unknown key; did you mean training.local_batch_size?",
    ),
    "unknown section": (
        "\n[optimiser]\nlr = 4\nfoo = 5\n",
        "a.toml:2: optimiser: unknown section; did you mean optimizer?",
    ),
    "section of an older release": (
        "[float8]\nfilter_fqns = ['output']\n",
        "a.toml:1: float8: unknown section; did you mean quantize.linear.float8?",
    ),
    "top-level key": ("steps = 4\n", "a.toml:1: steps: unknown key; did you mean training.steps?"),
    "value for a section": ("training = 4\n", "a.toml:1: training: is a section; write [training] and its keys below"),
    "table for a key": (
        "[training.steps]\nx = 1\n",
        "a.toml:1: training.steps = { x = 1 }: must be an integer of at least 1",
    ),
    "out of range": (
        "[training]\n\n\nseq_len = 0\n",
        "a.toml:4: training.seq_len = 0: must be an integer of at least 1",
    ),
    "string for a number": (
        "[training]\nsteps = '10'\n",
        'a.toml:2: training.steps = "10": must be an integer of at least 1',
    ),
    "float for an integer": (
        "[training]\nsteps = 1e3\n",
        "a.toml:2: training.steps = 1000.0: must be an integer of at least 1",
    ),
    "number for a boolean": (
        "[compile]\nenable = 1\n",
        "a.toml:2: compile.enable = 1: must be true or false",
    ),
    "string for a list": (
        "[model]\nconverters = 'float8'\n",
        'a.toml:2: model.converters = "float8": must be a list of strings',
    ),
    "not one of the words": (
        "[activation_checkpoint]\nmode = 'all'\n",
        'a.toml:2: activation_checkpoint.mode = "all": must be one of "selective", "full", "memory_budget", "none"',
    ),
    "not a finite rate": (
        "[optimizer]\nlr = nan\n",
        "a.toml:2: optimizer.lr = nan: must be a finite number greater than 0",
    ),
    "an infinite rate": (
        "[optimizer]\nlr = inf\n",
        "a.toml:2: optimizer.lr = inf: must be a finite number greater than 0",
    ),
    "a negative seed": (
        "[debug]\nseed = -5\n",
        "a.toml:2: debug.seed = -5: must be an integer from 0 to 9223372036854775807 or none",
    ),
    "a timeout of aeons": (
        "[comm]\ntrain_timeout_seconds = 10000000000\n",
        "a.toml:2: comm.train_timeout_seconds = 10000000000: must be an integer from 1 to 31536000",
    ),
    "a folder without a name": (
        "[job]\ndump_folder = ''\n",
        'a.toml:2: job.dump_folder = "": must be a string of at least 1 character',
    ),
    "a layout that fits neither ranks nor heads": (
        "[parallelism]\ndata_parallel_shard_degree = -1\ntensor_parallel_degree = 3\n",
        "a.toml:3: parallelism.tensor_parallel_degree = 3: 1 (replicate) × 1 (context) × 3 (tensor) × 1 (pipeline) = 3"
        " ranks, which does not divide the 1 that there are: start a multiple of 3 ranks, or lower one of these"
        " degrees",
        "a.toml:3: parallelism.tensor_parallel_degree = 3: each rank computes whole heads, but 3 does not divide the 16"
        " heads; take 1, 2, 4, 8 or 16",
    ),
    "too long a row": (
        "[training]\nseq_len = 131073\n",
        "a.toml:2: training.seq_len = 131073: longer than the 131072 tokens this flavor was made for; shorten it",
    ),
    "zero where -1 means all": (
        "[parallelism]\ndata_parallel_shard_degree = 0\n",
        "a.toml:2: parallelism.data_parallel_shard_degree = 0: must be -1 or an integer of at least 1",
    ),
    "a long value": (
        f"[training]\nsteps = '{'x' * 99}'\n",
        f'a.toml:2: training.steps = "{"x" * 56}...: must be an integer of at least 1',
    ),
    "inside an array of tables": (
        "[[optimizer.parameter_groups]]\npattern = 'a'\n"
        "[[optimizer.parameter_groups]]\npattern = 'b'\nlr_factor = -1\n",
        "a.toml:5: optimizer.parameter_groups[1].lr_factor = -1: must be a finite number of at least 0",
    ),
    "missing in an array of tables": (
        "[optimizer]\nparameter_groups = [\n  { pattern = 'a' },\n  { lr_factor = 0 },\n]\n",
        "a.toml:4: optimizer.parameter_groups[1]: key 'pattern' is missing: must be a string",
    ),
    "not TOML": ("[training]\nsteps = = 4\n", "a.toml:2:9: not valid TOML: Invalid value"),
    "twice": ("[training]\nsteps = 4\nsteps = 5\n", "a.toml:3:10: not valid TOML: Cannot overwrite a value"),
    "extends nothing": (
        "extends = 'b.toml'\n",
        "a.toml:1: extends = 'b.toml': no such file b.toml; the path is relative to the file that names it",
    ),
    "extends a list": (
        "extends = ['b.toml']\n",
        "a.toml:1: extends = ['b.toml']: must be the path of one TOML file, relative to this one",
    ),
    "extends itself": (
        "extends = './a.toml'\n",
        "a.toml:1: extends = './a.toml': goes round in a circle, a.toml leads here; a base file cannot extend what"
        " builds on it",
    ),
    "no such module": (
        "[job]\ncustom_config_module = 'no_such_module'\n",
        "a.toml:2: job.custom_config_module = 'no_such_module': cannot be imported: ModuleNotFoundError: No module"
        " named 'no_such_module'",
    ),
    "module without JobConfig": (
        "[experimental]\ncustom_args_module = 'json'\n",
        "a.toml:2: experimental.custom_args_module = 'json': has no dataclass JobConfig; its fields are the sections"
        " to add or to change",
    ),
    "no such family": (
        "[model]\nname = 'llama'\n",
        "a.toml:2: model.name = 'llama': no such model family; allowed: deepseek_v3, gemma3, gpt_oss, llama3, llama4,"
        " mistral, qwen3 (did you mean 'llama4'?)",
    ),
    "no such flavor": (
        "[model]\nflavor = '7B'\n",
        "a.toml:2: model.flavor = '7B': no such flavor of llama3; allowed: 1B, 3-70B, 3-8B, 3.3-70B, 3B, 405B,"
        " 70B, 8B, debugmodel"
        " (did you mean '70B'?)",
    ),
    "no such optimizer": (
        "[optimizer]\nname = 'adamw'\n",
        'a.toml:2: optimizer.name = "adamw": must be one of Adam, AdamW; did you mean AdamW?',
    ),
    "no such loss": (
        "[loss]\nname = 'mse'\n",
        'a.toml:2: loss.name = "mse": must be one of cross_entropy, chunked_cross_entropy',
    ),
    "no such dataset": (
        "[training]\ndataset = 'c5'\n",
        'a.toml:2: training.dataset = "c5": must be one of c4, c4_test, c4_validation, pystdlib, pystdlib_validation,'
        " synthetic (or give training.dataset_path)",
    ),
    "no such converter": (
        "[model]\nconverters = ['quantize.linear.float9']\n",
        'a.toml:2: model.converters = "quantize.linear.float9": must be one of quantize.linear.float8,'
        " quantize.linear.mx, quantize.grouped_mm.float8, quantize.grouped_mm.mx; did you mean quantize.linear.float8?",
    ),
    "a converter that is not there yet": (
        "[model]\nconverters = ['quantize.linear.mx']\n",
        'a.toml:2: model.converters = ["quantize.linear.mx"]: not yet supported: model converters are not there yet;'
        " train without them: converters = []",
    ),
    "recompute every 0th": (
        "[activation_checkpoint]\nselective_ac_option = '0'\n",
        'a.toml:2: activation_checkpoint.selective_ac_option = "0": must be a positive integer in quotes (every n-th'
        ' block) or "op"',
    ),
    "not a regular expression": (
        "[optimizer]\nparameter_groups = [{ pattern = '(' }]\n",
        'a.toml:2: optimizer.parameter_groups[0].pattern = "(": must be a regular expression, but missing ),'
        " unterminated subpattern at position 0",
    ),
    "a URL of nothing": (
        "[checkpoint]\nfolder = 'nothing://x/y'\n",
        'a.toml:2: checkpoint.folder = "nothing://x/y": fsspec knows no nothing://; give a path, or a URL as in'
        " s3://bucket/name",
    ),
    "a URL of nothing to start from": (
        "[checkpoint]\ninitial_load_path = 'nothing://x/y'\n",
        'a.toml:2: checkpoint.initial_load_path = "nothing://x/y": fsspec knows no nothing://; give a path, or a URL'
        " as in s3://bucket/name",
    ),
    "a folder outside": (
        "[checkpoint]\nfolder = '../all'\n",
        'a.toml:2: checkpoint.folder = "../all": must be a relative path without .. that stays inside job.dump_folder'
        ' = "./outputs"',
    ),
    "no part of a checkpoint": (
        "[checkpoint]\nexclude_from_loading = ['optimizers']\n",
        'a.toml:2: checkpoint.exclude_from_loading = "optimizers": must be out of model, optimizer, lr_scheduler,'
        " dataloader, train_state, rng",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_file(case: str) -> None:
    text, *messages = FILES[case]
    assert told({"a.toml": text}, []) == messages


ARGUMENTS = {
    "unknown": (["--training.stepss=5"], "--training.stepss=5: unknown key; did you mean training.steps?"),
    "unknown, two words": (["--foo.bar", "5"], "--foo.bar=5: unknown key"),
    "wrong type": (["--training.steps=ten"], "--training.steps=ten: must be an integer of at least 1"),
    "no value": (["--training.steps"], "--training.steps: a value is missing: must be an integer of at least 1"),
    "no boolean": (["--compile.enable=yes"], "--compile.enable=yes: must be true or false"),
    "no with a value": (
        ["--compile.no_enable=true"],
        "--compile.no_enable=true: takes no value; write --compile.enable=true",
    ),
    "section": (["--training=5"], "--training=5: training is a section; write --training.key=value"),
    "none where it may not be": (["--training.steps=none"], "--training.steps=none: must be an integer of at least 1"),
    "stray word": (["train.toml"], "train.toml: not understood: every argument is --section.key=value"),
    "bad list": (
        ["--compile.components=model,lss"],
        '--compile.components=model,lss: must be a list of values out of "model", "loss"',
    ),
    "bad literal": (["--model.converters=[a"], "--model.converters=[a: must be a list of strings"),
    "bad table in a list": (
        ["--optimizer.parameter_groups=[{pattern='x', a=1}]"],
        "--optimizer.parameter_groups=[{pattern='x', a=1}]: optimizer.parameter_groups[0].a: unknown key",
    ),
    "no such file": (
        ["--job.config_file=b.toml"],
        "b.toml: cannot be read: No such file or directory; check the path and the current folder",
    ),
    "a decay that means nothing": (
        ["--lr_scheduler.decay_ratio=0.5", "--lr_scheduler.decay_type=inverse_sqrt"],
        "--lr_scheduler.decay_ratio=0.5: means nothing to inverse_sqrt; remove it",
    ),
    "inverse square root of nothing": (
        ["--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_type=inverse_sqrt"],
        "--lr_scheduler.warmup_steps=0: inverse_sqrt decays from the end of warm-up W as √(W/step), which is 0 without"
        " one; take at least 1, or another lr_scheduler.decay_type",
    ),
    "persistent nobody": (
        ["--training.dataloader.persistent_workers"],
        "--training.dataloader.persistent_workers: needs workers, but training.dataloader.num_workers is 0; set that"
        " to 1 or more, or leave this out",
    ),
    "prefetching by nobody": (
        ["--validation.enable", "--validation.dataloader.prefetch_factor=2"],
        "--validation.dataloader.prefetch_factor=2: needs workers, but validation.dataloader.num_workers is 0; set"
        " that to 1 or more, or leave this out",
    ),
    "too frequent profiles": (
        ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
        "--profiling.profile_freq=3: must be at least profiler_warmup + profiler_active = 3 + 1 = 4",
    ),
    "TorchTitan's estimate": (
        ["--memory_estimation.enable=true"],
        "--memory_estimation.enable=true: not yet supported: the dry run takes its place: COMM_MODE=fake_backend"
        " ./run_train.sh; set it to false",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_argument(case: str) -> None:
    argv, message = ARGUMENTS[case]
    assert told({}, argv) == [message]


LAYOUTS = {
    "global batch": (
        ["--training.global_batch_size=12"],
        4,
        ["--training.global_batch_size=12: must be a multiple of training.local_batch_size × data-parallel degree ="
         " 8 × 4 = 32; take 32, or another local_batch_size"],
    ),
    "global batch of validation": (
        ["--validation.enable", "--validation.global_batch_size=20"],
        1,
        ["--validation.global_batch_size=20: must be a multiple of validation.local_batch_size × data-parallel degree ="
         " 8 × 1 = 8; take 16 or 24, or another local_batch_size"],
    ),
    "streams": (
        ["--data.streams=8"],
        2,
        ["--data.streams=8: must be at least the 16 rows of a global batch, since row r comes from stream r; take 16 or"
         " more, or -1"],
    ),
    "ranks": (
        ["--parallelism.data_parallel_replicate_degree=3"],
        4,
        ["--parallelism.data_parallel_replicate_degree=3: 3 (replicate) × 1 (context) × 1 (tensor) × 1 (pipeline) = 3"
         " ranks, which does not divide the 4 that there are: start a multiple of 3 ranks, or lower one of these"
         " degrees"],
    ),
    "ranks, of two degrees the one that can be mended": (
        ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=3"],
        4,
        ["--parallelism.data_parallel_shard_degree=3: 2 (replicate) × 3 (shard) × 1 (context) × 1 (tensor) ×"
         " 1 (pipeline) = 6 ranks, but there are 4: set `parallelism.data_parallel_shard_degree` to 2 (or to -1: all"
         " that are left), or start 6 ranks"],
    ),
    "a pipeline, by hand": (
        [
            "--parallelism.pipeline_parallel_degree=2",
            '--parallelism.module_fqns_per_model_part=[["tok_embedings"], ["norm"]]',
            "--parallelism.pipeline_parallel_schedule=GPipes",
            "--parallelism.pipeline_parallel_microbatch_size=3",
        ],
        2,
        ["--parallelism.pipeline_parallel_microbatch_size=3: must divide the training.local_batch_size = 8 rows that"
         " the pipeline takes at a time; take 2",
         "--parallelism.pipeline_parallel_schedule=GPipes: no such pipeline schedule; allowed: GPipe, 1F1B, LoopedBFS,"
         " Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV; did you mean GPipe?",
         '--parallelism.module_fqns_per_model_part=[["tok_embedings"], ["norm"]]: tok_embedings is no module of this'
         " model; did you mean tok_embeddings?",
         '--parallelism.module_fqns_per_model_part=[["tok_embedings"], ["norm"]]: in no part: tok_embeddings, layers.0,'
         " layers.1, layers.2, layers.3, layers.4, layers.5, output"],
    ),
    "context parallelism": (
        ["--parallelism.context_parallel_degree=4", "--training.seq_len=30"],
        4,
        ["--training.seq_len=30: must be a multiple of 8, for a tensor-parallel degree of 1 and a context-parallel"
         " degree of 4; take 32"],
    ),
    "context parallelism, nothing balanced": (
        ["--parallelism.context_parallel_degree=4", "--training.seq_len=30",
         "--parallelism.context_parallel_load_balancer="],
        4,
        ["--training.seq_len=30: must be a multiple of 4, for a tensor-parallel degree of 1 and a context-parallel"
         " degree of 4; take 32"],
    ),
    "heads that ulysses cannot deal": (
        ["--parallelism.context_parallel_degree=3", "--training.seq_len=30",
         "--parallelism.context_parallel_rotate_method=ulysses"],
        3,
        ["--parallelism.context_parallel_degree=3: ulysses deals the 16 heads of each rank (16 /"
         " tensor_parallel_degree) evenly to 3 ranks; take 1, 2, 4, 8 or 16, or another"
         " parallelism.context_parallel_rotate_method"],
    ),
    "a balancer that there is not": (
        ["--parallelism.context_parallel_degree=2", "--parallelism.context_parallel_load_balancer=zigzag"],
        2,
        ['--parallelism.context_parallel_load_balancer=zigzag: must be one of "headtail", "" or none'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case: str) -> None:
    argv, ranks, messages = LAYOUTS[case]
    assert told({}, argv, ranks) == messages


def test_all_problems_at_once_in_the_order_of_the_sources() -> None:
    files = {
        "a.toml": "extends = 'base.toml'\n[training.dataloader]\nnum_workers = -1\n"
        "[model]\nnam = 'x'\n[training]\nsteps = 0\n",
        "base.toml": "[training]\nseq_len = 'long'\n",
    }
    assert told(files, ["--debug.seed=x", "--model.nome=y"]) == [
        'base.toml:2: training.seq_len = "long": must be an integer of at least 1',
        "a.toml:3: training.dataloader.num_workers = -1: must be an integer of at least 0",
        "a.toml:5: model.nam: unknown key; did you mean model.name?",
        "a.toml:7: training.steps = 0: must be an integer of at least 1",
        "--debug.seed=x: must be an integer from 0 to 9223372036854775807 or none",
        "--model.nome=y: unknown key; did you mean model.name?",
    ]


def test_all_problems_at_once_of_keys_names_and_layout() -> None:
    text = (
        "[model]\nflavor = '7B'\n[training]\nstepss = 4\nseq_len = 'long'\n"
        "[parallelism]\ndata_parallel_shard_degree = 3\n"
    )
    assert told({"a.toml": text}, [], ranks=4) == [
        "a.toml:4: training.stepss: unknown key; did you mean training.steps?",
        'a.toml:5: training.seq_len = "long": must be an integer of at least 1',
        "a.toml:2: model.flavor = '7B': no such flavor of llama3; allowed: 1B, 3-70B, 3-8B, 3.3-70B, 3B, 405B,"
        " 70B, 8B, debugmodel"
        " (did you mean '70B'?)",
        "a.toml:7: parallelism.data_parallel_shard_degree = 3: 1 (replicate) × 3 (shard) × 1 (context) × 1 (tensor) ×"
        " 1 (pipeline) = 3 ranks, but there are 4: set `parallelism.data_parallel_shard_degree` to 4 (or to -1: all"
        " that are left), or start 3 ranks",
    ]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--model.name=", "--model.flavor"], "--model.flavor: a value is missing: must be a string"),
        (
            ["--training.local_batch_size=0", "--training.global_batch_size=9"],
            "--training.local_batch_size=0: must be an integer of at least 1",
        ),
        (
            ["--parallelism.tensor_parallel_degree=x", "--parallelism.data_parallel_shard_degree=3"],
            "--parallelism.tensor_parallel_degree=x: must be an integer of at least 1",
        ),
        (
            ["--job.dump_folder=", "--checkpoint.folder=.."],
            "--job.dump_folder=: must be a string of at least 1 character",
        ),
    ],
)
def test_what_follows_from_a_refused_value_is_not_told(argv: list[str], problem: str) -> None:
    assert told({}, argv, ranks=2) == [problem]


def test_a_later_source_mends_the_value_but_not_the_fault() -> None:
    Path("a.toml").write_text("[training]\nlocal_batch_size = 0\n")
    argv = ["--job.config_file=a.toml", "--training.local_batch_size=4", "--training.global_batch_size=9"]
    resolved = resolve(argv, {})
    assert (resolved.job.training.local_batch_size, resolved.refused) == (4, frozenset())
    assert told({}, argv) == [
        "a.toml:2: training.local_batch_size = 0: must be an integer of at least 1",
        "--training.global_batch_size=9: must be a multiple of training.local_batch_size × data-parallel degree ="
        " 4 × 1 = 4; take 8 or 12, or another local_batch_size",
    ]


def test_a_refused_value_leaves_the_default() -> None:
    Path("base.toml").write_text("[training]\nsteps = 4\nseq_len = 4\n")
    Path("a.toml").write_text("extends = 'base.toml'\n[training]\nsteps = 'x'\n")
    resolved = resolve(["--job.config_file=a.toml"], {})
    assert (resolved.job.training.steps, resolved.job.training.seq_len) == (10000, 4)
    assert resolved.refused == {"training.steps"}
    assert resolved.problems == ['a.toml:3: training.steps = "x": must be an integer of at least 1']


REQUIRED = """
from dataclasses import dataclass, field

@dataclass(kw_only=True)
class Training:
    budget: int

@dataclass
class JobConfig:
    training: Training = field(default_factory=Training)
"""


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "training.budget: is missing: must be an integer"),
        (["--training.budget=x"], "--training.budget=x: must be an integer"),
    ],
)
def test_without_a_required_key_there_is_nothing_to_go_on_from(argv: list[str], problem: str) -> None:
    Path("required_config.py").write_text(REQUIRED)
    argv = ["--job.custom_config_module=required_config", "--model.flavor=7B", *argv]
    assert told({}, argv) == [problem]


def test_not_utf8() -> None:
    Path("a.toml").write_bytes(b"[job]\ndescription = '\xff'\n")
    assert told({}, ["--job.config_file=a.toml"]) == ["a.toml:2: not UTF-8 (byte 21): save the file as UTF-8"]


def test_a_broken_module_is_told_in_one_line() -> None:
    Path("broken_config.py").write_text("raise RuntimeError('so it goes')\n")
    assert told({}, ["--job.custom_config_module=broken_config"]) == [
        "--job.custom_config_module=broken_config: job.custom_config_module = 'broken_config': cannot be imported:"
        " RuntimeError: so it goes"
    ]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("'Unknown'", "name 'Unknown' is not defined"),
        ("object.__init__.__class__", "Unable to generate pydantic-core schema for <class 'wrapper_descriptor'>."),
    ],
)
def test_a_type_that_cannot_be_checked(annotation: str, reason: str) -> None:
    name = f"untyped_config_{len(reason)}"
    Path(f"{name}.py").write_text(
        "from dataclasses import dataclass, field\n"
        f"@dataclass\nclass Mine:\n    x: {annotation} = None\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=Mine)\n"
    )
    (problem,) = told({}, [f"--job.custom_config_module={name}"])
    key = f"--job.custom_config_module={name}: job.custom_config_module = {name!r}"
    assert problem.startswith(f"{key}: a type in its JobConfig cannot be checked: {reason}")


def test_names_of_custom_import_are_left_to_it() -> None:
    argv = [
        "--experimental.custom_import=mine",
        "--optimizer.name=Lion",
        "--model.name=my_model",
        "--loss.name=my_loss",
    ]
    assert told({}, [*argv, "--training.dataset=my_data"]) == []
    assert told({}, [*argv, "--training.dataset=my_data", "--model.converters=my_converter"]) == [
        "--model.converters=my_converter: not yet supported: model converters are not there yet; train without them:"
        " converters = []"
    ]
