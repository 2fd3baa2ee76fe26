"""Steps of a few blocks without data, cut into the segments of which steps of any depth are put together.

For an exact weight every window that a policy has is traced (`planner.compose`); for an estimate, of blocks that need
others, one of each class. The loss is traced for two of its chunks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Literal, TypeAlias

from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.compose import Part, Pieces, Segment, Window, segment_of, segments, shorten, windows
from lowmem_ft.planner.onednn import Products
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.trace import Tier, Trace

Treatment: TypeAlias = Literal["keep", "recompute", "offload"]
# Of a block: its kind, what it does with its activations, and, where it offloads, the kind of the block that made its
# input (None: it was made before the first), because the next block gives that back
Class: TypeAlias = tuple[int, Treatment, int | None]

HEADS = ("loss", "reference")  # parts in which the output head works
LISTING = "aten.nonzero_static.default"  # makes the list of the positions that are in the loss


def classes_of(kinds: Sequence[int], keep: int, offload: int = 0) -> list[Class]:
    """The class of each block: the last `keep` keep, the first `offload` offload, and all others recompute."""
    found: list[Class] = []
    for at, kind in enumerate(kinds):
        if at < offload:
            found.append((kind, "offload", kinds[at - 1] if at else None))
        else:
            found.append((kind, "keep" if at >= len(kinds) - keep else "recompute", None))
    return found


def way_of(policy: Policy) -> Hashable:
    """What of it changes how blocks compute, beside who keeps and offloads."""
    return policy.keep_attention, *pieces_of(policy)


def pieces_of(policy: Policy) -> tuple[int, int, bool]:
    """In which MLPs and experts work, and what MLPs keep."""
    return policy.mlp_tile_tokens, policy.experts_together, policy.recompute_mlp_act


class Steps:
    """Traces of a model's steps.

    Args:
        tier: whose bytes are counted; None for both together.

    Attributes:
        update: what the optimizer does, in each of them; None before one was traced.
        products: of the first step, on a CPU; None before.
    """

    def __init__(self, stage: Stage, tier: Tier | None) -> None:
        self.stage, self._tier = stage, tier
        self.depth = len(stage.blocks)
        self.update: Segment | None = None
        self.products: Products | None = None
        self._sized: dict[Hashable, Pieces] = {}  # by tokens of the micro-batch and what `way_of` says
        # by these, the tokens of a loss chunk and whether the head comes up
        self._heads: dict[Hashable, dict[Part, Segment]] = {}
        # by kind and what `way_of` says: of a first backward's time how much a later one takes
        self._shares: dict[tuple[int, Hashable], float] = {}

    def exact(self, policy: Policy, classes: Sequence[Class], *, timed: bool) -> Pieces:
        """Pieces with every window of these blocks, see `Scales.weigh`."""
        return (self._steady if timed else self._traced)(policy, classes, self.stage.showing(classes))

    def typical(self, policy: Policy, tokens: int, chunk: int, keep: Sequence[int]) -> Pieces:
        """Pieces that know every kind of block, of a micro-batch of `tokens` and a loss chunk.

        Args:
            keep: numbers of keeping blocks that will be asked for, ascending.
        """
        sized = replace(policy, micro_batch_tokens=tokens, loss_chunk_tokens=chunk, accumulation=1)
        key, size = (tokens, chunk, self.stage.streams_head(policy)), (tokens, way_of(policy))
        pieces = self._sized.get(size)
        if pieces is None:
            pieces = self._sized[size] = Pieces()
            first, mixed, last = (keep[at] for at in (0, len(keep) // 2, -1))
            # blocks of both sorts serve for every number; of those that are traced whole a few of each sort do
            for keeping in (first, last, mixed) if self.stage.whole else (mixed, first, last):
                classes = classes_of(self.stage.kinds, keeping)
                if not pieces.know(classes):
                    # blocks that keep all keep attention, too, whichever way those that recompute go
                    other = replace(sized, keep_attention=not sized.keep_attention)
                    alike = self._sized.get((tokens, way_of(other))) if keeping == self.depth else None
                    taken = self._few_of(classes, pieces.lack(classes))
                    others = alike or self._steady(sized, classes, taken)
                    pieces.take(others, [classes[at] for at in self._few_of(classes)])
            self._heads.setdefault(key, _heads(pieces.outside.values()))
        if key not in self._heads:
            classes = classes_of(self.stage.kinds, keep[0])
            classes = classes if self.stage.whole else classes[-1:]
            trace = self._step(sized, classes, self._few_of(classes), through="loss")
            self._heads[key] = _heads(self._segments(trace, sized))
        return pieces.with_heads(self._heads[key])

    def _steady(self, policy: Policy, classes: Sequence[Class], taken: Sequence[int]) -> Pieces:
        """Segments with the sizes of a first micro-batch and the times of the later ones, of those `taken`."""
        pieces = self._traced(policy, classes, taken)
        way = way_of(policy)
        unknown = {kind for kind, treatment, _ in classes if treatment != "keep" and (kind, way) not in self._shares}
        if unknown:
            # of each kind the last block that was traced, whose backward came first
            own = [classes[at] for at in taken]
            found = [(window, one) for window, one in zip(windows(own), own, strict=True) if one[1] != "keep"]
            last = {one[0]: window for window, one in found if one[0] in unknown}
            few = taken if self.stage.whole else [taken[at] for at in shorten(own, last.values())]
            self._step(policy, classes, few, settled=True)
            later = dict(zip(windows([classes[at] for at in few]), range(len(few)), strict=True))
            for kind, window in last.items():
                segment = pieces.by_window.get(("backward", window))
                if segment is not None:
                    again = self.stage.tracer.seconds.get(("backward", later[window]), 0.0)
                    self._shares[kind, way] = again / segment.seconds if segment.seconds else 1.0
        recomputing = [it for it in classes if it[1] != "keep"]
        shares: dict[Hashable, float] = {it: self._shares.get((it[0], way), 1.0) for it in recomputing}
        return pieces.with_backward(shares)

    def _few_of(self, classes: Sequence[Class], wanted: Collection[Window] | None = None) -> list[int]:
        """Blocks that show what a step through these of them takes, only what is `wanted`; of those that need others
        one of each class, which is close."""
        if not self.stage.whole:
            return shorten(classes, wanted)
        if self.stage.few is None:
            return self.stage.showing(classes)
        return sorted({one: at for at, one in enumerate(classes)}.values())

    def _step(
        self,
        policy: Policy,
        classes: Sequence[Class],
        taken: Sequence[int],
        *,
        settled: bool = False,
        through: Literal["loss", "update"] = "update",
    ) -> Trace:
        """A step through those of the last blocks, which are of `classes`, that are `taken`."""
        first = self.depth - len(classes)
        treatments = [classes[at][1] for at in taken]
        return self.stage.step(
            policy,
            keep=treatments.count("keep"),
            offload=treatments.count("offload"),
            only=[first + at for at in taken],
            update=self.update is None,
            settled=settled,
            loss_tokens=in_loss_of(policy),
            through=through,
        )

    def _segments(self, trace: Trace, policy: Policy) -> list[Segment]:
        """Of a step that `_step` traced."""
        return [self._with_whole_loss(it, policy) for it in segments(trace, self.stage.tracer.seconds, self._tier)]

    def _traced(self, policy: Policy, classes: Sequence[Class], taken: Sequence[int]) -> Pieces:
        """The segments of such a step."""
        found = self._segments(self._step(policy, classes, taken), policy)
        if self.update is None:
            self.products = deepcopy(self.stage.products)
            self.update = next(segment for segment in found if segment.part == "update")
        pieces = Pieces()
        pieces.add(
            [classes[at] for at in taken], [*(segment for segment in found if segment.part != "update"), self.update]
        )
        return pieces

    def _with_whole_loss(self, segment: Segment, policy: Policy) -> Segment:
        """The loss of all tokens from that of fewer: the list of their positions is longer, and there are more chunks.
        Of the last one, if it is not full, the products take as long as of the others."""
        if segment.part not in HEADS:
            return segment
        tokens, in_loss, chunk = policy.micro_batch_tokens, in_loss_of(policy), policy.loss_chunk_tokens
        factor, chunks = tokens / in_loss, math.ceil(tokens / chunk) / math.ceil(in_loss / chunk)
        listed = {event.key for event, _ in segment.events if event.op == LISTING}
        steps = [
            (event._replace(nbytes=round(event.nbytes * factor)) if event.key in listed else event, birth)
            for event, birth in segment.events
        ]
        return segment_of(segment.part, None, steps, segment.seconds * chunks, self._tier)


def in_loss_of(policy: Policy) -> int:
    """Tokens of a micro-batch for which the loss is traced: all further chunks are like the second."""
    return min(policy.micro_batch_tokens, 2 * policy.loss_chunk_tokens)


def _heads(found: Iterable[Segment]) -> dict[Part, Segment]:
    """Those in which the output head works."""
    return {segment.part: segment for segment in found if segment.part in HEADS}
