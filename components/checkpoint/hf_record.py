"""What is remembered of the Hugging Face files that weights came from, so that an export can be what they were:
`checkpoint.export_dtype = "source"`.

It goes with the weights: into the `layout` of every manifest that is saved after them, which no resume compares, so it
survives any change of layout and is read without torch. Most tensors are of one type, so only the others are listed.
The manifest's own fields were rejected as its place: every older checkpoint would then be of another format.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from components.checkpoint.hf_sources import Source
from components.checkpoint.names import Table
from components.checkpoint.safetensors import FLOATS
from components.runtime.errors import CheckpointError

SOURCE = "hf_source"
"""Entry of a manifest's layout."""
AS_IN_SOURCE = "source"
"""The value of `checkpoint.export_dtype` that asks for what is recorded."""
Float = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Record:
    """Types of their tensors, and which of those that need not be there were. What was quantized counts as bfloat16."""

    dtype: Float
    """The type of most."""
    others: Annotated[dict[str, Float], Field(default_factory=dict)]
    """Tensors of other types, each with its own."""
    besides: Annotated[list[str], Field(default_factory=list)]
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
    return _ADAPTER.validate_python(
        {"dtype": most, "others": {n: t for n, t in sorted(types.items()) if t != most}, "besides": copies}
    )


def read_record(layout: Mapping[str, Any]) -> Record | None:
    """The record that a manifest's layout holds, if any. Raises CheckpointError for something else under its name."""
    if SOURCE not in layout:
        return None
    try:
        return _ADAPTER.validate_python(layout[SOURCE], strict=True)
    except ValidationError as error:
        raise CheckpointError(f"layout.{SOURCE} of the manifest is no record: {error.errors()[0]['msg']}") from error


def missing_record(subject: str) -> str:
    """The message that there is none. `subject`: what was not imported."""
    return (
        f'export_dtype = "{AS_IN_SOURCE}": {subject} not from Hugging Face files, whose types they could have; take'
        ' "float32", "bfloat16" or "float16"'
    )
