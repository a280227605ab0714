"""What is remembered of the Hugging Face files that weights came from, so that an export can be what they were:
`checkpoint.export_dtype = "source"`.

It goes with the weights: into the `layout` of every manifest that is saved after them, which no resume compares, so it
survives any change of layout and is read without torch. Most tensors are of one type, so only the others are listed.
The manifest's own fields were rejected as its place: every older checkpoint would then be of another format.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from components.checkpoint.hf_sources import Source
from components.checkpoint.names import Table
from components.checkpoint.safetensors import FLOATS
from components.runtime.errors import CheckpointError

SOURCE = "hf_source"
"""Entry of a manifest's layout."""
AS_IN_SOURCE = "source"
"""The value of `checkpoint.export_dtype` that asks for what is recorded."""
_Float = Annotated[str, Field(pattern="^(float64|float32|float16|bfloat16)$")]


@dataclass(frozen=True)
class Record:
    """Types of their tensors, and which of those that need not be there were. What was quantized counts as bfloat16."""

    dtype: _Float
    """The type of most."""
    others: dict[str, _Float] = field(default_factory=dict)
    """Tensors of other types, each with its own."""
    besides: list[str] = field(default_factory=list)
    """Tensors that equal another one and were there nevertheless: the head of a tied model."""

    def type_of(self, name: str) -> str:
        """The type of one of their tensors."""
        return self.others.get(name, self.dtype)

    def plain(self) -> dict[str, Any]:
        """What a manifest's layout holds of it."""
        return asdict(self)


_ADAPTER = TypeAdapter(Record)


def record_of(table: Table, found: Mapping[str, Source]) -> Record:
    """The record of files that fit the table."""
    copies = sorted(name for name in found if (extra := table.extra(name)) is not None and extra.same_as)
    types = {name: FLOATS[found[name].dtype] for name in (*table.theirs, *copies)}
    most = Counter(types.values()).most_common(1)[0][0] if types else "float32"
    return Record(most, {name: dtype for name, dtype in sorted(types.items()) if dtype != most}, copies)


def read_record(layout: Mapping[str, Any]) -> Record | None:
    """The record that a manifest's layout holds, if any. Raises CheckpointError for something else under its name."""
    if SOURCE not in layout:
        return None
    try:
        return _ADAPTER.validate_json(json.dumps(layout[SOURCE]), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"layout.{SOURCE} of the manifest is no record: {error.errors()[0]['msg']}") from error


def missing_record(key: str) -> str:
    """The message that there is none. `key`: what has asked for it."""
    return (
        f'{key} = "{AS_IN_SOURCE}": these weights do not come from Hugging Face files, whose types they could have;'
        ' take "float32", "bfloat16" or "float16"'
    )
