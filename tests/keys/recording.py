"""A dataset that records which process made each row, in the file that `dataset_path` names. Brings the tiny model."""

import os
from pathlib import Path

import numpy as np

import tests.trainer.tiny  # noqa: F401  registers the model
from components.data.documents import DatasetRequest
from components.data.indexed import RowIndex, SyntheticRows
from components.data.registry import datasets


class Recording(SyntheticRows):
    """Synthetic rows; twelve of them for validation."""

    def __init__(self, request: DatasetRequest) -> None:
        super().__init__(request.seed, request.vocab_size, request.seq_len, validation=request.validation)
        self.count = 12 if request.validation else None
        self._file = Path(request.path or os.devnull)

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        with self._file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().row(n)


def _open(request: DatasetRequest) -> RowIndex:
    return Recording(request)


if "recording" not in datasets:
    datasets.register("recording", _open)
