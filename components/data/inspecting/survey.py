"""What rows add up to: tokens and documents of each source, padding, labels, and how long documents are."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from components.data.inspecting.marked import harmless
from components.data.inspecting.view import Piece, RowView
from components.mesh.batch import IGNORE


@dataclass
class Tally:
    """What the rows hold of one source."""

    tokens: int = 0
    documents: int = 0
    """Those that begin in these rows."""
    trained: int = 0
    """Places of its documents at which a loss is taken."""


@dataclass
class Survey:
    """Sums over rows."""

    unit: Literal["tokens", "documents"] = "tokens"
    """What the shares of sources are shares of."""
    rows: int = 0
    places: int = 0
    """Rows × their length."""
    padding: int = 0
    """Places that nothing fills."""
    trained: int = 0
    """Places at which a loss is taken."""
    documents: int = 0
    """Pieces of documents, one for each row that holds some of it."""
    sources: dict[str, Tally] = field(default_factory=dict)
    """Empty where the row source does not say where its documents come from."""
    before: Mapping[str, int] = field(default_factory=dict)
    """Tokens or documents of each source that the job has had before these rows, where the row source knows."""
    whole: bool = True
    """Whether `lengths` are of whole documents, each counted where it begins; else they are of pieces."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens → number of documents."""

    def add(self, view: RowView) -> None:
        """Count a row."""
        self.rows += 1
        self.places += len(view.tokens)
        self.padding += view.padding
        self.trained += view.trained
        for piece in view.documents:
            self.documents += 1
            self._measure(piece)
            if piece.origin is not None:
                tally = self.sources.setdefault(piece.origin.source, Tally())
                tally.tokens += len(piece)
                tally.documents += piece.origin.offset == 0
                tally.trained += int((view.labels[piece.start : piece.stop] != IGNORE).sum())

    @property
    def served(self) -> dict[str, int]:
        """Tokens or documents of each source that the job has had since its first step."""
        return {name: had + getattr(self.sources.get(name, Tally()), self.unit) for name, had in self.before.items()}

    def _measure(self, piece: Piece) -> None:
        self.whole = self.whole and piece.origin is not None
        if piece.origin is None:
            self.lengths[len(piece)] += 1
        elif not piece.origin.offset:
            self.lengths[piece.origin.length] += 1

    def histogram(self) -> list[tuple[int, int, int]]:
        """Documents by length: (shortest, longest, number), the longest being twice the shortest at most."""
        if not self.lengths:
            return []
        powers = Counter[int]()
        for length, number in self.lengths.items():
            powers[length.bit_length()] += number
        filled = range(min(powers), max(powers) + 1)
        return [(1 << power >> 1, (1 << power) - 1, powers[power]) for power in filled]

    def source_rows(self, shares: Mapping[str, float]) -> list[tuple[str, ...]]:
        """A table of the sources, its heading first. `shares`: the part of the mixture that each should be."""
        total = sum(getattr(tally, self.unit) for tally in self.sources.values())
        head = ("source", "tokens", "documents", "trained", f"share of {self.unit}", "wanted", "since the start")
        rows: list[tuple[str, ...]] = [head]
        had = self.served
        for name in sorted({*self.sources, *shares}):
            tally = self.sources.get(name, Tally())
            wanted = f"{shares[name]:.1%}" if name in shares else "n/a"
            trained, share = percent(tally.trained, tally.tokens), percent(getattr(tally, self.unit), total)
            served = f"{had[name]:,}" if name in had else "n/a"
            rows.append((harmless(name), f"{tally.tokens:,}", f"{tally.documents:,}", trained, share, wanted, served))
        return rows

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        histogram = [{"from": low, "to": high, "documents": number} for low, high, number in self.histogram()]
        return {
            "rows": self.rows,
            "places": self.places,
            "padding": self.padding,
            "trained": self.trained,
            "documents": self.documents,
            "served": self.served,
            "sources": {name: vars(tally) for name, tally in sorted(self.sources.items())},
            "lengths_of": "documents" if self.whole else "pieces",
            "lengths": histogram,
        }


def percent(part: int, whole: int) -> str:
    """A share; n/a of nothing."""
    return f"{part / whole:.1%}" if whole else "n/a"
