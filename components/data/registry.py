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
from components.data.remote import local_path
from components.data.stdlib import open_stdlib
from components.mesh.registry import Registry
from components.runtime.errors import ConfigError, DataError
from components.runtime.urls import is_url

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
    return open_path(request.path, request)


def open_path(
    path: str,
    request: DatasetRequest,
    split: str | None = None,
    subset: str | None = None,
    patterns: Sequence[str] = (),
) -> RandomAccess | Sequential:
    """Documents at a local path or URL, or of a Hugging Face dataset where none exists.

    `split`, `subset`: what the name of a dataset stands for, if the request says nothing else. `patterns`: those of
    that split, see `open_files`. Raises DataError.
    """
    patterns = () if request.split or request.subset else patterns
    found = find_path(local_path(path))
    if found is not None and (found / "dataset_dict.json").is_file():
        found = _split_of(path, found, request.split)
    elif found is not None and is_saved_dataset(found) and request.split:
        raise DataError(f"{path}: a saved dataset, which has no splits; leave out split = {request.split!r}")
    if found is not None and is_saved_dataset(found):
        return SavedDataset(found, request.fields)
    if is_url(path) or is_local(path) or not is_hub_name(path):
        return open_files(path, request.fields, patterns, request.split, request.subset)
    default = split or ("validation" if request.validation else "train")
    return HubStream(path, request.split or default, request.subset or subset)


def _split_of(path: str, folder: Path, split: str | None) -> Path:
    """The folder of a split of a saved DatasetDict. Raises DataError."""
    if split is not None and is_saved_dataset(folder / split):
        return folder / split
    splits = ", ".join(sorted(str(Path(path) / x.name) for x in folder.iterdir() if is_saved_dataset(x)))
    raise DataError(f"{path}: a saved DatasetDict, which has a dataset for each split; name one of them: {splits}")


def hub_dataset(path: str, split: str, subset: str | None = None, patterns: Sequence[str] = ()) -> OpenDataset:
    """An entry for a Hugging Face dataset. `dataset_path` may name a local copy; `patterns` pick the split's files."""
    return lambda request: open_path(request.path or path, request, split, subset, patterns)


def local_dataset(path: str) -> OpenDataset:
    """An entry for local files."""
    return lambda request: open_path(request.path or path, request)


def stdlib_dataset(split: str) -> OpenDataset:
    """An entry for the standard library, or for what `dataset_path` names instead."""

    def open_it(request: DatasetRequest) -> RandomAccess | Sequential:
        if request.path is not None:
            return open_path(request.path, request)
        _without_splits("of the standard library has names of its own for its splits", request)
        return open_stdlib(split)

    return open_it


def _without_splits(why: str, request: DatasetRequest) -> None:
    for key, value in (("split", request.split), ("subset", request.subset)):
        if value is not None:
            raise ConfigError(f"{key} = {value!r}: the dataset {why}; leave it out")


def _synthetic(request: DatasetRequest) -> RowIndex:
    if request.path is not None:
        raise ConfigError(
            f"dataset_path = {request.path!r}: the dataset 'synthetic' is drawn, not read; remove the path"
        )
    _without_splits("'synthetic' has none", request)
    return SyntheticRows(request.seed, request.vocab_size, request.seq_len, validation=request.validation)


datasets.register("c4", hub_dataset("allenai/c4", "train", "en", ("c4-train.*", "en/c4-train.*")))
datasets.register(
    "c4_validation", hub_dataset("allenai/c4", "validation", "en", ("c4-validation.*", "en/c4-validation.*"))
)
datasets.register("c4_test", local_dataset("tests/assets/c4_test"))
datasets.register("pystdlib", stdlib_dataset("train"))
datasets.register("pystdlib_validation", stdlib_dataset("validation"))
datasets.register("synthetic", _synthetic)
