"""Which pairs are worked on at a time: every one once, in tiles that are no larger than without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowmem_ft.runtime.expert_tiles import Routing, Rows, route, tile_rows
from tests.unit.runtime.test_experts import EXPERTS_COUNT, ROUTINGS, TOKENS, TOP_K

HIDDEN = 64


def routed(index_TK: Tensor, together: int, experts: int = EXPERTS_COUNT) -> Routing:
    return route(index_TK, experts=experts, hidden=HIDDEN, together=together)


def test_tiles_follow_from_shapes_alone() -> None:
    assert tile_rows(16384, 128, 64) == 256
    assert tile_rows(64, 128, 64) == 16
    assert tile_rows(16384, 8, 64) == 2048 + 128
    assert tile_rows(16384, 128, 2048) == 512
    assert tile_rows(129, 2, 64) == 80


@pytest.mark.parametrize("together", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_pair_is_in_one_tile(name: str, together: int) -> None:
    index_TK = ROUTINGS[name]
    routing = routed(index_TK, together)
    assert torch.equal(routing.order_P.sort().values, torch.arange(TOKENS * TOP_K))
    expert_P = index_TK.reshape(-1)[routing.order_P]
    ends = [tile.pairs.stop for tile in routing.tiles]
    assert [tile.pairs.start for tile in routing.tiles] == [0, *ends[:-1]]
    assert ends[-1] == len(expert_P)
    for tile in routing.tiles:
        assert len(set(tile.experts)) == len(tile.experts) <= together, "gradients of one expert would race"
        of_pairs = [e for e, count in zip(tile.experts, tile.counts, strict=True) for _ in range(count)]
        assert expert_P[tile.pairs].tolist() == of_pairs


@pytest.mark.parametrize("together", [2, 3, 8])
@pytest.mark.parametrize("name", ROUTINGS)
def test_no_tile_is_larger_than_without_data(name: str, together: int) -> None:
    assumed = routed(ROUTINGS[name].to("meta"), together).tiles
    rows = {len(tile.experts) * tile.height for tile in assumed}
    assert len(rows) == 1
    assert {len(tile.experts) for tile in assumed} == {together}
    assert sum(sum(tile.counts) for tile in assumed) == TOKENS * TOP_K
    for tile in routed(ROUTINGS[name], together).tiles:
        assert len(tile.experts) * tile.height <= min(rows)
        assert tile.height >= max(tile.counts)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_few_tokens(tokens: int) -> None:
    """As when a sample is generated, token by token."""
    index_TK = torch.stack([torch.arange(tokens) % 8, (torch.arange(tokens) + 3) % 8], 1)
    assumed, tiles = routed(index_TK.to("meta"), 4).tiles, routed(index_TK, 4).tiles
    assert sum(sum(tile.counts) for tile in tiles) == sum(sum(tile.counts) for tile in assumed) == 2 * tokens
    most = max(len(tile.experts) * tile.height for tile in assumed)
    assert all(len(tile.experts) * tile.height <= most for tile in tiles)


def test_similar_experts_go_together() -> None:
    """So that a tile repeats few rows, although some experts have many times as many as others."""
    counts = [400, 12, 390, 15, 20, 380, 10, 370]
    index_TK = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)])[:, None]
    tiles = routed(index_TK, 4).tiles
    assert [set(tile.experts) for tile in tiles] == [{0, 2, 5, 7}, {0, 2, 5, 7}, {1, 3, 4, 6}]
    assert sum(len(tile.experts) * tile.height for tile in tiles) < 1.1 * sum(counts)


def test_an_expert_with_two_tiles_has_them_apart() -> None:
    index_TK = torch.zeros(1000, 1, dtype=torch.int64)
    index_TK[:10] = 1
    tiles = routed(index_TK, 4, experts=64).tiles
    assert sum(0 in tile.experts for tile in tiles) > 1
    assert all(tile.experts.count(0) <= 1 for tile in tiles)


def test_rows_of_several_experts() -> None:
    index_TK = torch.tensor([[0], [1], [0], [0], [2], [1]])
    routing = routed(index_TK, 3, experts=3)
    (tile,) = routing.tiles
    rows = Rows(routing, tile)
    assert tile.experts == (0, 1, 2)
    assert rows.shape == (3, 16)
    values_P = torch.arange(10.0, 16.0)[routing.order_P]
    taken = rows.take(values_P)
    assert taken[0].tolist() == [10.0, 12.0, *[13.0] * 14]
    assert taken[1].tolist() == [11.0, *[15.0] * 15]
    assert taken[2].tolist() == [14.0] * 16
    assert rows.weights(values_P).sum(1).tolist() == [35.0, 26.0, 14.0]
    assert torch.equal(rows.pairs_of(taken), values_P)
    sum_TD = torch.zeros(6, 1)
    rows.add_to_tokens(sum_TD, routing.order_P, taken.unsqueeze(-1))
    assert sum_TD.flatten().tolist() == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
