"""Verifier: reads manifests and checks checkpoints against them; the ranks share the work and agree on the verdict."""

from pathlib import Path
from typing import Literal

from components.checkpoint.inspect import changed_chunks, chunks_of
from components.checkpoint.manifest import MANIFEST, Manifest, read_manifest, render
from components.checkpoint.ranks import Ranks
from components.checkpoint.storage import Folder, Storage, open_folder, step_folders, step_name
from components.runtime.errors import CheckpointError
from components.runtime.logging import logger

Verify = Literal["hashes", "sizes"]
"""What is checked of a checkpoint: every byte, or only that its files have their sizes (`checkpoint.verify`)."""


class Verifier:
    """Checks the checkpoints in a storage, and remembers which it has found whole.

    A checkpoint is given as a step of this job or as the path or URL of any checkpoint's folder.
    """

    def __init__(self, storage: Storage, ranks: Ranks, verify: Verify) -> None:
        self._storage, self._ranks, self._hashes = storage, ranks, verify == "hashes"
        self._whole: set[tuple[str, bytes]] = set()

    def folder(self, step: int | Path | str) -> Folder:
        """Where a checkpoint is."""
        return self._storage.folder(step_name(step)) if isinstance(step, int) else open_folder(step)

    def valid(self) -> dict[int, Manifest]:
        """Manifests of the checkpoints that are valid by manifest and sizes, by ascending step. Not collective."""
        found: dict[int, Manifest] = {}
        for step in step_folders(self._storage):
            try:
                found[step] = self._read(step)
            except CheckpointError as error:
                logger.debug("step-%d is not valid: %s", step, error)
        return found

    def finished(self) -> list[int]:
        """Steps whose folder has a manifest, valid or not, ascending. Others are no checkpoints; the log says so."""
        finished = []
        for step in step_folders(self._storage):
            folder = self.folder(step)
            if MANIFEST in folder.names():
                finished.append(step)
            else:
                logger.warning("'%s' has no %s: it is not a checkpoint, and is ignored", folder.path, MANIFEST)
        return finished

    def manifest(self, step: int | Path | str) -> Manifest:
        """The manifest; sizes are checked, hashes are not. Collective. Raises CheckpointError."""
        folder = self.folder(step)
        name = folder.name if isinstance(step, int) else f"'{folder.path}'"
        return self._ranks.on_first(lambda: self._read(step), f"checkpoint {name}")

    def _read(self, step: int | Path | str) -> Manifest:
        manifest = read_manifest(self.folder(step))
        if isinstance(step, int) and manifest.step != step:
            raise CheckpointError(f"its {MANIFEST} says step {manifest.step}: the folder has been renamed")
        return manifest

    def problems(self, step: int | Path | str) -> list[str]:
        """Check a checkpoint, to the last byte or by sizes; what is wrong, empty if nothing is. Collective."""
        try:
            self._check(step, self.manifest(step))
        except CheckpointError as error:
            return [str(error)]
        return []

    def require_whole(self, step: int | Path | str) -> None:
        """Check a checkpoint, unless this object has done so before. Collective. Raises CheckpointError."""
        manifest = self.manifest(step)
        if self._key(step, manifest) not in self._whole:
            self._check(step, manifest)

    def _key(self, step: int | Path | str, manifest: Manifest) -> tuple[str, bytes]:
        return self.folder(step).path, render(manifest)

    def _check(self, step: int | Path | str, manifest: Manifest) -> None:
        if not self._hashes:
            return
        folder, what = self.folder(step), f"checkpoint {self.folder(step).name}"
        mine = chunks_of(manifest)[self._ranks.rank :: self._ranks.size]
        changed = self._ranks.everywhere(lambda: changed_chunks(folder, mine, manifest.chunk_bytes), what)
        if problems := sorted(text for texts in self._ranks.all_gather(changed) for text in texts):
            raise CheckpointError(f"{what} is broken: {'; '.join(problems)}")
        self._whole.add(self._key(step, manifest))
