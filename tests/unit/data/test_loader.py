import itertools
import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowmem_ft.core.errors import DataError
from lowmem_ft.data.examples import Example
from lowmem_ft.data.loader import BatchLoader, MicroBatches, eval_batches
from lowmem_ft.data.mixture import Mixture
from lowmem_ft.data.packing import permutation

SEQ_LEN = 64
SETTINGS: dict[str, Any] = {
    "seq_len": SEQ_LEN, "packing": True, "micro_batch_tokens": 128, "tokens_per_step": 256, "seed": 3, "pad_id": 0
}  # fmt: skip


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Each of its own ids, so that it is known again in a batch."""
    draw, ids = random.Random(0), itertools.count(1)
    documents = [[next(ids) for _ in range(draw.randint(2, SEQ_LEN))] for _ in range(90)]
    return [Example(document, document) for document in documents]


def documents(step: MicroBatches) -> Counter[tuple[int, ...]]:
    """The documents of a step."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in step:
        for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
            found.update(tuple(ids[segments == s].tolist()) for s in range(1, int(segments.max()) + 1))
    return found


def same(one: MicroBatches, other: MicroBatches) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_every_example_once(examples: list[Example], packing: bool) -> None:
    loader = BatchLoader(examples, **{**SETTINGS, "packing": packing})
    orders = []
    for epoch in range(3):
        assert loader.epoch == epoch
        steps = list(itertools.islice(loader, loader.steps_per_epoch))
        total: Counter[tuple[int, ...]] = sum((documents(step) for step in steps), Counter())
        assert total == Counter(tuple(example.input_ids) for example in examples)
        orders.append([sorted(documents(step)) for step in steps])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("packing", [True, False])
def test_steps_do_not_depend_on_the_micro_batch(examples: list[Example], packing: bool) -> None:
    loaders = [
        BatchLoader(examples, **{**SETTINGS, "packing": packing, "micro_batch_tokens": tokens})
        for tokens in (1, 64, 128, 256, 4096)
    ]
    assert len({loader.steps_per_epoch for loader in loaders}) == 1
    for steps in itertools.islice(zip(*loaders, strict=True), 2 * loaders[0].steps_per_epoch):
        assert all(documents(step) == documents(steps[0]) for step in steps)
        for loader, step in zip(loaders, steps, strict=True):
            assert all(
                batch.input_ids.numel() <= loader.micro_batch_tokens or len(batch.input_ids) == 1 for batch in step
            )
        assert len(steps[-1]) == 1
        assert len(steps[0]) == sum(len(batch.input_ids) for batch in steps[0])


def test_packed_steps_have_their_tokens(examples: list[Example]) -> None:
    loader = BatchLoader(examples, **SETTINGS)
    steps = list(itertools.islice(loader, loader.steps_per_epoch))
    assert all(sum(batch.input_ids.numel() for batch in step) == 256 for step in steps[:-1])
    assert all(batch.input_ids.shape == (2, SEQ_LEN) for step in steps[:-1] for batch in step)


def test_rows_of_a_packed_run_take_one_way() -> None:
    """A plan counts what attention takes for documents, and kernels for whole rows may take more."""
    long = [Example(range(1, SEQ_LEN + 1), range(1, SEQ_LEN + 1)) for _ in range(8)]
    for step in itertools.islice(BatchLoader(long, **SETTINGS), 2):
        assert all(batch.packed for batch in step)
        assert all(batch.packed for batch in step.within(SEQ_LEN))


def test_single_steps_have_their_tokens_on_average(examples: list[Example]) -> None:
    loader = BatchLoader(examples, **{**SETTINGS, "packing": False})
    mean = sum(map(len, examples)) / loader.steps_per_epoch
    assert 0.75 * 256 < mean < 1.25 * 256
    for batch in itertools.chain.from_iterable(itertools.islice(loader, loader.steps_per_epoch)):
        used = (batch.segment_ids != 0).sum(dim=1)
        assert not batch.packed
        assert batch.input_ids.shape[1] % 8 == 0
        assert batch.input_ids.shape[1] - used.max() < 8


@pytest.mark.parametrize("packing", [True, False])
def test_resumed_goes_on_exactly(examples: list[Example], packing: bool) -> None:
    settings = {**SETTINGS, "packing": packing}
    whole = BatchLoader(examples, **settings)
    for stop in (0, 1, whole.steps_per_epoch - 1, whole.steps_per_epoch, whole.steps_per_epoch + 3):
        first, resumed = BatchLoader(examples, **settings), BatchLoader(examples, **settings)
        list(itertools.islice(first, stop))
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert (resumed.epoch, resumed.state_dict()) == (first.epoch, first.state_dict())
        for _ in range(3):
            assert same(next(first), next(resumed))


