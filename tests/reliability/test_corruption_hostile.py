"""Checkpoints that were forged, hashes and digests included, are loaded under an audit hook in a process with little
memory: nothing is run, imported or started, no file but those of the checkpoint is opened, none is written, and what is
no checkpoint is a CheckpointError. What each refusal says is tested beside the code (`test_checkpoint_hostile`).
"""

import hashlib
import io
import json
import os
import pickle
import resource
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from components.checkpoint.hashing import chunk_count, hash_chunks
from components.checkpoint.manifest import MANIFEST
from components.runtime.errors import CheckpointError
from tests.components.checkpoint.support import JOB, checkpointer, reseal, save, zeros
from tests.reliability.harness import Case, run
from tests.reliability.harness_figures import record

MEMORY = 256 << 20
"""What a load may take besides what the process has: the checkpoint has some kilobytes."""
FORBIDDEN = ("exec", "import", "marshal.loads", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen",
             "socket.", "ctypes.", "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link",
             "os.symlink", "os.chmod", "os.truncate", "shutil.")  # fmt: skip


class Seen(NamedTuple):
    """What a load came to."""

    error: str
    """Of the CheckpointError; empty if it loaded."""
    steps: list[int]
    """The steps that count as checkpoints, by manifest and sizes."""
    events: list[str]
    """What it did that a load has no business to do."""


class Watch:
    """Notes what the interpreter is asked to do that is forbidden."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.on = str(folder), list[str](), True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and (outside := self._is_outside(*arguments[:3])):
            self.events.append(f"open {outside}")
        elif event.startswith(FORBIDDEN):
            self.events.append(f"{event} {str(arguments)[:200]}")

    def _is_outside(self, path: Any, mode: str | None, flags: int) -> str:
        # A warning of torch's is shown with the line of torch's source that it came from.
        source = str(path).endswith(".py") and str(path).startswith(os.path.dirname(torch.__file__))
        inside = isinstance(path, int) or source or str(path).startswith(self.folder + os.sep)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return "" if inside and not writes else f"{path} ({mode}, {flags})"


def load_watched(root: Path, warm: Path) -> Seen:
    """Load step 1, after a good checkpoint, which makes torch import what it imports late."""
    checkpointer(warm).load(1, zeros(), job=JOB)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    watch, error = Watch(root), ""
    try:
        checkpointer(root).load(1, zeros(), job=JOB)
    except CheckpointError as failure:
        error = str(failure)
    steps = checkpointer(root).steps()
    watch.on = False
    return Seen(error, steps, watch.events)


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def marker(folder: Path) -> Path:
    return folder.parent.parent / "marker"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the right digest again."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["digest"]
    change(content)
    body = (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
    content["digest"] = hashlib.sha256(body).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / "tensors.json").read_bytes())
    change(index)
    (folder / "tensors.json").write_text(json.dumps(index))
    reseal(folder)


def put_tensor(folder: Path, data: bytes) -> None:
    """Append other bytes to the tensors' file, as those of model.w."""
    path = folder / "__0_0.distcp"
    start = path.stat().st_size
    with path.open("ab") as file:
        file.write(data)
    place = {"file": path.name, "start": start, "length": len(data)}
    edit_index(folder, lambda index: index["model.w"]["pieces"][0].update(place))


def reseal_chunks(folder: Path) -> None:
    """`reseal` for a state.json of several chunks."""
    size = (folder / "state.json").stat().st_size
    chunks = [(partial((folder / "state.json").open, "rb"), index) for index in range(chunk_count(size))]
    entry = {"size": size, "hashes": hash_chunks(chunks)}
    edit_manifest(folder, lambda m: next(f for f in m["files"] if f["name"] == "state.json").update(entry))


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def bomb(megabytes: int) -> bytes:
    """A tensor whose bytes are compressed: some kilobytes that become many."""
    source = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(5, 3))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, bytes(megabytes << 20) if name.endswith("data/0") else data)
    return buffer.getvalue()


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def evil_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker(folder))))
    reseal(folder)


def evil_state(folder: Path) -> None:
    (folder / "state.json").write_bytes(pickle.dumps(Evil(marker(folder))))
    reseal(folder)


def evil_index(folder: Path) -> None:
    (folder / "tensors.json").write_bytes(pickle.dumps(Evil(marker(folder))))
    reseal(folder)


def evil_tensor(folder: Path) -> None:
    put_tensor(folder, saved(Evil(marker(folder))))


def evil_legacy_tensor(folder: Path) -> None:
    put_tensor(folder, saved(Evil(marker(folder)), _use_new_zipfile_serialization=False))


def evil_bare_pickle(folder: Path) -> None:
    put_tensor(folder, pickle.dumps(Evil(marker(folder)), protocol=2))


def evil_tensor_attribute(folder: Path) -> None:
    tensor = torch.zeros(5, 3)
    tensor.trap = Evil(marker(folder))  # pyrefly: ignore[missing-attribute]  # saved with the tensor's attributes
    put_tensor(folder, saved(tensor))


def torchscript_tensor(folder: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Module(), torch.zeros(1)), buffer)
    put_tensor(folder, buffer.getvalue())


def huge_tensor_of_one_number(folder: Path) -> None:
    put_tensor(folder, saved(torch.zeros(1).expand(1 << 40, 3)))


def compressed_bomb(folder: Path) -> None:
    put_tensor(folder, bomb(320))


def nothing_of_a_tensor(folder: Path) -> None:
    put_tensor(folder, b"")


