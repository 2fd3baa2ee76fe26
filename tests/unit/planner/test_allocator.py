"""The caching allocator's model: each rule by hand, and the numbers of PyTorch's own tests."""

import pytest

from lowmem_ft.planner.allocator import CachingAllocator, OutOfDeviceMemory

MIB = 1 << 20
GIB = 1 << 30


def layout(allocator: CachingAllocator) -> list[list[tuple[int, bool]]]:
    """The blocks of each segment, in address order."""
    return [list(segment.blocks) for segment in allocator.segments()]


def take(allocator: CachingAllocator, *sizes: int, stream: int = 0) -> list[int]:
    return [allocator.allocate(size, stream=stream) for size in sizes]


# ---- rounding


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved", "expandable"),
    [
        # nothing is taken for nothing
        (0, 0, 0, 0),
        # small pool: multiples of 512 B from 2 MiB
        (1, 512, 2 * MIB, 2 * MIB),
        (511, 512, 2 * MIB, 2 * MIB),
        (512, 512, 2 * MIB, 2 * MIB),
        (513, 1024, 2 * MIB, 2 * MIB),
        (MIB - 1, MIB, 2 * MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB, 2 * MIB),
        # large pool under 10 MiB: from 20 MiB
        (MIB + 1, MIB + 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 513, 10 * MIB - 512, 20 * MIB, 20 * MIB),
        # rounding to 512 B comes first: this counts as 10 MiB
        (10 * MIB - 1, 10 * MIB, 10 * MIB, 20 * MIB),
        # from 10 MiB: a segment of its own, of whole 2 MiB
        (10 * MIB, 10 * MIB, 10 * MIB, 20 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB, 20 * MIB),
        # a rest of 1 MiB stays with the request (and counts as allocated), but for expandable segments
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB, 20 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB, 20 * MIB),
        (12 * MIB - 512, 12 * MIB, 12 * MIB, 20 * MIB),
        (12 * MIB, 12 * MIB, 12 * MIB, 20 * MIB),
        (20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB),
        (20 * MIB + 1, 20 * MIB + 512, 22 * MIB, 40 * MIB),
        (41 * MIB, 42 * MIB, 42 * MIB, 60 * MIB),
        (3 * GIB + 1, 3 * GIB + 512, 3 * GIB + 2 * MIB, 3080 * MIB),
    ],
)
def test_one_request(nbytes: int, allocated: int, reserved: int, expandable: int) -> None:
    native, growing = CachingAllocator(), CachingAllocator(expandable_segments=True)
    native.allocate(nbytes)
    growing.allocate(nbytes)
    assert (native.allocated, native.reserved) == (allocated, reserved)
    assert (growing.allocated, growing.reserved) == (-(-nbytes // 512) * 512, expandable)


def test_nothing_can_be_freed_any_number_of_times() -> None:
    allocator = CachingAllocator()
    handle = allocator.allocate(0)
    allocator.free(handle)
    allocator.free(handle)
    assert allocator.segments() == []


def test_what_was_freed_cannot_be_freed_again() -> None:
    allocator = CachingAllocator()
    (handle,) = take(allocator, 512)
    allocator.free(handle)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(handle)


# ---- splitting


@pytest.mark.parametrize(
    ("hole", "nbytes", "expandable", "blocks"),
    [
        # small pool: every rest is split off, the smallest is 512 B
        (2048, 1536, False, [(1536, True), (512, False)]),
        (2048, 1537, False, [(2048, True)]),
        # large pool: only a rest of more than 1 MiB
        (8 * MIB, 7 * MIB, False, [(8 * MIB, True)]),
        (8 * MIB, 7 * MIB - 512, False, [(7 * MIB - 512, True), (MIB + 512, False)]),
        # expandable segments: every rest
        (8 * MIB, 8 * MIB - 512, True, [(8 * MIB - 512, True), (512, False)]),
    ],
)
def test_splitting_a_hole(hole: int, nbytes: int, expandable: bool, blocks: list[tuple[int, bool]]) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    freed, guard = take(allocator, hole, 2 * MIB if hole > MIB else 512)
    allocator.free(freed)
    allocator.allocate(nbytes)
    (found,) = layout(allocator)
    size_of_guard = 2 * MIB if hole > MIB else 512
    assert found[: len(blocks) + 1] == [*blocks, (size_of_guard, True)]
    assert guard != freed


# ---- best fit


@pytest.mark.parametrize(
    ("nbytes", "hole"), [(3 * MIB, 1), (2 * MIB + 512, 1), (4 * MIB, 0), (3 * MIB + 512, 0), (2 * MIB, 2)]
)
@pytest.mark.parametrize("expandable", [False, True])
def test_the_smallest_hole_that_fits_is_taken(nbytes: int, hole: int, expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    # holes of 4, 3 and 2 MiB between blocks in use; the segment's end (from 15 MiB on) would fit as well
    handles = take(allocator, 4 * MIB, 2 * MIB, 3 * MIB, 2 * MIB, 2 * MIB, 2 * MIB)
    holes = handles[0::2]
    for handle in holes:
        allocator.free(handle)
    assert allocator.allocate(nbytes) == holes[hole]
    assert allocator.reserved == 20 * MIB


def test_of_equal_holes_the_first_segment_and_then_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator()
    handles = take(allocator, *[4 * MIB] * 10)  # five in each of two segments
    assert allocator.reserved == 40 * MIB
    for index in (8, 3, 6, 1):
        allocator.free(handles[index])
    assert take(allocator, *[4 * MIB] * 4) == [handles[1], handles[3], handles[6], handles[8]]


def test_of_equal_holes_torch_2_12_takes_the_block_that_was_created_first() -> None:
    allocator = CachingAllocator(oldest_block_first=True)
    handles = take(allocator, *[4 * MIB] * 5)  # the first four are split off, the fifth is what the segment began as
    for handle in (handles[4], handles[2], handles[0]):
        allocator.free(handle)
    assert take(allocator, *[4 * MIB] * 3) == [handles[4], handles[0], handles[2]]


def test_the_end_of_an_expandable_segment_is_the_last_choice() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    freed, _ = take(allocator, 8 * MIB, 10 * MIB)
    allocator.free(freed)
    # 2 MiB are left at the end, which is the tighter fit; but it counts with the unmapped rest of the segment
    assert allocator.allocate(2 * MIB) == freed
    assert layout(allocator) == [[(2 * MIB, True), (6 * MIB, False), (10 * MIB, True), (2 * MIB, False)]]


# ---- merging


@pytest.mark.parametrize(
    ("order", "blocks"),
    [
        ((1,), [(4, True), (4, False), (4, True), (4, True), (4, False)]),
        ((0, 1), [(8, False), (4, True), (4, True), (4, False)]),
        ((1, 0), [(8, False), (4, True), (4, True), (4, False)]),
        ((0, 2, 1), [(12, False), (4, True), (4, False)]),
        ((3,), [(4, True), (4, True), (4, True), (8, False)]),
        ((0, 3, 1, 2), [(20, False)]),
    ],
)
@pytest.mark.parametrize("expandable", [False, True])
def test_free_neighbours_merge(order: tuple[int, ...], blocks: list[tuple[int, bool]], expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    handles = take(allocator, *[4 * MIB] * 4)
    for index in order:
        allocator.free(handles[index])
    assert layout(allocator) == [[(mib * MIB, used) for mib, used in blocks]]


def test_segments_do_not_merge_though_their_addresses_touch() -> None:
    allocator = CachingAllocator()
    for handle in take(allocator, 20 * MIB, 20 * MIB):
        allocator.free(handle)
    first, second = allocator.segments()
    assert first.address + first.size == second.address
    allocator.allocate(40 * MIB)
    assert allocator.reserved == 80 * MIB


# ---- pools and streams


@pytest.mark.parametrize("expandable", [False, True])
def test_small_and_large_pool_do_not_share(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    small, large = take(allocator, MIB, MIB + 1)
    assert [(s.size, s.small) for s in allocator.segments()] == [(2 * MIB, True), (20 * MIB, False)]
    allocator.free(large)
    take(allocator, MIB, MIB)  # the second does not fit beside the first two: a new small segment, not the large hole
    assert allocator.reserved == 24 * MIB
    allocator.free(small)


@pytest.mark.parametrize("expandable", [False, True])
def test_streams_do_not_share(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    for handle in take(allocator, 512, 2 * MIB, 30 * MIB):
        allocator.free(handle)
    held = allocator.reserved
    take(allocator, 512, 2 * MIB, 30 * MIB, stream=7)
    assert allocator.reserved == 2 * held
    assert {segment.stream for segment in allocator.segments()} == {0, 7}
    take(allocator, 512, 2 * MIB, 30 * MIB)  # the first stream's own are still there
    assert allocator.reserved == 2 * held


# ---- fragmentation


def test_growing_requests_fragment_and_expandable_segments_do_not() -> None:
    native, growing = CachingAllocator(), CachingAllocator(expandable_segments=True)
    for allocator in (native, growing):
        for mib in (30, 40, 50, 60):  # each a little too large for what the one before left
            allocator.free(allocator.allocate(mib * MIB))
    assert native.reserved == (30 + 40 + 50 + 60) * MIB
    assert growing.reserved == 60 * MIB
    assert native.allocated_peak == growing.allocated_peak == 60 * MIB


def test_holes_that_nothing_fits_are_reserved_beyond_allocated() -> None:
    allocator = CachingAllocator()
    handles = take(allocator, *[5 * MIB] * 8)  # four per segment
    for handle in handles[0::2]:
        allocator.free(handle)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 40 * MIB)
    allocator.allocate(6 * MIB)  # 20 MiB are free, in pieces of 5
    assert (allocator.allocated, allocator.reserved) == (26 * MIB, 60 * MIB)


# ---- expandable segments


def test_an_expandable_segment_maps_only_what_is_missing() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first, second = take(allocator, 30 * MIB, 25 * MIB)  # 55 of 60 MiB
    assert allocator.reserved == 60 * MIB
    allocator.allocate(25 * MIB)  # 5 are there, one page is added
    assert (allocator.reserved, len(allocator.segments())) == (80 * MIB, 1)
    allocator.free(second)
    allocator.free(first)
    assert layout(allocator) == [[(55 * MIB, False), (25 * MIB, True)]]


def test_only_whole_pages_inside_a_free_block_are_unmapped() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    handles = take(allocator, 15 * MIB, 50 * MIB, 15 * MIB)
    allocator.free(handles[1])
    allocator.empty_cache()  # free from 15 to 65 MiB: the pages from 20 to 60 go
    assert allocator.reserved == 40 * MIB
    start = allocator.segments()[0].address
    assert [(s.address - start, s.blocks) for s in allocator.segments()] == [
        (0, ((15 * MIB, True), (5 * MIB, False))),
        (60 * MIB, ((5 * MIB, False), (15 * MIB, True))),
    ]
    # fits in front of, in and behind the hole: at the lowest address, and 20 of the 40 MiB are mapped again
    assert allocator.allocate(20 * MIB) == handles[1]
    assert allocator.reserved == 60 * MIB
    assert layout(allocator) == [
        [(15 * MIB, True), (20 * MIB, True), (5 * MIB, False)],
        [(5 * MIB, False), (15 * MIB, True)],
    ]


def test_a_hole_is_mapped_together_with_what_is_free_behind_it() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    handles = take(allocator, 20 * MIB, 40 * MIB, 20 * MIB)
    allocator.free(handles[0])
    allocator.empty_cache()  # the first page is a hole
    allocator.free(handles[1])
    assert allocator.reserved == 60 * MIB
    assert allocator.allocate(55 * MIB) == handles[0]  # the hole and 35 MiB behind it
    assert (allocator.reserved, len(allocator.segments())) == (80 * MIB, 1)


def test_a_hole_that_is_too_small_is_passed_over() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    handles = take(allocator, 20 * MIB, 20 * MIB, 20 * MIB)
    allocator.free(handles[1])
    allocator.empty_cache()
    assert allocator.allocate(30 * MIB) > handles[2]
    assert allocator.reserved == 80 * MIB


def test_an_empty_expandable_segment_goes_back_with_its_addresses() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    for handle in take(allocator, 100 * MIB, 512):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments()) == (0, [])
    allocator.allocate(512)
    assert allocator.reserved == 2 * MIB


def test_a_second_expandable_segment_where_addresses_run_out() -> None:
    allocator = CachingAllocator(expandable_segments=True, address_space=60 * MIB)
    handles = take(allocator, *[20 * MIB] * 3)
    allocator.free(handles[1])
    allocator.empty_cache()
    allocator.allocate(40 * MIB)
    assert [segment.size for segment in allocator.segments()] == [20 * MIB, 20 * MIB, 40 * MIB]


def test_a_piece_larger_than_the_card_is_counted_as_any_other() -> None:
    """Or a plan for long sequences on a small card would end in a traceback, and not say what is too large."""
    allocator = CachingAllocator(expandable_segments=True, address_space=60 * MIB)
    allocator.allocate(100 * MIB)
    assert allocator.reserved == 100 * MIB


# ---- what leaves a pool as it was


@pytest.mark.parametrize("expandable", [False, True])
def test_a_pool_stays_as_it_was_if_one_free_block_holds_all(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    handles = take(allocator, 8 * MIB, 2 * MIB, 6 * MIB, 4 * MIB, 512)
    assert not allocator.stays(6 * MIB, small=False)
    for handle in (handles[0], handles[2]):
        allocator.free(handle)
    before = layout(allocator)
    assert [allocator.stays(size, small=False) for size in (8 * MIB, 8 * MIB + 512)] == [True, False]
    first, second = take(allocator, 5 * MIB, 3 * MIB)
    allocator.free(first)
    allocator.free(second)
    assert layout(allocator) == before
    assert allocator.stays(512, small=True)
    assert not allocator.stays(512, small=True, stream=1), "its pool is another one"


def test_in_torch_2_12_blocks_are_younger_afterwards() -> None:
    taken = []
    for between in ((), (4 * MIB,)):
        allocator = CachingAllocator(oldest_block_first=True)
        holes = take(allocator, 8 * MIB, 2 * MIB, 8 * MIB, 2 * MIB)
        allocator.free(holes[0])
        allocator.free(holes[2])
        assert not allocator.stays(4 * MIB, small=False)
        for handle in take(allocator, *between):
            allocator.free(handle)
        taken.append(holes.index(allocator.allocate(8 * MIB)))
    assert taken == [0, 2]


# ---- the limit


@pytest.mark.parametrize("expandable", [False, True])
def test_cached_segments_of_all_pools_and_streams_are_released_before_failing(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable, capacity=100 * MIB)
    cached = [*take(allocator, 40 * MIB, 512), *take(allocator, 20 * MIB, stream=1)]
    (kept,) = take(allocator, 20 * MIB, stream=2)
    for handle in cached:
        allocator.free(handle)
    assert allocator.reserved == 82 * MIB
    allocator.allocate(80 * MIB)
    assert (allocator.allocated, allocator.reserved) == (100 * MIB, 100 * MIB)
    allocator.free(kept)


def test_failing_says_what_was_asked_and_what_is_there() -> None:
    allocator = CachingAllocator(capacity=100 * MIB)
    first, second, third = take(allocator, 40 * MIB, 5 * MIB, 20 * MIB)
    allocator.free(second)
    allocator.free(third)
    allocator.free(first)
    used = allocator.allocate(5 * MIB)
    with pytest.raises(OutOfDeviceMemory) as caught:
        allocator.allocate(81 * MIB + 1)
    # the cache went back before: what is left is the segment that is partly in use
    assert allocator.reserved == 20 * MIB
    error = caught.value
    assert (error.requested, error.needed) == (81 * MIB + 1, 82 * MIB)
    assert (error.allocated, error.reserved, error.capacity) == (5 * MIB, 20 * MIB, 100 * MIB)
    for number in ("84934657", "85983232", "20971520", "104857600", "5242880"):
        assert number in str(error)
    allocator.free(used)
    allocator.allocate(80 * MIB)  # a failure leaves all in order


def test_the_limit_counts_a_request_with_the_size_of_a_native_segment() -> None:
    growing = CachingAllocator(expandable_segments=True, capacity=22 * MIB)
    growing.allocate(22 * MIB)  # 22 MiB are allowed, two pages of 20 are mapped
    assert growing.reserved == 40 * MIB
    full = CachingAllocator(expandable_segments=True, capacity=40 * MIB)
    full.allocate(21 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        full.allocate(20 * MIB)  # 19 are there and nothing more may be mapped


@pytest.mark.parametrize("expandable", [False, True])
def test_empty_cache_keeps_what_is_in_use(expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    handles = take(allocator, 512, 512, 3 * MIB, 3 * MIB, 50 * MIB)
    for handle in handles[1::2]:
        allocator.free(handle)
    before = layout(allocator)
    allocator.empty_cache()
    assert layout(allocator) == before if not expandable else allocator.reserved == 62 * MIB
    allocator.free(handles[4])
    allocator.empty_cache()
    assert allocator.reserved == 22 * MIB
    allocator.free(handles[0])
    allocator.free(handles[2])
    assert (allocator.allocated, allocator.reserved) == (0, 22 * MIB)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_peaks_stay() -> None:
    allocator = CachingAllocator()
    (handle,) = take(allocator, 50 * MIB)
    allocator.free(handle)
    allocator.empty_cache()
    allocator.allocate(30 * MIB)
    assert (allocator.allocated, allocator.reserved) == (30 * MIB, 30 * MIB)
    assert (allocator.allocated_peak, allocator.reserved_peak) == (50 * MIB, 50 * MIB)


# ---- outside references


@pytest.mark.parametrize(
    ("nbytes", "segments", "reserved", "kept"),
    [
        (512, 1, 2 * MIB, 2 * MIB),
        (MIB, 2, 4 * MIB, 2 * MIB),
        (MIB + 512, 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 2, 40 * MIB, 20 * MIB),
        (10 * MIB + 512, 3, 36 * MIB, 12 * MIB),
    ],
)
def test_numbers_of_pytorchs_own_test(nbytes: int, segments: int, reserved: int, kept: int) -> None:
    """What PyTorch expects in test/test_cuda.py, test_graph_memory_stats_and_use_result_after_destroy_graph.

    There `b = a.clone()` and then five times `b = b.clone() + 1` run in a pool of their own; then all but b goes.
    """
    allocator = CachingAllocator()
    b = allocator.allocate(nbytes)
    for _ in range(5):
        clone, result = take(allocator, nbytes, nbytes)
        allocator.free(clone)
        allocator.free(b)
        b = result
    assert (len(allocator.segments()), allocator.reserved) == (segments, reserved)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (nbytes, kept)
