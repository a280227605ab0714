"""The datasets that a TOML can name. A module in `experimental.custom_import` adds its own with `datasets.register`.

An entry opens a DatasetRequest as documents (RandomAccess or Sequential) or, where it makes whole rows itself, as a
RowIndex. Opening reads no network; iterating may.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from components.data.documents import DatasetRequest, RandomAccess, Sequential
from components.data.files import is_local, open_files
from components.data.hub import HubStream, SavedDataset, is_hub_name, is_saved_dataset
from components.data.indexed import RowIndex, SyntheticRows
from components.data.paths import find_path
from components.data.stdlib import open_stdlib
from components.mesh.registry import Registry
from components.runtime.errors import ConfigError, DataError

OpenDataset = Callable[[DatasetRequest], RandomAccess | Sequential | RowIndex]

datasets: Registry[OpenDataset] = Registry("dataset", "training.dataset")


def open_dataset(name: str, request: DatasetRequest) -> RandomAccess | Sequential | RowIndex:
    """The dataset that `dataset` and `dataset_path` of a section name together.

    Raises ConfigError if the name stands for nothing and there is no path, DataError if the data cannot be opened.
    """
    if name in datasets:
        return datasets[name](request)
    if request.path is None:
        section = "validation" if request.validation else "training"
        allowed = datasets.allowed(name)
        raise ConfigError(
            f"{section}.dataset = {name!r}: no such dataset; {allowed}; or any name together with dataset_path"
        )
    return open_path(request.path, request.text_field, split="validation" if request.validation else "train")


def open_path(
    path: str, field: str, split: str, subset: str | None = None, patterns: Sequence[str] = ()
) -> RandomAccess | Sequential:
    """Documents at a local path, or of a Hugging Face dataset where none exists. `patterns`: see `open_files`."""
    found = find_path(path)
    if found is not None and (found / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(Path(path) / x.name) for x in found.iterdir() if is_saved_dataset(x)))
        raise DataError(f"{path}: a saved DatasetDict, which has a dataset for each split; name one of them: {splits}")
    if found is not None and is_saved_dataset(found):
        return SavedDataset(found, field)
    if is_local(path) or not is_hub_name(path):
        return open_files(path, field, patterns)
    return HubStream(path, field, split, subset)


def hub_dataset(path: str, split: str, subset: str | None = None, patterns: Sequence[str] = ()) -> OpenDataset:
    """An entry for a Hugging Face dataset. `dataset_path` may name a local copy; `patterns` pick the split's files."""
    return lambda request: open_path(request.path or path, request.text_field, split, subset, patterns)


def local_dataset(path: str) -> OpenDataset:
    """An entry for local files."""
    return lambda request: open_path(request.path or path, request.text_field, split="train")


def stdlib_dataset(split: str) -> OpenDataset:
    """An entry for the standard library; `dataset_path` may name another Python's."""
    return lambda request: open_stdlib(split, Path(request.path) if request.path else None)


def _synthetic(request: DatasetRequest) -> RowIndex:
    if request.path is not None:
        raise ConfigError(
            f"dataset_path = {request.path!r}: the dataset 'synthetic' is drawn, not read; remove the path"
        )
    return SyntheticRows(request.seed, request.vocab_size, request.seq_len, validation=request.validation)


datasets.register("c4", hub_dataset("allenai/c4", "train", "en", ("c4-train.*", "en/c4-train.*")))
datasets.register(
    "c4_validation", hub_dataset("allenai/c4", "validation", "en", ("c4-validation.*", "en/c4-validation.*"))
)
datasets.register("c4_test", local_dataset("tests/assets/c4_test"))
datasets.register("pystdlib", stdlib_dataset("train"))
datasets.register("pystdlib_validation", stdlib_dataset("validation"))
datasets.register("synthetic", _synthetic)
