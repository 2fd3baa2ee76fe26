"""The examples of several sources, and how often an epoch uses those of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lowmem_ft.core.errors import ConfigError
from lowmem_ft.data.examples import Example
from lowmem_ft.data.packing import permutation
from lowmem_ft.data.store import StoredExamples

MOST_USES = 1 << 27  # of examples in an epoch that weights ask for: 8 bytes of the host each
COMPARED = 1 << 18  # examples whose fingerprints are compared at once
T = TypeVar("T", covariant=True)


@dataclass(frozen=True, slots=True)
class Mixture(Sequence[T]):
    """The examples (or preferences) of several sources, one after the other.

    Attributes:
        weights: of each source. An epoch uses each of its examples `floor(weight)` times, and a share of
            `weight - floor(weight)` of them once more: others in each epoch, until all have had their turn.

    Raises:
        ConfigError: the weights ask for more than `MOST_USES`.
    """

    sources: tuple[Sequence[T], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        uses = sum(weight * len(source) for source, weight in zip(self.sources, self.weights, strict=True))
        if uses > max(MOST_USES, len(self)):
            raise ConfigError(
                "An epoch would use too many examples.",
                given=f"{uses:,.0f} by the weights of data.train",
                allowed=f"{MOST_USES:,}",
                fix="lower the weights, which say how often an epoch uses each example of a source",
            )

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        for source in self.sources:
            if at < len(source):
                break
            at -= len(source)
        return source[at]

    @property
    def varies(self) -> bool:
        """Whether epochs draw different examples, and so may have different numbers of steps."""
        return any(weight % 1 for weight in self.weights)

    @property
    def unused(self) -> list[int]:
        """Numbers of the sources whose weights are so small that no epoch uses an example of them."""
        sources = enumerate(zip(self.sources, self.weights, strict=True))
        return [number for number, (source, weight) in sources if not int(weight) + _drawn(source, weight)]

    def epochs(self, seed: int) -> Iterator[NDArray[np.int64]]:
        """Of each epoch the indices of its examples, those of the first source first; `seed` decides what is drawn."""
        parts = list(zip(self.sources, self.weights, strict=True))
        # sources of the same length must not draw the same
        draws = [_in_turn(len(it), _drawn(it, weight), seed + (at << 32)) for at, (it, weight) in enumerate(parts)]
        while True:
            found, start = [], 0
            for (source, weight), draw in zip(parts, draws, strict=True):
                indices = np.arange(start, start + len(source))
                found += [*[indices] * int(weight), start + np.sort(next(draw))]
                start += len(source)
            yield np.concatenate(found)


def _in_turn(count: int, drawn: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Which `drawn` of `count` each epoch uses: those that have waited longest, in an order by `seed`."""
    waiting: NDArray[np.int64] = np.arange(0)
    rounds = 0
    while True:
        if len(waiting) < drawn:
            order = permutation(count, seed + rounds)
            late = np.isin(order, waiting)  # their next turn comes behind the others', so that no epoch has one twice
            waiting, rounds = np.concatenate([waiting, order[~late], order[late]]), rounds + 1
        yield waiting[:drawn]
        waiting = waiting[drawn:]


def _drawn(source: Sequence[T], weight: float) -> int:
    """Examples that an epoch uses once more."""
    return round(weight % 1 * len(source))


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """(N,) tokens of each example, without reading any that is stored."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    if isinstance(examples, Mixture):
        return np.concatenate([lengths_of(source) for source in examples.sources])
    return np.fromiter(map(len, examples), np.int32, len(examples))


def count_shared(examples: Sequence[Any], others: Sequence[Any]) -> int:
    """How many of stored `others` are, token for token, among stored `examples`, without reading any. Of preferences
    their documents count."""
    wanted = [np.unique(it.fingerprints(slice(None)), return_counts=True) for it in _stored(others)]
    found = [np.zeros(len(prints), bool) for prints, _ in wanted]
    for source in _stored(examples):
        for start in range(0, len(source), COMPARED):  # in little memory
            some = source.fingerprints(slice(start, start + COMPARED))
            for (prints, _), seen in zip(wanted, found, strict=True):
                seen |= np.isin(prints, some)
    return int(sum(counts[seen].sum() for (_, counts), seen in zip(wanted, found, strict=True)))


def content_of(examples: Sequence[Any]) -> str | None:
    """A name for what is learned from stored examples or preferences, without reading any; None of others."""
    stored = _stored(examples)
    return " ".join(it.content for it in stored) if stored else None


def checksums_of(examples: Sequence[Any]) -> NDArray[np.uint32] | None:
    """(documents,) of stored examples or preferences, whatever sources they are of, without reading any; None of
    others."""
    stored = _stored(examples)
    return np.concatenate([it.checksums for it in stored]) if stored else None


def _stored(examples: Sequence[Any]) -> list[StoredExamples]:
    """The stored examples of each source; nothing if they are not all stored."""
    sources = examples.sources if isinstance(examples, Mixture) else (examples,)
    stored = [it for source in sources if isinstance(it := getattr(source, "stored", source), StoredExamples)]
    return stored if len(stored) == len(sources) else []