def absolute_name(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"][0].update(name="/etc/passwd"))


def name_that_leads_out(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"][0].update(name="../../marker"))


def name_with_a_zero_byte(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"][0].update(name="state.json\0.x"))


def tensor_in_an_absolute_file(folder: Path) -> None:
    edit_index(folder, lambda i: i["model.w"]["pieces"][0].update(file="/etc/passwd"))


def tensor_in_a_file_outside(folder: Path) -> None:
    edit_index(folder, lambda i: i["model.w"]["pieces"][0].update(file="../../outside"))


def name_twice(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["files"].append(m["files"][0]))


def key_twice(folder: Path) -> None:
    raw = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(raw.replace('"step": 1', '"step": 2,\n "step": 1'))


def link_to_a_file(folder: Path) -> None:
    (folder / "state.json").rename(folder.parent.parent / "outside")
    (folder / "state.json").symlink_to(folder.parent.parent / "outside")


def link_to_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent.parent / "outside")
    (folder / MANIFEST).symlink_to(folder.parent.parent / "outside")


def link_to_a_device(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to("/dev/zero")


def link_instead_of_the_folder(folder: Path) -> None:
    folder.rename(folder.parent.parent / "outside")
    folder.symlink_to(folder.parent.parent / "outside")


def pipe_instead_of_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def pipe_instead_of_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def manifest_of_many_gigabytes(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 64 << 30)


def state_of_half_a_gigabyte(folder: Path) -> None:
    os.truncate(folder / "state.json", 1 << 29)
    reseal_chunks(folder)


def many_files(folder: Path) -> None:
    more = [{"name": f"f{number}", "size": 0, "hashes": []} for number in range(30_000)]
    edit_manifest(folder, lambda m: m["files"].extend(more))


def many_pieces(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        piece = index["model.w"]["pieces"][0]
        index["model.w"]["pieces"] = [piece] * 50_000

    edit_index(folder, change)


def more_elements_than_there_are_bytes(folder: Path) -> None:
    size = [1 << 50, 3]
    edit_index(folder, lambda i: (i["model.w"].update(shape=size), i["model.w"]["pieces"][0].update(sizes=size)))


def number_without_end(folder: Path) -> None:
    edit_index(folder, lambda i: i["model.w"]["pieces"][0].update(start=10**4000))


def tensor_that_nobody_expects(folder: Path) -> None:
    edit_index(folder, lambda i: i.update({"model.extra": i["model.w"]}))


def deep_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["layout"].update(deep=nested(900)))


def less_deep_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["layout"].update(deep=nested(300)))


def deeper_manifest(folder: Path) -> None:
    raw = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(raw.replace('"layout": {', '"layout": {"x": ' + "[" * 50_000 + "]" * 50_000 + ","))


def deep_state(folder: Path) -> None:
    (folder / "state.json").write_text("[" * 50_000 + "]" * 50_000)
    reseal(folder)


def deep_index(folder: Path) -> None:
    (folder / "tensors.json").write_text('{"model.w":' + "[" * 50_000 + "]" * 50_000 + "}")
    reseal(folder)


HARMLESS = (evil_metadata, huge_tensor_of_one_number)
"""What is never read, or read no further than it is asked for, loads."""
REFUSED = (
    evil_state,
    evil_index,
    evil_tensor,
    evil_legacy_tensor,
    evil_bare_pickle,
    evil_tensor_attribute,
    torchscript_tensor,
    compressed_bomb,
    nothing_of_a_tensor,
    absolute_name,
    name_that_leads_out,
    name_with_a_zero_byte,
    tensor_in_an_absolute_file,
    tensor_in_a_file_outside,
    name_twice,
    key_twice,
    link_to_a_file,
    link_to_the_manifest,
    link_to_a_device,
    link_instead_of_the_folder,
    pipe_instead_of_a_file,
    pipe_instead_of_the_manifest,
    manifest_of_many_gigabytes,
    state_of_half_a_gigabyte,
    many_files,
    many_pieces,
    more_elements_than_there_are_bytes,
    number_without_end,
    tensor_that_nobody_expects,
    deep_manifest,
    less_deep_manifest,
    deeper_manifest,
    deep_state,
    deep_index,
)


def see(tmp_path: Path, forge: Callable[[Path], None]) -> Seen:
    root, warm = tmp_path / "checkpoint", tmp_path / "warm"
    save(root, 1)
    save(warm, 1)
    forge(root / "step-1")
    ended = run(Case(load_watched, (root, warm), root, timeout=20))
    assert ended.code == 0, ended.log
    assert not (tmp_path / "marker").exists()
    return ended.value


def test_the_hook_sees_what_is_forbidden(tmp_path: Path) -> None:
    def misbehave(root: Path) -> list[str]:
        watch = Watch(root)
        pickle.loads(pickle.dumps(Evil(root / "marker")))
        Path("/etc/hostname").read_bytes()
        exec("1")
        return watch.events

    pid = os.fork()
    if not pid:
        events = misbehave(tmp_path)
        found = [any(event.startswith(name) for event in events) for name in ("os.system", "open /etc", "exec")]
        os._exit(0 if all(found) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("forge", HARMLESS, ids=lambda forge: forge.__name__)
def test_what_is_never_read_may_be_anything(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    assert see(tmp_path, forge) == Seen("", [1], [])


@pytest.mark.parametrize("forge", REFUSED, ids=lambda forge: forge.__name__)
def test_what_is_forged_is_refused_and_runs_nothing(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    seen = see(tmp_path, forge)
    assert seen.events == []
    assert seen.error.startswith("checkpoint step-1"), seen.error
    assert "\n" not in seen.error
    record("hostile", f"{len(REFUSED) + len(HARMLESS)} forged checkpoints: 0 executions, 0 files opened outside")
