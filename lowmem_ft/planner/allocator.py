"""PyTorch's CUDA caching allocator as a model: a stream of allocations and frees -> bytes *reserved* on the device.

Reserved is what the process holds and what `set_per_process_memory_fraction` limits; it exceeds the bytes in live
tensors by rounding and by holes that no request fits into. The rules are those of c10/cuda/CUDACachingAllocator.cpp in
torch 2.11 to 2.13 with default settings:

- A request is rounded up to 512 bytes. Up to 1 MiB it is served by the small pool, else by the large one; each stream
  has its own two pools.
- The pool's smallest free block that fits is taken. What is left of it becomes a free block of its own, but for a rest
  of 1 MiB and less in the large pool: it stays with its request, and `memory_allocated` counts it.
- If none fits, the driver is asked for a segment: 2 MiB in the small pool; in the large one 20 MiB for requests under
  10 MiB, else the request rounded up to 2 MiB.
- A freed block merges with free neighbours. Segments are kept, until the limit refuses a new one: then all segments
  that are entirely free go back, of every pool and stream, and the driver is asked once more.
- With expandable segments a pool grows one long range of addresses instead, by pages of 2 MiB (small) or 20 MiB
  (large), at the lowest address where free and unmapped pages together fit the request, and only the missing pages are
  mapped. A rest is always split off. What goes back are the pages that lie whole inside a free block.

Between free blocks of one size the order decides, and it depends on the version: torch 2.13 takes the oldest segment's
lowest address, 2.12 the block that was created first (`oldest_block_first`), 2.11 the lowest address. The model hands
out ascending addresses, each once, so that 2.11 is modelled as 2.13. On a driver with another order the model's peak
under 2.11 was 1.0% below to 2.5% above the allocator's on random traces; nothing else depends on addresses.

Held against the allocator itself (libc10_cuda.so of the wheels 2.11.0, 2.12.0, 2.12.1 and 2.13.0 on a stand-in for the
CUDA driver, 2026-11-24; 2.13.0 also with descending and random addresses): allocated, reserved and refusals are equal
after every event of several hundred random traces.

Not modelled: settings other than these (max_split_size, garbage collection, rounding to fractions of powers of two),
blocks in use on a second stream (`record_stream`), memory pools and CUDA graphs, and a driver that runs out of memory
below `capacity`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Literal

_MIB = 1 << 20
_UNIT = 512  # all block sizes are multiples
_SMALL_MAX = _MIB  # the largest request of the small pool
_OWN_SEGMENT_MIN = 10 * _MIB  # from here on a request gets a segment of its own size
_SEGMENT_UNIT = 2 * _MIB
_SMALL_PAGE = 2 * _MIB  # a segment of the small pool, or a page of its expandable segment
_LARGE_PAGE = 20 * _MIB
_ENDLESS = 1 << 60


class OutOfDeviceMemory(Exception):  # noqa: N818 - an outcome of planning, which no user sees
    """The limit is reached, also with everything released that can be.

    Attributes:
        requested: bytes of the allocation.
        needed: bytes that the driver would have been asked for.
        allocated, reserved: bytes in live blocks and held in all, after the release.
        capacity: the limit in bytes.
    """

    def __init__(self, *, requested: int, needed: int, allocated: int, reserved: int, capacity: int) -> None:
        super().__init__(
            f"{requested} bytes asked for, which takes {needed} more from the device: {reserved} of {capacity} are "
            f"reserved, {allocated} of them in use"
        )
        self.requested, self.needed = requested, needed
        self.allocated, self.reserved, self.capacity = allocated, reserved, capacity


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous piece of device memory, as in `torch.cuda.memory._snapshot()`.

    Attributes:
        small: whether it belongs to the small pool.
        blocks: (bytes, in use) of each block, in address order.
    """

    address: int
    stream: int
    small: bool
    blocks: tuple[tuple[int, bool], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self.blocks)


@dataclass(slots=True, eq=False)
class _Pool:
    stream: int
    small: bool
    free: list[tuple[int, int, int]] = field(default_factory=list)  # (size, birth, address) of mapped blocks, sorted
    unmapped: list[int] = field(default_factory=list)  # addresses, sorted

    @property
    def page(self) -> int:
        return _SMALL_PAGE if self.small else _LARGE_PAGE


@dataclass(slots=True, eq=False)
class _Block:
    address: int
    size: int
    pool: _Pool
    mapped: bool = True  # False: addresses of an expandable segment that no memory lies behind
    used: bool = False
    prev: _Block | None = None  # neighbours in the segment
    next: _Block | None = None
    birth: int = 0  # orders free blocks of one size; 0 where the address alone does


