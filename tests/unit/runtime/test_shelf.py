"""Inputs on their way down and up: in which order, and after passes that were aborted."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from lowmem_ft.runtime import shelf as module
from lowmem_ft.runtime.shelf import Shelf

COUNT, SHAPE = 4, (3, 1000)


class Recorded:
    """A tier that copies only when it is waited for, and says what it was asked."""

    def __init__(self, sizes: list[int]) -> None:
        self.blocks = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self.said: list[str] = []

    def write(self, block: int, offset: int, tensor: Tensor) -> None:
        raise AssertionError("nothing is loaded to a shelf")

    def store(self, block: int, tensor: Tensor) -> tuple[str, Tensor, Tensor]:
        self.said.append(f"down {block}")
        data = tensor.view(-1).view(torch.uint8)
        return f"is down {block}", data, self.blocks[block][: data.numel()]

    def start(self, block: int, slot: Tensor) -> tuple[str, Tensor, Tensor]:
        self.said.append(f"up {block}")
        return f"is up {block}", self.blocks[block], slot

    def wait(self, copy: tuple[str, Tensor, Tensor]) -> None:
        text, source, target = copy
        self.said.append(text)
        target.copy_(source)


def shelf_and_tiers(count: int = COUNT) -> tuple[Shelf, list[Recorded]]:
    tiers: list[Recorded] = []

    def open_tier(sizes: list[int]) -> Recorded:
        tiers.append(Recorded(sizes))
        return tiers[-1]

    return Shelf(count, open_tier), tiers


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(COUNT)]


def take(shelf: Shelf, place: int) -> Tensor:
    return shelf.take(place, torch.Size(SHAPE), torch.float32, torch.device("cpu"))


def test_they_go_down_one_by_one_and_come_up_one_ahead() -> None:
    shelf, tiers = shelf_and_tiers()
    given = inputs(0)
    for place, tensor in enumerate(given):
        shelf.put(place, tensor)
    found = [take(shelf, place) for place in reversed(range(COUNT))]
    assert found[0].data_ptr() == given[-1].data_ptr(), "the last one stays"
    assert all(torch.equal(a, b) for a, b in zip(reversed(found), given, strict=True))
    (tier,) = tiers
    assert len(tier.blocks) == COUNT - 1
    assert tier.said == [
        *("down 0", "is down 0", "down 1", "is down 1", "down 2", "is down 2"),
        *("up 2", "up 1", "is up 2", "up 0", "is up 1", "is up 0"),
    ]


def test_inputs_that_are_larger_than_those_before_them() -> None:
    """In the first pass, and in a later one with longer rows: the places become larger while some are full."""
    opened: list[weakref.ref[Recorded]] = []

    def open_tier(sizes: list[int]) -> Recorded:
        assert all(tier() is None for tier in opened), "both at once would take more than was planned"
        tier = Recorded(sizes)
        opened.append(weakref.ref(tier))
        return tier

    shelf = Shelf(COUNT, open_tier)
    for times in (1, 2):
        given: list[Tensor] = [torch.randn(3, 1000 * times).bfloat16(), *(torch.randn(3, 1000 * times) for _ in "123")]
        for place, tensor in enumerate(given):
            shelf.put(place, tensor)
        for place in reversed(range(COUNT)):
            like = given[place]
            assert torch.equal(shelf.take(place, like.shape, like.dtype, like.device), like), place
    assert len(opened) == 3


def test_after_an_aborted_pass() -> None:
    """What was on its way is waited for first, forward or backward: its memory may go to somebody else then."""
    shelf, tiers = shelf_and_tiers()
    for place, tensor in enumerate(inputs(1)[:2]):
        shelf.put(place, tensor)
    for place, tensor in enumerate(inputs(2)):
        shelf.put(place, tensor)
    assert tiers[0].said[2:5] == ["down 1", "is down 1", "down 0"]
    take(shelf, COUNT - 1)
    assert tiers[0].said[-1] == "up 2"
    given = inputs(3)
    for place, tensor in enumerate(given):
        shelf.put(place, tensor)
    assert tiers[0].said.count("is up 2") == 1
    for place in reversed(range(COUNT)):
        assert torch.equal(take(shelf, place), given[place])


def test_nothing_is_left_of_an_aborted_pass() -> None:
    shelf, tiers = shelf_and_tiers()
    for place, tensor in enumerate(inputs(1)):
        shelf.put(place, tensor)
    last = inputs(2)[-1]
    held = weakref.ref(last)
    shelf.put(COUNT - 1, last)
    take(shelf, COUNT - 1)
    del last
    shelf.clear()
    assert held() is None
    assert tiers[0].said[-2:] == ["up 2", "is up 2"], "its memory may go to somebody else now"
    given = inputs(3)
    for place, tensor in enumerate(given):
        shelf.put(place, tensor)
    assert all(torch.equal(take(shelf, place), given[place]) for place in reversed(range(COUNT)))


def test_what_never_arrives_is_let_go_of_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, tiers = shelf_and_tiers()
    shelf.put(0, inputs(1)[0])

    def refused(*_: object) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(tiers[0], "wait", refused)
        shelf.clear()
    shelf.put(0, inputs(2)[0])
    assert tiers[0].said == ["down 0", "down 0"]


def test_larger_inputs_have_a_tier_of_their_own_when_the_other_one_is_gone() -> None:
    opened: list[weakref.ref[Recorded]] = []
    full = True

    def open_tier(sizes: list[int]) -> Recorded:
        assert all(tier() is None for tier in opened), "both at once would take more than was planned"
        if full and opened:
            raise MemoryError
        tier = Recorded(sizes)
        opened.append(weakref.ref(tier))
        return tier

    shelf = Shelf(COUNT, open_tier)
    shelf.put(0, inputs(1)[0])
    given = [torch.cat([tensor, tensor]) for tensor in inputs(2)]
    with pytest.raises(MemoryError):
        shelf.put(0, given[0])
    full = False
    for place, tensor in enumerate(given):  # not into that which was too small
        shelf.put(place, tensor)
    for place in reversed(range(COUNT)):
        found = shelf.take(place, given[place].shape, torch.float32, torch.device("cpu"))
        assert torch.equal(found, given[place])


def test_one_alone_needs_no_tier() -> None:
    shelf, tiers = shelf_and_tiers(1)
    (tensor, *_) = inputs(0)
    shelf.put(0, tensor)
    assert take(shelf, 0).data_ptr() == tensor.data_ptr()
    assert not tiers


def test_where_memory_runs_out_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one above it is on its way still, and its memory is held until it has come."""
    shelf, tiers = shelf_and_tiers()
    for place, tensor in enumerate(inputs(3)):
        shelf.put(place, tensor)
    take(shelf, COUNT - 1)

    def refused(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "device_memory", refused)
        with pytest.raises(torch.OutOfMemoryError):
            take(shelf, COUNT - 2)
    assert tiers[0].said[-1] == f"up {COUNT - 2}"
    given = inputs(4)
    shelf.put(0, given[0])
    assert tiers[0].said[-2:] == [f"is up {COUNT - 2}", "down 0"]
    for place, tensor in list(enumerate(given))[1:]:
        shelf.put(place, tensor)
    assert all(torch.equal(take(shelf, place), given[place]) for place in reversed(range(COUNT)))
