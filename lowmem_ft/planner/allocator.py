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
from operator import itemgetter
from typing import Literal, TypeAlias

_MIB = 1 << 20
_UNIT = 512  # all block sizes are multiples
SMALL_MAX = _MIB  # the largest request of the small pool
SLACK = _MIB  # in the large pool a rest of at most so much stays with its request
_OWN_SEGMENT_MIN = 10 * _MIB  # from here on a request gets a segment of its own size
_SEGMENT_UNIT = 2 * _MIB
SMALL_PAGE = 2 * _MIB  # a segment of the small pool, or a page of its expandable segment
_LARGE_PAGE = 20 * _MIB
_ENDLESS = 1 << 60
# What a block is; unmapped: addresses of an expandable segment that no memory lies behind
_USED, _FREE, _UNMAPPED = 1, 2, 3
_Entry: TypeAlias = "tuple[int, int, _Block]"  # birth and address, of which no two are the same


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
    page: int  # bytes that an expandable segment grows by
    slack: int  # a rest of at most so much stays with its request
    # Mapped free blocks by size, and in order of it; some sizes may have none left. So most requests, for sizes that
    # were there before, find theirs without a search
    free: dict[int, list[_Entry]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    unmapped: list[_Entry] = field(default_factory=list)

    def first(self, size: int) -> list[_Entry] | None:
        """Of the smallest size that fits the free blocks in order, at least one."""
        found = self.free.get(size)
        if found:
            return found
        at = bisect_left(self.sizes, size)
        while at < len(self.sizes):
            found = self.free[self.sizes[at]]
            if found:
                return found
            del self.free[self.sizes[at]], self.sizes[at]
        return None

    def ordered(self) -> list[_Block]:
        """All free blocks, by size."""
        return [block for size in self.sizes for _, _, block in self.free[size]]

    def add(self, block: _Block) -> None:
        """Put a block that is not in use on its list."""
        if block.state == _UNMAPPED:
            insort(self.unmapped, (0, block.address, block))
            return
        entry = block.birth, block.address, block
        same = self.free.get(block.size)
        if same:
            insort(same, entry)
        elif same is not None:
            same.append(entry)
        else:
            self.free[block.size] = [entry]
            insort(self.sizes, block.size)

    def remove(self, block: _Block) -> None:
        """Take it off."""
        if block.state == _UNMAPPED:
            del self.unmapped[bisect_left(self.unmapped, (0, block.address))]
            return
        same = self.free[block.size]
        del same[bisect_left(same, (block.birth, block.address)) if len(same) > 1 else 0]


@dataclass(slots=True, eq=False)
class _Block:
    address: int
    size: int
    pool: _Pool
    state: int
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
        expandable_segments, oldest_block_first: as given.
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
        self.expandable_segments, self._capacity = expandable_segments, capacity
        self._address_space = _ENDLESS if address_space is None else address_space
        self.oldest_block_first, self._births = oldest_block_first, 0
        self._pools: tuple[dict[int, _Pool], dict[int, _Pool]] = {}, {}  # large and small ones by stream
        self._used: dict[int, _Block] = {}  # by address
        self._segments: dict[int, _Block] = {}  # by address the first block of each
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
        size = rounded(nbytes)
        pool = self._pools[size <= SMALL_MAX].get(stream) or self._new_pool(stream, size <= SMALL_MAX)
        fitting = pool.first(size)
        block: _Block | None
        if fitting is None:
            block = self._grow(pool, size)
        elif self.expandable_segments:
            block = self._nearest(pool, fitting)
        else:
            block = fitting.pop(0)[2]
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
        if block.size - size > pool.slack:
            pool.add(self._split(block, size, newer="first"))
        block.state = _USED
        self._used[block.address] = block
        self.allocated += block.size
        if self.allocated > self.allocated_peak:
            self.allocated_peak = self.allocated
        return block.address

    def free(self, handle: int) -> None:
        """Give back what `allocate` returned."""
        if handle == 0:
            return
        block = self._used.pop(handle, None)
        assert block is not None, f"freed twice: {handle}"
        block.state = _FREE
        self.allocated -= block.size
        block.pool.add(self._join(block))

    def stays(self, nbytes: int, *, small: bool, stream: int = 0) -> bool:
        """Whether a pool is surely as it was after requests for `nbytes` together, all given back.

        Else it may have grown. With `oldest_block_first` its blocks would be younger.
        """
        pool = self._pools[small].get(stream)
        return pool is not None and not self.oldest_block_first and pool.first(nbytes) is not None

    def empty_cache(self) -> None:
        """Return to the driver whole free segments, or with expandable segments whole free pages."""
        for pool in [pool for pools in self._pools for pool in pools.values()]:
            for block in pool.ordered():
                if self.expandable_segments:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    del self._segments[block.address]
                    self.reserved -= block.size

    def segments(self) -> list[Segment]:
        """What is reserved, in address order."""
        runs: list[list[_Block]] = []
        for _, first in sorted(self._segments.items(), key=itemgetter(0)):
            runs.append([])
            block: _Block | None = first
            while block is not None:
                if block.state != _UNMAPPED:
                    runs[-1].append(block)
                elif runs[-1]:
                    runs.append([])
                block = block.next
        return [
            Segment(
                run[0].address, run[0].pool.stream, run[0].pool.small, tuple((b.size, b.state == _USED) for b in run)
            )
            for run in runs
            if run
        ]

    def _new_pool(self, stream: int, small: bool) -> _Pool:
        slack = 0 if small or self.expandable_segments else SLACK
        pool = self._pools[small][stream] = _Pool(stream, small, SMALL_PAGE if small else _LARGE_PAGE, slack)
        return pool

    def _nearest(self, pool: _Pool, fitting: list[_Entry]) -> _Block:
        """The free block to use in expandable segments, taken off its list. It counts with the unmapped addresses that
        follow it, so that the end of a segment is the last choice."""
        best = fitting[0][2]
        while _reach(best) > best.size:
            fitting = fitting[1:] or pool.first(best.size + 1) or []
            if not fitting or _reach(fitting[0][2]) >= _reach(best):
                break
            best = fitting[0][2]
        pool.remove(best)
        return best

    def _grow(self, pool: _Pool, size: int) -> _Block | None:
        """A block of new memory, on no list; None where the limit forbids it."""
        needed = _segment_size(size)
        if self._capacity is not None and self.reserved + needed > self._capacity:
            return None
        if self.expandable_segments:
            return self._expand(pool, size)
        self._reserve(needed)
        return self._new_segment(pool, needed)

    def _expand(self, pool: _Pool, size: int) -> _Block:
        block = self._room(pool, size)
        if block.state == _UNMAPPED:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            after = block.next
            assert after is not None
            block = self._map(after, min(after.size, size - block.size))
        pool.remove(block)
        return block

    def _room(self, pool: _Pool, size: int) -> _Block:
        """The first of neighbouring free and unmapped blocks that hold `size` together, at the lowest address."""
        for _, _, first in pool.unmapped:
            if first.prev is not None and first.prev.state != _USED:
                first = first.prev
            found, block = 0, first
            while True:
                found += block.size
                if found >= size:
                    return first
                if block.next is None or block.next.state == _USED:
                    break
                block = block.next
        # a piece that no card has room for is told of as any other that does not fit
        block = self._new_segment(pool, _round_up(max(self._address_space, size), pool.page), _UNMAPPED)
        pool.add(block)
        return block

    def _map(self, block: _Block, nbytes: int) -> _Block:
        """Put memory behind the first pages of an unmapped block; returns the free block that they belong to then."""
        pool = block.pool
        nbytes = _round_up(nbytes, pool.page)
        pool.remove(block)
        if nbytes < block.size:
            pool.add(self._split(block, nbytes, newer="rest"))
        block.state = _FREE
        self._reserve(nbytes)
        block = self._join(block)
        pool.add(block)
        return block

    def _unmap(self, block: _Block) -> None:
        """Return the pages that lie whole inside a free block."""
        pool, end = block.pool, block.address + block.size
        first, last = _round_up(block.address, pool.page), end // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        if first > block.address:
            middle = self._split(block, first - block.address, newer="first")
            pool.add(block)
            block = middle
        if last < end:
            pool.add(self._split(block, last - block.address, newer="rest"))
        block.state = _UNMAPPED
        self.reserved -= block.size
        block = self._join(block)
        if block.prev is None and block.next is None:
            del self._segments[block.address]  # nothing is left of it: its addresses go back too
        else:
            pool.add(block)

    def _new_segment(self, pool: _Pool, size: int, state: int = _FREE) -> _Block:
        block = self._segments[self._top] = _Block(self._top, size, pool, state, birth=self._birth())
        self._top += _round_up(size, _LARGE_PAGE)  # pages of both sizes start at multiples of theirs
        return block

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def _birth(self) -> int:
        self._births += self.oldest_block_first
        return self._births

    def _split(self, block: _Block, size: int, *, newer: Literal["first", "rest"]) -> _Block:
        """Shorten `block`, on no list, to `size` and return the rest, on none either. One of the two counts as new."""
        after = block.next
        rest = _Block(block.address + size, block.size - size, block.pool, block.state, block, after, block.birth)
        if after is not None:
            after.prev = rest
        block.size, block.next = size, rest
        if self.oldest_block_first:
            (block if newer == "first" else rest).birth = self._birth()
        return rest

    def _join(self, block: _Block) -> _Block:
        """`block`, on no list, together with its neighbours in the same state, which are taken off theirs.

        The whole is as old as `block`.
        """
        before, after = block.prev, block.next
        if after is not None and after.state == block.state:
            block.pool.remove(after)
            _absorb_next(block, after)
        if before is not None and before.state == block.state:
            block.pool.remove(before)
            before.birth = block.birth
            _absorb_next(before, block)
            return before
        return block


def _absorb_next(block: _Block, after: _Block) -> None:
    block.size += after.size
    block.next = after.next
    if after.next is not None:
        after.next.prev = block


def _reach(block: _Block) -> int:
    after = block.next
    return block.size + after.size if after is not None and after.state == _UNMAPPED else block.size


def rounded(nbytes: int) -> int:
    """The bytes that a request takes."""
    return (nbytes + _UNIT - 1) // _UNIT * _UNIT


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _segment_size(size: int) -> int:
    """Bytes that the driver is asked for, for a block of `size` bytes."""
    if size <= SMALL_MAX:
        return SMALL_PAGE
    return _LARGE_PAGE if size < _OWN_SEGMENT_MIN else _round_up(size, _SEGMENT_UNIT)