def test_resuming_with_other_data_is_refused_but_not_with_other_micro_batches(examples: list[Example]) -> None:
    state = BatchLoader(examples, **SETTINGS).state_dict()
    BatchLoader(examples, **{**SETTINGS, "micro_batch_tokens": 64}).load_state_dict(state)
    with pytest.raises(DataError, match="seed 4"):
        BatchLoader(examples, **{**SETTINGS, "seed": 4}).load_state_dict(state)
    with pytest.raises(DataError, match="examples 89"):
        BatchLoader(examples[1:], **SETTINGS).load_state_dict(state)
    changed = [Example(examples[0].input_ids[1:], examples[0].labels[1:]), *examples[1:]]
    with pytest.raises(DataError, match="lengths"):
        BatchLoader(changed, **SETTINGS).load_state_dict(state)


def test_a_state_of_another_order_is_refused(examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a version that packs rows otherwise: some examples would come twice, and some never."""
    state = BatchLoader(examples, **SETTINGS).state_dict()
    monkeypatch.setattr("lowmem_ft.data.loader.permutation", lambda count, seed: np.arange(count))
    other = BatchLoader(examples, **SETTINGS)
    with pytest.raises(DataError, match="another version, which deals the examples in another order"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="seed 4"):
        BatchLoader(examples, **{**SETTINGS, "seed": 4}).load_state_dict(state)


def test_little_data_takes_short_rows() -> None:
    few = [Example([1, 2, 3], [1, 2, 3])] * 5
    loader = BatchLoader(few, **{**SETTINGS, "seq_len": 2048})
    assert loader.steps_per_epoch == 1
    (batch,) = next(loader)
    assert batch.input_ids.shape == (1, 16)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_each_example_once_in_one_order(examples: list[Example], packing: bool) -> None:
    settings = {"seq_len": SEQ_LEN, "packing": packing, "micro_batch_tokens": 256, "pad_id": 0}
    batches = eval_batches(examples, **settings)
    assert documents(batches) == Counter(tuple(example.input_ids) for example in examples)
    assert same(batches, eval_batches(examples, **settings))
    assert sum(batch.loss_tokens for batch in batches) == sum(example.loss_tokens for example in examples)
    assert [batch.input_ids.shape for batch in batches[1:3]] == [batches[i].input_ids.shape for i in (1, 2)]


@pytest.mark.parametrize("packing", [True, False])
def test_no_micro_batch_is_larger_than_planned(examples: list[Example], packing: bool) -> None:
    """Also where sequences are no multiple of that to which rows are filled up."""
    few = [example.cut(60) for example in examples]
    settings = {**SETTINGS, "seq_len": 60, "packing": packing, "micro_batch_tokens": 180, "tokens_per_step": 360}
    loader = BatchLoader(few, **settings)
    batches = [batch for step in itertools.islice(loader, loader.steps_per_epoch) for batch in step]
    batches += eval_batches(
        few, **{name: settings[name] for name in ("seq_len", "packing", "micro_batch_tokens", "pad_id")}
    )
    assert max(batch.input_ids.numel() for batch in batches) == 180
    assert max(batch.input_ids.shape[1] for batch in batches) == 60


def test_bad_examples() -> None:
    with pytest.raises(DataError, match="no examples"):
        BatchLoader([], **SETTINGS)
    with pytest.raises(DataError, match="longer than a row"):
        eval_batches([Example([1] * 9, [1] * 9)], seq_len=8, packing=True, micro_batch_tokens=8, pad_id=0)


def test_longest_first(examples: list[Example]) -> None:
    """Every epoch from the longest row to the shortest, each example once, and resumed in that order only."""
    longest = max(map(len, examples))
    for packing in (True, False):
        settings = {**SETTINGS, "packing": packing, "order": "longest_first"}
        loader = BatchLoader(examples, **settings)
        for _ in range(2):
            steps = list(itertools.islice(loader, loader.steps_per_epoch))
            rows = [sorted((batch.segment_ids != 0).sum(dim=1).tolist()) for step in steps for batch in step]
            filled = [max(row) for row in rows]
            assert filled == sorted(filled, reverse=True)
            assert filled[0] >= longest
            total: Counter[tuple[int, ...]] = sum((documents(step) for step in steps), Counter())
            assert total == Counter(tuple(example.input_ids) for example in examples)
        with pytest.raises(DataError, match="order longest_first"):
            BatchLoader(examples, **settings).load_state_dict(BatchLoader(examples, **SETTINGS).state_dict())
        with pytest.raises(DataError, match="order shuffled"):
            BatchLoader(examples, **SETTINGS).load_state_dict(BatchLoader(examples, **settings).state_dict())


def drawn(loader: BatchLoader) -> Counter[tuple[int, ...]]:
    """The documents of the epoch that begins."""
    epoch, found = loader.epoch, Counter[tuple[int, ...]]()
    while loader.epoch == epoch:
        found += documents(next(loader))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_weights_say_how_often_an_epoch_uses_a_source(examples: list[Example], packing: bool) -> None:
    parts = examples[:40], examples[40:60], examples[60:]
    mixture = Mixture(parts, (1.0, 2.0, 0.5))
    loader = BatchLoader(mixture, **{**SETTINGS, "packing": packing})
    halves = []
    for _ in range(4):
        found = drawn(loader)
        assert [found[tuple(example.input_ids)] for example in parts[0]] == [1] * 40
        assert [found[tuple(example.input_ids)] for example in parts[1]] == [2] * 20
        half = [found[tuple(example.input_ids)] for example in parts[2]]
        assert (sum(half), max(half)) == (15, 1)
        halves.append(half)
    assert len({tuple(half) for half in halves}) == 4
    assert np.array_equal(np.add(halves[0], halves[1]), np.ones(30))  # the other half
    assert np.array_equal(np.add(halves[2], halves[3]), np.ones(30))
    again = BatchLoader(mixture, **{**SETTINGS, "packing": packing})
    found = drawn(again)
    assert [found[tuple(example.input_ids)] for example in parts[2]] == halves[0]


@pytest.mark.parametrize("packing", [True, False])
def test_weighted_runs_resume_exactly_where_epochs_differ_in_steps(examples: list[Example], packing: bool) -> None:
    mixture = Mixture((examples[:30], examples[30:]), (1.5, 0.3))
    settings = {**SETTINGS, "packing": packing, "tokens_per_step": 64}
    whole = BatchLoader(mixture, **settings)
    steps = list(itertools.islice(whole, 5 * whole.steps_per_epoch))
    first = BatchLoader(mixture, **settings)
    for stop in range(0, len(steps) - 3, 7):
        first.steps = stop
        resumed = BatchLoader(mixture, **settings)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert resumed.epoch == first.epoch
        assert all(same(next(resumed), step) for step in steps[stop : stop + 3])
    lengths = np.diff(whole._starts)
    assert len(set(lengths.tolist())) > 1 or not packing  # else this test shows nothing
    other = Mixture(mixture.sources, (1.5, 0.4))
    with pytest.raises(DataError, match="weights"):
        BatchLoader(other, **settings).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("count", "weight"), [(10, 0.3), (7, 2.9), (40, 0.1), (3, 0.5), (1, 1.6)])
def test_all_examples_have_their_turn(examples: list[Example], count: int, weight: float) -> None:
    """Whatever an epoch draws, no example is drawn twice in it, or again before all others were drawn."""
    mixture, drawn, times = Mixture((examples[:count],), (weight,)), round(weight % 1 * count), Counter[int]()
    for used in itertools.islice(mixture.epochs(3), 60):
        found = Counter(used.tolist())
        more = {index for index, uses in found.items() if uses > int(weight)}
        assert len(more) == drawn
        assert set(found.values()) <= {int(weight), int(weight) + 1}
        times += Counter(more)
        uses = [times[index] for index in range(count)]
        assert max(uses) - min(uses) <= 1
    orders = [[it.tolist() for it in itertools.islice(mixture.epochs(seed), 20)] for seed in (3, 4)]
    assert (orders[0] == orders[1]) == (drawn == count)


def test_a_resumed_run_orders_each_source_once_for_each_round(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not anew for each epoch that was, which takes as long as their number squared."""
    orders: list[int] = []

    def counted(count: int, seed: int) -> NDArray[np.int64]:
        orders.append(seed)
        return permutation(count, seed)

    loader = BatchLoader(Mixture((examples,), (0.5,)), **SETTINGS)
    loader.load_state_dict({**loader.state_dict(), "steps": 40 * loader.steps_per_epoch})
    monkeypatch.setattr("lowmem_ft.data.mixture.permutation", counted)
    assert loader.epoch > 30
    assert len(orders) <= 30


def test_equal_weights_are_no_weights(examples: list[Example]) -> None:
    """A run over one file goes on from a checkpoint of before there were sources."""
    plain, mixture = BatchLoader(examples, **SETTINGS), BatchLoader(Mixture((examples,), (1.0,)), **SETTINGS)
    assert plain.state_dict() == mixture.state_dict()
    for _ in range(2 * plain.steps_per_epoch):
        assert same(next(plain), next(mixture))


def test_weights_that_leave_nothing(examples: list[Example]) -> None:
    with pytest.raises(DataError, match="leave no example"):
        BatchLoader(Mixture((examples[:3],), (0.1,)), **SETTINGS)
