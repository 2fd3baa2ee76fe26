import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lowmem_ft.core.token_ids import on_host
from lowmem_ft.data.examples import IGNORE_INDEX, Example, read_examples
from lowmem_ft.data.packing import collate, pack

from .conftest import ASSETS


@pytest.mark.parametrize(("seq_len", "full"), [(128, 0.998), (256, 1.0), (512, 1.0), (1024, 0.992), (2048, 0.978)])
def test_rows_of_the_shipped_data_are_full(tokenizer: PreTrainedTokenizerBase, seq_len: int, full: float) -> None:
    """Fewer rows cannot hold them, but of 128 tokens one fewer might."""
    examples, report = read_examples(ASSETS / "whatis-train.jsonl", tokenizer, seq_len=seq_len)
    lengths = [len(example) for example in examples]
    rows = list(pack(lengths, capacity=seq_len, seed=0))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))  # none lost, none doubled
    assert all(sum(lengths[index] for index in row) <= seq_len for row in rows)
    assert report.tokens >= full * len(rows) * seq_len
    assert list(pack(lengths, capacity=seq_len, seed=0)) == rows
    other = list(pack(lengths, capacity=seq_len, seed=1))
    assert other != rows
    assert [[lengths[index] for index in row] for row in other] == [[lengths[index] for index in row] for row in rows]


def test_long_documents_share_rows_with_short_ones() -> None:
    lengths = [60, 10, 55, 45, 20, 40, 70, 100]
    rows = pack(lengths, capacity=100, seed=0)
    assert sorted(sorted(lengths[index] for index in row) for row in rows) == [[10, 20, 70], [40, 60], [45, 55], [100]]


def test_collate() -> None:
    a, b, c = (
        Example([11, 12, 13], [IGNORE_INDEX, 12, 13]),
        Example([21, 22], [21, 22]),
        Example([31, 32, 33, 34], [IGNORE_INDEX, IGNORE_INDEX, 33, 34]),
    )
    batch = collate([[a, b], [c]], pad_id=9)
    n = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 9, 9, 9], [31, 32, 33, 34, 9, 9, 9, 9]]
    # 13 does not predict 21: the last position of a document has no label, and the label 21 belongs to nobody
    assert batch.labels.tolist() == [[12, 13, n, 22, n, n, n, n], [n, 33, 34, n, n, n, n, n]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.bounds.tolist() == [0, 3, 5, 8, 12, 16]
    assert (batch.tokens, batch.loss_tokens, batch.packed) == (9, 5, True)
    assert batch.loss_tokens == sum(example.loss_tokens for example in (a, b, c))
    assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.position_ids.dtype, batch.segment_ids.dtype) == (torch.int64, torch.int32)
    single = collate([[a], [c]], pad_id=9, length=20)
    assert not single.packed
    assert single.input_ids.shape == (2, 20)
    assert torch.equal(single.to("cpu").labels, single.labels)
    assert single.to("meta").labels.is_meta
    assert torch.equal(on_host(single.to("meta").input_ids), single.input_ids), "no device is asked for its ids"
    assert on_host(single.to("cpu").input_ids) is single.input_ids
    assert not single.to("meta").bounds.is_meta
    assert collate([[a, b, a], [c, c]], pad_id=9).bounds.tolist() == [0, 3, 5, 8, 12, 16], "full rows have no padding"


def test_pad_id_may_be_a_label() -> None:
    """A tokenizer that pads with EOS keeps the EOS labels: padding is told by its segment."""
    eos = 2
    batch = collate([[Example([5, 6, eos], [IGNORE_INDEX, 6, eos])]], pad_id=eos)
    assert batch.labels[0].tolist() == [6, eos] + [IGNORE_INDEX] * 6
    assert batch.tokens == 3
