"""The embedding and the head below the device: the same bits, and hardly any memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.runtime import below as placing
from lowmem_ft.runtime import vocabulary
from lowmem_ft.runtime.tiers import PAGE, DiskTier
from lowmem_ft.runtime.vocabulary import Table, chosen, is_trained, matrices_of, row_tiles
from lowmem_ft.step import eval_step, train_step
from tests.models import save_tiny, tiny_config, tiny_model
from tests.unit.planner.policies import policy
from tests.unit.runtime.test_streaming import Poisoned, counting, tiers

DEPTH, LENGTH, VOCABULARY = 3, 32, 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabulary")
    sizes: dict[str, Any] = {"num_hidden_layers": DEPTH, "n_layer": DEPTH, "vocab_size": VOCABULARY}
    return {
        "tied": save_tiny("qwen2", folder / "tied", **sizes, tie_word_embeddings=True),
        "untied": save_tiny("llama", folder / "untied", **sizes, tie_word_embeddings=False),
        "scaled": save_tiny("gemma3", folder / "scaled", **sizes),  # the embedding's own forward multiplies
        "biased": save_tiny("phi", folder / "biased", **sizes),  # the head has a bias
        "by layer": save_tiny(  # each block has an input of its own from a second embedding
            "gemma4",
            folder / "layers",
            **sizes,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_kv_shared_layers=1,
            tie_word_embeddings=True,
        ),
    }


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "TILE_BYTES", PAGE)


def settings(model: Path, **sections: Any) -> RunConfig:
    keys = {"data": {"seq_len": LENGTH}, "adapter": {"rank": 4, "dropout": 0.1}, **sections}
    return RunConfig.from_dict({"model": str(model), "output": str(model / "run"), **keys})


def a_policy(which: str, *, streamed: int = 0) -> Any:
    return policy(
        rows=2, seq_len=LENGTH, depth=DEPTH, accumulation=2, loss_chunk_tokens=16, optimizer="adamw",
        resident_blocks=DEPTH - streamed, streamed_blocks=streamed, stream_embeddings=which,
    )  # fmt: skip


def equipped(config: RunConfig, which: str, *, streamed: int = 0) -> Assembled:
    torch.manual_seed(0)
    return assemble(config, a_policy(which, streamed=streamed), torch.device("cpu"))


def trained(ready: Assembled, config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """What a step and evaluations around it report, and the weights that the step leaves."""
    batches = FullBatches(config, a_policy("none"), vocabulary=VOCABULARY)
    torch.manual_seed(1)  # of dropout
    before = eval_step(ready, batches[0])
    result = train_step(ready, batches, lr=1e-2)
    said = [*before, result.loss, result.grad_norm, *eval_step(ready, batches[0])]
    return said, {name: parameter.detach().clone() for name, parameter in ready.trainable.items()}


def same(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize(
    ("name", "which", "streamed"),
    [
        ("tied", "both", 0),
        ("untied", "input", 0),
        ("untied", "both", 0),
        ("untied", "both", DEPTH),
        ("scaled", "both", DEPTH),
        ("biased", "both", 0),
        ("by layer", "input", 0),
        ("by layer", "both", DEPTH),
    ],
)
def test_results_are_those_of_a_resident_run(models: dict[str, Path], name: str, which: str, streamed: int) -> None:
    config = settings(models[name])
    expected = trained(equipped(config, "none"), config)
    with tiers(Poisoned):
        ready = equipped(config, which, streamed=streamed)
    assert ready.head.keeps == (which == "input")
    assert len(ready.head.tiles) > 2
    assert same(trained(ready, config), expected)


def test_a_bias_of_a_streamed_head_is_trained(models: dict[str, Path]) -> None:
    config = settings(models["biased"], adapter={"rank": 4, "bias": "all"})
    resident, ready = equipped(config, "none"), equipped(config, "both")
    assert any(name.endswith("lm_head.bias") for name in ready.trainable)
    assert same(trained(ready, config), trained(resident, config))


def test_what_is_below_takes_two_tiles_of_the_device(models: dict[str, Path]) -> None:
    config = settings(models["untied"])
    resident, ready = equipped(config, "none"), equipped(config, "both")
    embedding, head = (ready.model.model.embed_tokens, ready.model.lm_head)
    for module in (embedding, head):
        assert module.weight.shape == (VOCABULARY, resident.model.config.hidden_size)
        assert module.weight.untyped_storage().nbytes() == 2
        assert module.weight.isnan().all(), "whoever reads it past the table finds out"
    (matrix,) = [it for it in ready.below.matrices if it.head is head]
    assert matrix.slots == [max(matrix.tiles) + PAGE] * 2
    assert sum(matrix.slots) < matrix.nbytes / 2


def test_each_tile_is_copied_once_for_each_pass(models: dict[str, Path]) -> None:
    copies: list[int] = []
    config = settings(models["untied"])
    with tiers(counting(copies)):
        ready = equipped(config, "both")
    last = len(ready.head.tiles) - 1
    batches = FullBatches(config, a_policy("none"), vocabulary=VOCABULARY)
    train_step(ready, batches[:1], lr=1e-2)
    copies.clear()
    train_step(ready, batches[:1], lr=1e-2)
    once = [*range(2, last + 1), *range(last - 2, -1, -1)]  # 0 and 1 lie there, as do the last two at the turn
    assert copies == once * -(-batches[0].loss_tokens // 16)


def test_the_whole_model_still_runs_and_can_be_differentiated(models: dict[str, Path]) -> None:
    """As transformers' Trainer and generate use it, with the model's own head."""
    config, ids = settings(models["biased"]), torch.arange(3, 19).view(2, 8)
    found = []
    for which in ("none", "both"):
        ready = equipped(config, which)
        ready.model.eval()
        loss = ready.model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert ready.accumulator is not None
        gradients = {name: ready.accumulator.buffer(parameter) for name, parameter in ready.trainable.items()}
        with torch.inference_mode():
            tokens = ready.model.generate(ids, max_new_tokens=4, do_sample=False)
        found.append((loss.item(), gradients, tokens.tolist()))
    (loss, gradients, tokens), (streamed_loss, streamed, streamed_tokens) = found
    assert (streamed_loss, streamed_tokens) == (pytest.approx(loss, rel=1e-3), tokens)
    for name, gradient in gradients.items():  # sums over tiles are rounded to bf16 elsewhere: measured up to 0.8%
        assert (streamed[name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_they_can_go_below_in_the_middle_of_a_run(models: dict[str, Path]) -> None:
    config = settings(models["untied"])
    expected, ready = equipped(config, "none"), equipped(config, "none")
    assert same(trained(ready, config), trained(expected, config))
    for which in ("input", "both"):
        ready.follow(a_policy(which))
        assert same(trained(ready, config), trained(expected, config))
    assert ready.head.table is not None
    ready.head = replace(ready.head, on_card=True)
    ready.follow(a_policy("both"))
    assert ready.head.on_card, "the loss goes on as it does on a card"


@pytest.mark.parametrize(
    ("adapter", "which"),
    [
        ({"rank": 4, "train_modules": ["embed_tokens"]}, "input"),
        ({"rank": 4, "train_modules": ["lm_head"]}, "both"),
        ({"method": "peft", "peft": {"peft_type": "LORA", "target_modules": ["embed_tokens", "q_proj"]}}, "input"),
    ],
)
def test_one_that_is_trained_cannot_be_streamed(models: dict[str, Path], adapter: Any, which: str) -> None:
    config = settings(models["untied"], adapter=adapter)
    with pytest.raises(UnsupportedError, match="stream_embeddings"):
        equipped(config, which)
    ready = equipped(config, "none")
    with pytest.raises(UnsupportedError, match="stream_embeddings"):
        ready.follow(a_policy(which))
    assert ready.head.table is None


def test_what_can_be_streamed() -> None:
    tied, untied = (matrices_of(tiny_model("llama", tie_word_embeddings=it)) for it in (True, False))
    assert [(it.embedding is None, it.head is None) for it in tied] == [(False, False)]
    assert [(it.embedding is None, it.head is None) for it in untied] == [(False, True), (True, False)]
    assert [chosen(untied, which) for which in ("none", "input", "both")] == [[], untied[:1], untied]
    assert chosen(tied, "input") == [], "the head reads all of it"

    class Reads(torch.nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return torch.nn.functional.embedding(input, self.weight)

    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens = Reads(10, tiny_config("llama").hidden_size)
    assert [it.embedding for it in matrices_of(model)] == [None], "one that reads its weight in its own way stays"


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_the_embedding_of_each_block_can_be_streamed(name: str) -> None:
    """It is the largest matrix of such a model, and is looked up alone."""
    model = tiny_model(name, tie_word_embeddings=True).requires_grad_(False)
    tied, by_layer = matrices_of(model)
    assert tied.names == ("model.embed_tokens.weight", "lm_head.weight")
    assert by_layer.embedding is model.model.embed_tokens_per_layer
    assert by_layer.names == ("model.embed_tokens_per_layer.weight",)
    assert chosen([tied, by_layer], "input") == [by_layer]
    assert not is_trained(model, by_layer)
    by_layer.parameter.requires_grad_()
    assert is_trained(model, by_layer)


@pytest.mark.parametrize(("rows", "columns"), [(1000, 24), (64, 4096), (1, 8), (130, 96)])
def test_rows_lie_one_after_the_other(rows: int, columns: int, tmp_path: Path) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = Table((rows, columns), torch.bfloat16, device=torch.device("cpu"), multiplied=True,
                  open_tier=lambda sizes: DiskTier(tmp_path, sizes))  # fmt: skip
    table.write(weight)
    ids = torch.randint(0, rows, (3, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(table.gather(ids), weight[ids])
    tiles = row_tiles(rows, 2 * columns)
    assert [tile.start * 2 * columns % PAGE for tile in tiles] == [0] * len(tiles)
    assert torch.equal(torch.cat([table.tile(at, returns=False).clone() for at in range(len(tiles))]), weight)


def test_the_tier_is_the_policys(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(placing, "DiskTier", lambda folder, sizes: opened.append(len(sizes)) or DiskTier(folder, sizes))
    ready = equipped(settings(models["untied"]), "both")
    assert opened == [len(ready.head.tiles)] * 2
