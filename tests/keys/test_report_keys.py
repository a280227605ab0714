"""What `[job]`, `[model]`, `[metrics]`, `[profiling]`, `[debug]`, `[comm]` and `[experimental]` do."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerAction

from components.config.job import Profiling
from components.config.parallelism import Comm
from components.metrics.profiler import Profiler
from components.runtime import distributed
from components.runtime.world import World
from tests.keys.jobs import SMALL, Done, run_jobs, surroundings
from tests.ranks import run_ranks
from tests.trainer.runs import ROOT
from trainer.trainer import Trainer

shows = pytest.mark.shows
PROFILED = ("--profiling.enable_profiling", "--profiling.profile_freq=3", "--profiling.profiler_warmup=1")
JOBS = {
    "plain": (),
    "config_file": ("--job.config_file={folder}/job.toml",),
    "description": ("--job.description=a try",),
    "print_config": ("--job.print_config",),
    "save_config_file": ("--job.save_config_file=kept/copy.toml",),
    "flavor": ("--model.flavor=tied",),
    "another": ("--model.name=llama3", "--model.flavor=debugmodel", "--training.steps=1"),
    "hf_assets_path": ("--model.hf_assets_path={folder}/bare",),
    "tokenizer_path": ("--model.tokenizer_path={folder}/bare", "--model.hf_assets_path=/nowhere"),
    "log_freq": ("--metrics.log_freq=2", "--training.steps=5"),
    "enable_tensorboard": ("--metrics.enable_tensorboard",),
    "save_tb_folder": ("--metrics.enable_tensorboard", "--metrics.save_tb_folder=board"),
    "peak_tflops": ("--metrics.peak_tflops=0.5",),
    "enable_profiling": PROFILED,
    "save_traces_folder": (*PROFILED, "--profiling.save_traces_folder=kept/traces"),
    "profile_freq": (*PROFILED, "--profiling.profile_freq=2"),
    "profiler_active": (*PROFILED, "--profiling.profiler_active=2"),
    "enable_memory_snapshot": ("--profiling.enable_memory_snapshot",),
    "seed": ("--debug.seed=8",),
    "no seed": ("--debug.seed=none",),
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "job.toml").write_text("[job]\ndescription = 'from a file'\n")
    (folder / "bare").mkdir()
    shutil.copy(ROOT / "tests/assets/tokenizer/tokenizer.json", folder / "bare")  # without begin and end tokens
    return run_jobs(folder, JOBS)


def described(done: Done) -> str:
    return json.loads((done.folder / "run.json").read_text())["description"]


@shows("job.description", "job.config_file")
def test_description(done: dict[str, Done]) -> None:
    for name, text in {"plain": "default job", "description": "a try", "config_file": "from a file"}.items():
        assert described(done[name]) == text
        assert f"{text}: {done[name].folder}\n" in done[name].log


@shows("job.dump_folder", "job.save_config_file")
def test_where_files_go(done: dict[str, Done]) -> None:
    usual = ["config.toml", "metrics.jsonl", "run.json"]
    assert done["plain"].files() == usual
    assert done["description"].files() == usual
    kept = done["save_config_file"]
    assert kept.files() == ["config.toml", "kept/copy.toml", *usual[1:]]
    assert (kept.folder / "kept/copy.toml").read_bytes() == (kept.folder / "config.toml").read_bytes()


@shows("job.print_config")
def test_print_config(done: dict[str, Done]) -> None:
    assert done["plain"].outcome.stdout.startswith("step 1  loss ")
    assert done["print_config"].outcome.stdout.startswith("[job]\nconfig_file = none ")
    assert "\nstep 1  loss " in done["print_config"].outcome.stdout


@shows("model.name", "model.flavor")
def test_model(done: dict[str, Done]) -> None:
    models = {"plain": "tiny_llama untied, 107,256", "flavor": "tiny_llama tied, 58,104"}
    models["another"] = "llama3 debugmodel, 6,163,712"
    for name, model in models.items():
        assert f"model: {model} parameters, compute in float32\n" in done[name].log


@shows("experimental.custom_import")
def test_custom_import(tmp_path: Path) -> None:
    unknown = run_jobs(tmp_path, {"unknown": ("--experimental.custom_import=",)})["unknown"].outcome
    assert unknown.code == 2
    assert unknown.stderr == (
        "error: --model.name=tiny_llama: no such model family; allowed: deepseek_v3, gemma3, gpt_oss, llama3, llama4,"
        " mistral, qwen3 (did you mean 'llama4'?)\n"
    )


@shows("model.hf_assets_path", "model.tokenizer_path")
def test_tokenizer(done: dict[str, Done]) -> None:
    first = [done[name].column("loss")[0] for name in ("plain", "hf_assets_path", "tokenizer_path")]
    assert first[0] != first[1] == first[2]  # the older key wins


@shows("metrics.log_freq")
def test_log_freq(done: dict[str, Done]) -> None:
    assert done["plain"].column("step") == [1, 2, 3]
    assert done["log_freq"].column("step") == [1, 2, 4, 5]


@shows("metrics.enable_tensorboard", "metrics.save_tb_folder")
def test_tensorboard(done: dict[str, Done]) -> None:
    def folders(name: str) -> list[str]:
        return [Path(file).parent.name for file in done[name].files() if "tfevents" in file]

    found = [folders(name) for name in ("plain", "enable_tensorboard", "save_tb_folder")]
    assert found == [[], ["tb"], ["board"]]


@shows("metrics.peak_tflops")
def test_peak(done: dict[str, Done]) -> None:
    steps = done["peak_tflops"].steps
    assert done["plain"].column("mfu") == [None, None, None]
    assert [step["mfu"] for step in steps] == pytest.approx([step["tflops"] / 0.5 for step in steps])


def profiled_steps(file: Path) -> int:
    names = Counter(event["name"].partition("#")[0] for event in json.loads(file.read_text())["traceEvents"])
    return names["ProfilerStep"]


@shows(
    "profiling.enable_profiling",
    "profiling.save_traces_folder",
    "profiling.profile_freq",
    "profiling.profiler_active",
)
def test_traces(done: dict[str, Done]) -> None:
    traces = {
        "plain": [],
        "enable_profiling": ["profile_traces/iteration_3/rank0_trace.json"],
        "save_traces_folder": ["kept/traces/iteration_3/rank0_trace.json"],
        "profile_freq": ["profile_traces/iteration_2/rank0_trace.json"],
        "profiler_active": ["profile_traces/iteration_3/rank0_trace.json"],
    }
    assert {name: [file for file in done[name].files() if "trace" in file] for name in traces} == traces
    recorded = {name: profiled_steps(done[name].folder / files[0]) for name, files in traces.items() if files}
    assert recorded == {"enable_profiling": 1, "save_traces_folder": 1, "profile_freq": 1, "profiler_active": 2}


@shows("profiling.profiler_warmup")
@pytest.mark.parametrize(("warmup", "begins"), [(1, 1), (2, 0)])
def test_profiler_warm_up(warmup: int, begins: int, tmp_path: Path) -> None:
    config = Profiling(enable_profiling=True, profile_freq=3, profiler_warmup=warmup)
    actions = []
    with Profiler(config, tmp_path, rank=0, device=torch.device("cpu")) as profiler:
        for _ in range(3):
            assert profiler._profile is not None
            actions.append(profiler._profile.current_action)
            profiler.step()
    assert [action != ProfilerAction.NONE for action in actions].index(True) == begins
    assert actions[-1] == ProfilerAction.RECORD_AND_SAVE


@shows("profiling.enable_memory_snapshot", "profiling.save_memory_snapshot_folder")
def test_memory_snapshots(done: dict[str, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert done["enable_memory_snapshot"].outcome.code == 2
    assert "profiling.enable_memory_snapshot = true: the device is cpu" in done["enable_memory_snapshot"].outcome.stderr
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text(""))
    for folder in ("one", "other"):
        config = Profiling(enable_memory_snapshot=True, profile_freq=1, save_memory_snapshot_folder=folder)
        with Profiler(config, tmp_path, rank=0, device=torch.device("cuda")) as profiler:
            profiler.step()
        assert (tmp_path / folder / "iteration_1/rank0_memory_snapshot.pickle").exists()


@shows("debug.seed")
def test_seed(done: dict[str, Done]) -> None:
    assert len({done[name].column("loss")[0] for name in ("plain", "seed", "no seed")}) == 3
    assert "seed: 0, since debug.seed is not set\n" in done["no seed"].log


def timeouts(argv: list[str], environ: dict[str, str]) -> list[list[float]]:
    """Seconds that collectives of all groups may take: before the first step, and after it."""
    os.environ.update(environ)
    from trainer.command import import_custom
    from trainer.config.load import load_job

    def now() -> list[float]:
        groups = list(dist.distributed_c10d._world.pg_map)
        gloo = [group for group in groups if dist.get_backend(group) == "gloo"]
        return sorted({g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in gloo})

    resolved = load_job(argv, os.environ)
    import_custom(resolved.job.experimental.custom_import)
    trainer = Trainer(resolved, os.environ)
    found = [now()]
    trainer.train()
    found.append(now())
    trainer.close()
    return found


@shows("comm.init_timeout_seconds", "comm.train_timeout_seconds")
def test_timeouts(tmp_path: Path) -> None:
    argv = [
        *SMALL,
        f"--job.dump_folder={tmp_path}",
        "--comm.init_timeout_seconds=77",
        "--comm.train_timeout_seconds=33",
    ]
    assert run_ranks(2, timeouts, argv, surroundings(), backend=None) == [[[77.0], [33.0]]] * 2


@shows("comm.trace_buf_size", "comm.save_traces_folder", "comm.save_traces_file_prefix")
@pytest.mark.parametrize("comm", [Comm(), Comm(trace_buf_size=9, save_traces_folder="x", save_traces_file_prefix="y")])
def test_flight_recorder(comm: Comm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **settings: None)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    distributed.init_process_group(World(0, 0, 1), torch.device("cuda", 0), comm, tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == str(comm.trace_buf_size)
    expected = tmp_path / comm.save_traces_folder / comm.save_traces_file_prefix
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(expected)


def parameter_bytes(text: str) -> int:
    (line,) = [line for line in text.splitlines() if line.startswith("  parameters ")]
    return int(line.split()[2].replace(",", ""))


@shows("comm.mode", "parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree")
def test_dry_run_of_degrees(tmp_path: Path) -> None:
    jobs = {
        f"{4 // n} replicated × {n} sharded": (
            "--comm.mode=fake_backend",
            "--training.local_batch_size=1",
            f"--parallelism.data_parallel_replicate_degree={4 // n}",
            f"--parallelism.data_parallel_shard_degree={n}",
        )
        for n in (4, 2, 1)
    }
    done = run_jobs(tmp_path, jobs, NGPU="4")
    for layout, job in done.items():
        assert f"layout: 4 ranks, {layout}\n" in job.outcome.stdout, job.outcome.stderr
        assert "nothing was trained" in job.outcome.stdout
    whole = 4 * 107_256
    shares = [whole / parameter_bytes(job.outcome.stdout) for job in done.values()]
    assert shares == pytest.approx([4, 2, 1], rel=0.1)
    assert list(tmp_path.iterdir()) == []
