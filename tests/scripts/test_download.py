"""scripts/download_hf_assets.py against a hub on this machine: what comes is whole, or it is said why not."""

import importlib.util
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.checkpoint import hub as ours
from tests.scripts.hub_server import COMMIT, Hub, serving

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_secretSecretSecretSecretSecret"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def files() -> dict[str, bytes]:
    draw = random.Random(3)
    return {
        "config.json": b'{"model_type": "llama"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}",
        "tokenizer.model": draw.randbytes(300),
        "README.md": b"# tiny",
        "consolidated.safetensors": draw.randbytes(5000),
        FIRST: draw.randbytes(4321),
        SECOND: draw.randbytes(1234),
        INDEX: json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode(),
        "original/params.json": b"{}",
    }


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(files())) as served:
        yield served


@pytest.fixture(autouse=True)
def small_blocks_and_no_login(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ours, "BLOCK_BYTES", 1000)


def run(hub: Hub, folder: Path, *arguments: str, **environ: str) -> Outcome:
    """The tool, in this process."""
    spec = importlib.util.spec_from_file_location("download_hf_assets", ROOT / "scripts/download_hf_assets.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for key, value in environ.items():
            patch.setenv(key, value)
        try:
            code = tool.main([*arguments, "--local_dir", str(folder / "hf")])
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_alone(hub: Hub, folder: Path, *arguments: str, **environ: str) -> Outcome:
    """The tool, as a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "scripts/download_hf_assets.py", *arguments, "--local_dir", str(folder / "hf")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), **environ},
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "hf/tiny").iterdir()}


def test_it_fetches_tokenizer_config_and_the_weights_that_the_index_names(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "acme/tiny")
    assert done.returncode == 0, done.stderr
    left_out = {"README.md", "consolidated.safetensors", "original/params.json"}
    assert there(tmp_path) == {name: data for name, data in hub.files.items() if name not in left_out}
    path = tmp_path / "hf/tiny"
    *_, toml = done.stdout.partition("for your TOML:\n")
    assert f"acme/tiny at commit {COMMIT}: 8 files in '{path}'" in done.stdout
    assert toml == (
        f'\n[model]\nhf_assets_path = "{path}"\n\n[checkpoint]\nenable = true\ninitial_load_path = "{path}"\n'
        "initial_load_in_hf = true\n"
    )


def test_titans_flags_fetch_a_tokenizer_alone_and_say_no_checkpoint_lines(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "--repo_id", "acme/tiny", "--assets", "tokenizer", "--additional_patterns", "READ*")
    assert done.returncode == 0, done.stderr
    assert {*there(tmp_path)} == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "README.md"}
    assert "[checkpoint]" not in done.stdout


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FIRST] = 2500
    broken = run(hub, tmp_path, "acme/tiny", "--assets", "safetensors")
    assert broken.returncode == 1
    assert "it goes on where it stopped" in broken.stderr
    assert FIRST not in there(tmp_path)
    hub.break_at.clear()
    hub.requests.clear()
    done = run(hub, tmp_path, "acme/tiny", "--assets", "safetensors")
    assert done.returncode == 0, done.stderr
    assert hub.ranges(FIRST) == ["2000-2999", "3000-3999", "4000-4320"]
    assert f"{FIRST} (0.0 MB): resumed at byte 2,000, verified" in done.stdout
    assert there(tmp_path) == {name: hub.files[name] for name in (FIRST, SECOND, INDEX)}
    hub.requests.clear()
    again = run(hub, tmp_path, "acme/tiny", "--assets", "safetensors")
    assert again.returncode == 0
    assert hub.ranges(FIRST) == hub.ranges(SECOND) == hub.ranges(INDEX) == []
    assert f"{FIRST} (0.0 MB): is there already, and whole" in again.stdout


def test_a_server_that_ignores_ranges_is_understood(hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FIRST] = 2500
    run(hub, tmp_path, "acme/tiny", "--assets", "safetensors")
    hub.break_at.clear()
    hub.ignores_ranges = True
    done = run(hub, tmp_path, "acme/tiny", "--assets", "safetensors")
    assert done.returncode == 0, done.stderr
    assert there(tmp_path) == {name: hub.files[name] for name in (FIRST, SECOND, INDEX)}


@pytest.mark.parametrize("name", [SECOND, "config.json"], ids=["sha256", "git"])
def test_bytes_that_are_not_the_hubs_are_deleted_and_fail(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt.add(name)
    done = run(hub, tmp_path, "acme/tiny", "--assets", "config", "safetensors")
    assert done.returncode == 1
    assert f"{name}: its hash is " in done.stderr
    assert "it was damaged on its way and has been deleted; run the same command again" in done.stderr
    assert not [found for found in there(tmp_path) if name in found]
    hub.corrupt.clear()
    assert run(hub, tmp_path, "acme/tiny", "--assets", "config", "safetensors").returncode == 0
    assert there(tmp_path)[name] == hub.files[name]


def test_a_file_that_was_changed_here_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    run(hub, tmp_path, "acme/tiny", "--assets", "config")
    (tmp_path / "hf/tiny/config.json").write_bytes(b'{"model_type": "lama!"}')
    done = run(hub, tmp_path, "acme/tiny", "--assets", "config")
    assert done.returncode == 0
    assert there(tmp_path)["config.json"] == hub.files["config.json"]


def test_a_gated_model_needs_the_environments_token_which_nobody_sees(hub: Hub, tmp_path: Path) -> None:
    hub.token = TOKEN
    refused = run(hub, tmp_path, "acme/tiny", "--assets", "config", HF_TOKEN="hf_wrongWrongWrongWrong")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: acme/tiny is gated: ask for access on its page, then set HF_TOKEN, or log in with `hf auth login` as a"
        " user who has it\n"
    )
    assert "hf_wrong" not in refused.stdout + refused.stderr
    done = run(hub, tmp_path, "acme/tiny", "--assets", "config", HF_TOKEN=TOKEN)
    assert done.returncode == 0
    assert TOKEN not in done.stdout + done.stderr
    assert {authorization for *_, authorization in hub.requests} >= {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("token", [TOKEN + "\nx", TOKEN + "é"], ids=["newline", "not ascii"])
def test_a_token_that_the_http_client_refuses_is_not_in_what_it_says(hub: Hub, tmp_path: Path, token: str) -> None:
    done = run_alone(hub, tmp_path, "acme/tiny", "--assets", "config", HF_TOKEN=token)
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_as_an_argument_is_refused_without_repeating_it(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "acme/tiny", "--hf_token", TOKEN)
    assert done.returncode == 2
    assert "--hf_token: everybody on this machine can read a command's arguments" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.requests == []


WRONG: list[tuple[list[str], int, str]] = [
    (["acme/tinny"], 2, "acme/tinny: no such model on the hub, or it is private"),
    (["acme/tiny", "--revision", "v9"], 2, "acme/tiny has no revision 'v9': give a branch, a tag or a commit of it"),
    (["a b"], 2, "'a b' is no name of a model; it looks like owner/name"),
    (["acme/tiny", "--additional_patterns", "*.gguf"], 2, "acme/tiny has no files of pattern '*.gguf'; it has README"),
    ([], 2, "which model? give its name on the hub"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WRONG, ids=[case[2][:24] for case in WRONG])
def test_what_is_not_there_is_the_users_to_mend(
    hub: Hub, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    done = run(hub, tmp_path, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert done.stderr.startswith(f"error: {text}")


@pytest.mark.parametrize("environ", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_without_a_network_it_fails_and_says_what_to_look_at(hub: Hub, tmp_path: Path, environ: dict[str, str]) -> None:
    done = run_alone(hub, tmp_path, "acme/tiny", **environ)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE)" in done.stderr


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: Any) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(ours.shutil, "disk_usage", lambda path: Usage)
    fetch = ours._Fetch(lambda name: pytest.fail("nothing is to be fetched"), tmp_path, print)
    with pytest.raises(ours.DownloadError, match=r"5\.0 GB are to come, but '.*' has 0\.0 GB free"):
        fetch.require_room([ours.RemoteFile("model.safetensors", 5_000_000_000, "sha256", "00" * 32)])
    error = OSError(28, "No space left on device")
    assert str(ours._explain(error, "acme/tiny", "main")) == (
        "the disk is full (No space left on device): free space, and run the same command again"
    )


def test_names_that_lead_out_of_the_folder_are_not_fetched() -> None:
    from huggingface_hub.hf_api import RepoSibling

    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".git", "..", "a\\b"):
        assert ours._remote(RepoSibling(name, size=1, blob_id="00")) is None