class CachingAllocator:
    """One device's allocator.

    Args:
        expandable_segments: as in PYTORCH_ALLOC_CONF.
        capacity: bytes that may be reserved, as by `set_per_process_memory_fraction`; None: no limit. As there, a
            request counts with its segment's size, also where expandable segments map another size: up to 18 MiB more.
        address_space: bytes of addresses in an expandable segment, 9/8 of the card's memory in PyTorch. They matter
            only where unmapping has left holes in one that is nearly used up; None: endless.

        oldest_block_first: between free blocks of one size, the order of torch 2.12 instead of that of 2.11 and 2.13.

    Attributes:
        allocated, reserved: bytes in live blocks and held in all: `torch.cuda.memory_allocated` and `memory_reserved`.
        allocated_peak, reserved_peak: the most that they have been.
    """

    def __init__(
        self,
        *,
        expandable_segments: bool = False,
        capacity: int | None = None,
        address_space: int | None = None,
        oldest_block_first: bool = False,
    ) -> None:
        self.allocated = self.reserved = self.allocated_peak = self.reserved_peak = 0
        self._expandable, self._capacity = expandable_segments, capacity
        self._address_space = _ENDLESS if address_space is None else address_space
        self._oldest_block_first, self._births = oldest_block_first, 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._blocks: dict[int, _Block] = {}  # by address; of every kind
        self._top = _LARGE_PAGE  # the next segment's address; 0 is no block's

    def allocate(self, nbytes: int, *, stream: int = 0) -> int:
        """Take `nbytes` and return the handle that `free` wants; 0 bytes take nothing.

        Raises:
            OutOfDeviceMemory: the limit does not allow it. What is cached has been released then.
        """
        assert nbytes >= 0, nbytes
        if nbytes == 0:
            return 0
        # this and `free` run some 100,000 times for a step of a large model, so calls are spared where that is easy
        size = -(-nbytes // _UNIT) * _UNIT
        pool = self._pools.get((stream, size <= _SMALL_MAX)) or self._new_pool(stream, size <= _SMALL_MAX)
        block = self._best_fit(pool, size) or self._grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self._grow(pool, size)
        if block is None:
            assert self._capacity is not None
            raise OutOfDeviceMemory(
                requested=nbytes,
                needed=_segment_size(size),
                allocated=self.allocated,
                reserved=self.reserved,
                capacity=self._capacity,
            )
        if block.size - size > (0 if pool.small or self._expandable else _SMALL_MAX):
            self._list(self._split(block, size, newer="first"))
        block.used = True
        self.allocated += block.size
        if self.allocated > self.allocated_peak:
            self.allocated_peak = self.allocated
        return block.address

    def free(self, handle: int) -> None:
        """Give back what `allocate` returned."""
        if handle == 0:
            return
        block = self._blocks[handle]
        assert block.used, f"freed twice: {handle}"
        block.used = False
        self.allocated -= block.size
        self._list(self._join(block))

    def empty_cache(self) -> None:
        """Return to the driver whole free segments, or with expandable segments whole free pages."""
        for pool in self._pools.values():
            for _, _, address in list(pool.free):
                block = self._blocks[address]
                if self._expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    self._unlist(block)
                    del self._blocks[address]
                    self.reserved -= block.size

    def segments(self) -> list[Segment]:
        """What is reserved, in address order."""
        runs: list[list[_Block]] = []
        for _, block in sorted(self._blocks.items()):
            if not block.mapped:
                continue
            if block.prev is None or not block.prev.mapped:
                runs.append([])
            runs[-1].append(block)
        return [
            Segment(run[0].address, run[0].pool.stream, run[0].pool.small, tuple((b.size, b.used) for b in run))
            for run in runs
        ]

    def _new_pool(self, stream: int, small: bool) -> _Pool:
        pool = self._pools[stream, small] = _Pool(stream, small)
        return pool

    def _best_fit(self, pool: _Pool, size: int) -> _Block | None:
        """The free block to use, taken off its list; in an expandable segment a block counts with the unmapped
        addresses that follow it, so that the end of the segment is the last choice."""
        free = pool.free
        at = bisect_left(free, (size, 0, 0))
        if at == len(free):
            return None
        if self._expandable:
            while at + 1 < len(free) and self._reach(free[at + 1]) < self._reach(free[at]):
                at += 1
        return self._blocks[free.pop(at)[2]]

    def _reach(self, entry: tuple[int, int, int]) -> int:
        size, _, address = entry
        after = self._blocks[address].next
        return size if after is None or after.mapped else size + after.size

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A block of new memory, on no list; None where the limit forbids it."""
        needed = _segment_size(size)
        if self._capacity is not None and self.reserved + needed > self._capacity:
            return None
        if self._expandable:
            return self._expand(pool, size)
        self._reserve(needed)
        return self._new_segment(pool, needed)

    def _expand(self, pool: _Pool, size: int) -> _Block:
        block = self._room(pool, size)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            after = block.next
            assert after is not None
            block = self._map(after, min(after.size, size - block.size))
        self._unlist(block)
        return block

    def _room(self, pool: _Pool, size: int) -> _Block:
        """The first of neighbouring free and unmapped blocks that hold `size` together, at the lowest address."""
        for address in pool.unmapped:
            first = self._blocks[address]
            if first.prev is not None and not first.prev.used:
                first = first.prev
            found, block = 0, first
            while True:
                found += block.size
                if found >= size:
                    return first
                if block.next is None or block.next.used:
                    break
                block = block.next
        block = self._new_segment(pool, _round_up(self._address_space, pool.page))
        block.mapped = False
        self._list(block)
        return block

    def _map(self, block: _Block, nbytes: int) -> _Block:
        """Put memory behind the first pages of an unmapped block; returns the free block that they belong to then."""
        nbytes = _round_up(nbytes, block.pool.page)
        self._unlist(block)
        if nbytes < block.size:
            self._list(self._split(block, nbytes, newer="rest"))
        block.mapped = True
        self._reserve(nbytes)
        block = self._join(block)
        self._list(block)
        return block

    def _unmap(self, block: _Block) -> None:
        """Return the pages that lie whole inside a free block."""
        page, end = block.pool.page, block.address + block.size
        first, last = _round_up(block.address, page), end // page * page
        if first >= last:
            return
        self._unlist(block)
        if first > block.address:
            middle = self._split(block, first - block.address, newer="first")
            self._list(block)
            block = middle
        if last < end:
            self._list(self._split(block, last - block.address, newer="rest"))
        block.mapped = False
        self.reserved -= block.size
        block = self._join(block)
        if block.prev is None and block.next is None:
            del self._blocks[block.address]  # nothing is left of the segment: its addresses go back too
        else:
            self._list(block)

    def _new_segment(self, pool: _Pool, size: int) -> _Block:
        block = self._blocks[self._top] = _Block(self._top, size, pool, birth=self._birth())
        self._top += _round_up(size, _LARGE_PAGE)  # pages of both sizes start at multiples of theirs
        return block

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def _birth(self) -> int:
        self._births += self._oldest_block_first
        return self._births

    def _split(self, block: _Block, size: int, *, newer: Literal["first", "rest"]) -> _Block:
        """Shorten `block` to `size` and return the rest, on no list. One of the two counts as new."""
        rest = _Block(block.address + size, block.size - size, block.pool, block.mapped, prev=block, next=block.next)
        if rest.next is not None:
            rest.next.prev = rest
        block.size, block.next = size, rest
        if newer == "first":
            block.birth, rest.birth = self._birth(), block.birth
        else:
            rest.birth = self._birth()
        self._blocks[rest.address] = rest
        return rest

    def _join(self, block: _Block) -> _Block:
        """`block`, on no list, together with its neighbours in the same state, which are taken off theirs.

        The whole is as old as `block`.
        """
        before = block.prev
        if before is not None and not before.used and before.mapped == block.mapped:
            self._unlist(before)
            self._absorb_next(before)
            before.birth = block.birth
            block = before
        after = block.next
        if after is not None and not after.used and after.mapped == block.mapped:
            self._unlist(after)
            self._absorb_next(block)
        return block

    def _absorb_next(self, block: _Block) -> None:
        after = block.next
        assert after is not None
        del self._blocks[after.address]
        block.size, block.next = block.size + after.size, after.next
        if after.next is not None:
            after.next.prev = block

    def _list(self, block: _Block) -> None:
        if block.mapped:
            insort(block.pool.free, (block.size, block.birth, block.address))
        else:
            insort(block.pool.unmapped, block.address)

    def _unlist(self, block: _Block) -> None:
        if block.mapped:
            del block.pool.free[bisect_left(block.pool.free, (block.size, block.birth, block.address))]
        else:
            del block.pool.unmapped[bisect_left(block.pool.unmapped, block.address)]


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _segment_size(size: int) -> int:
    """Bytes that the driver is asked for, for a block of `size` bytes."""
    if size <= _SMALL_MAX:
        return _SMALL_PAGE
    return _LARGE_PAGE if size < _OWN_SEGMENT_MIN else _round_up(size, _SEGMENT_UNIT)
