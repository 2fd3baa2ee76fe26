"""Streamed blocks: whatever weights, adapters, activations and copies are like, results are those of a resident run.

Equal means bit by bit: loss, gradients' norm, trained weights and held-out loss of a step of two micro-batches.
Slots are filled with poison before every copy, and one tier is slow, so that whoever reads early or late is found out.
"""

import functools
import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from lowmem_ft.assemble import Assembled, assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.errors import LowMemError, UnsupportedError
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.verify import FullBatches
from lowmem_ft.quant.linear import QuantLinear, get_base_weight
from lowmem_ft.runtime import below as placing
from lowmem_ft.runtime import experts
from lowmem_ft.runtime.streaming import block_bytes, spread
from lowmem_ft.runtime.tiers import PAGE, DiskTier, device_memory
from lowmem_ft.step import eval_step, train_step
from tests.models import save_tiny
from tests.unit.planner.policies import policy

DEPTH, LENGTH = 5, 32
QUANT: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4", "double_quant": True},
    "fp4": {"bits": 4, "type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
    "bf16": {"bits": 16},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "rslora on attention": {"rank": 4, "rslora": True, "targets": ["q_proj", "v_proj"]},
    "dora": {"rank": 4, "dora": True, "targets": ["q_proj", "v_proj"]},
    "peft": {"method": "peft", "peft": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
}
STREAMED = {"one resident": DEPTH - 1, "half": 3, "none resident": DEPTH}
# blocks that keep and that offload, and whether those that compute again keep attention
ACTIVATIONS = {
    "keep": (DEPTH, 0, False), "some": (2, 1, False), "recompute": (0, 0, False), "offload": (0, DEPTH, False),
    "some but attention": (1, 2, True),
}  # fmt: skip
EMBEDDINGS = ("none", "both")


class Poisoned(DiskTier):
    """Spoils what was in a slot before it is filled again, and takes its time."""

    seconds = 0.0

    def start(self, block: int, slot: Tensor) -> Any:
        slot.fill_(0xFF)  # NaN as a scale and as a weight
        return super().start(block, slot)

    def read(self, block: int, into: Tensor) -> None:
        time.sleep(self.seconds)
        super().read(block, into)


class Slow(Poisoned):
    seconds = 0.02


def counting(copies: list[int]) -> type[DiskTier]:
    """Adds to `copies` which piece is copied."""

    class Counting(DiskTier):
        def start(self, block: int, slot: Tensor) -> Any:
            copies.append(block)
            return super().start(block, slot)

    return Counting


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("streaming")
    return {
        name: save_tiny(name, folder / name, n_layer=DEPTH, num_hidden_layers=DEPTH)
        for name in ("llama", "mixtral", "gpt2", "qwen2", "gpt_oss")
    }


def trained(
    model: Path, sections: dict[str, Any], *, streamed: int, activations: str, packing: bool = True, **changes: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """What a step and an evaluation report, and the weights that the step leaves."""
    config = settings(model, sections, packing=packing)
    ready = equipped(config, streamed=streamed, activations=activations, **changes)
    batches = FullBatches(config, a_policy(config, streamed=streamed, activations=activations), vocabulary=100)
    result = train_step(ready, batches, lr=1e-2)
    said = [result.loss, result.grad_norm, *eval_step(ready, batches[0])]
    return said, {name: parameter.detach().clone() for name, parameter in ready.trainable.items()}


def settings(model: Path, sections: dict[str, Any], *, packing: bool = True) -> RunConfig:
    data = {"seq_len": LENGTH, "packing": packing}
    return RunConfig.from_dict({"model": str(model), "output": str(model / "run"), "data": data, **sections})


def a_policy(config: RunConfig, *, streamed: int, activations: str) -> Any:
    keep, offload, attention = ACTIVATIONS[activations]
    kinds: dict[Any, str] = {4: config.quant.type, 8: "int8", 16: "none"}
    return policy(
        rows=2, seq_len=LENGTH, depth=DEPTH, keep=keep, accumulation=2, bits=config.quant.bits,
        quant=kinds[config.quant.bits], double_quant=config.quant.double_quant and config.quant.bits == 4,
        offload_blocks=offload, recompute_blocks=DEPTH - keep - offload, resident_blocks=DEPTH - streamed,
        streamed_blocks=streamed, loss_chunk_tokens=16, optimizer="adamw", keep_attention=attention,
    )  # fmt: skip


def equipped(config: RunConfig, *, streamed: int, activations: str, **changes: Any) -> Assembled:
    torch.manual_seed(0)
    chosen = replace(a_policy(config, streamed=streamed, activations=activations), **changes)
    return assemble(config, chosen, torch.device("cpu"))


@contextmanager
def tiers(kind: type[DiskTier]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "DiskTier", kind)
        yield


def same(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


Row: TypeAlias = tuple[str, str, str, str, bool, str]
TABLE: list[Row] = list(itertools.product(QUANT, ADAPTERS, ACTIVATIONS, STREAMED, (True, False), EMBEDDINGS))


def some(table: list[Row]) -> Iterator[Row]:
    """A sixteenth of them, in which every pair of values is met: `benchmarks/streaming_exact.py` runs all."""
    positions = [list(QUANT), list(ADAPTERS), list(ACTIVATIONS), list(STREAMED)]
    for entry in table:
        quant, adapter, kept, streamed = (names.index(str(it)) for names, it in zip(positions, entry, strict=False))
        packing, embeddings = (quant + kept // 2 + streamed) % 2 == 0, EMBEDDINGS[(adapter + kept) // 2 % 2]
        if (quant + adapter + kept + streamed) % 4 == 0 and (packing, embeddings) == entry[4:]:
            yield entry


@pytest.mark.parametrize(("quant", "adapter", "activations", "streamed", "packing", "embeddings"), list(some(TABLE)))
def test_results_are_those_of_a_resident_run(
    models: dict[str, Path], quant: str, adapter: str, activations: str, streamed: str, packing: bool, embeddings: str
) -> None:
    assert exact(models["llama"], quant, adapter, activations, streamed, packing, embeddings)


def exact(
    model: Path, quant: str, adapter: str, activations: str, streamed: str, packing: bool, embeddings: str
) -> bool:
    """Whether a row of the table gives the results of a run whose blocks are all resident and keep."""
    sections, count = {"quant": QUANT[quant], "adapter": ADAPTERS[adapter]}, STREAMED[streamed]
    with tiers(Poisoned):
        found = trained(
            model, sections, streamed=count, activations=activations, packing=packing, stream_embeddings=embeddings
        )
    return same(found, resident(model, quant, adapter, packing))


@functools.cache
def resident(model: Path, quant: str, adapter: str, packing: bool) -> tuple[list[float], dict[str, Tensor]]:
    sections = {"quant": QUANT[quant], "adapter": ADAPTERS[adapter]}
    return trained(model, sections, streamed=0, activations="keep", packing=packing)


def test_every_pair_of_the_table_is_met() -> None:
    met = {pair for entry in some(TABLE) for pair in itertools.combinations(enumerate(entry), 2)}
    assert met == {pair for entry in TABLE for pair in itertools.combinations(enumerate(entry), 2)}


@pytest.mark.parametrize(
    ("quant", "targets"), [("nf4", "all-linear"), ("bf16", "all-linear"), ("int8", ["q_proj"]), ("bf16", ["q_proj"])]
)
def test_mixtures_of_experts(models: dict[str, Path], quant: str, targets: Any) -> None:
    sections = {"quant": QUANT[quant], "adapter": {"rank": 4, "targets": targets}}
    expected = trained(models["mixtral"], sections, streamed=0, activations="keep")
    with tiers(Poisoned):
        for activations in ("some", "offload"):
            assert same(trained(models["mixtral"], sections, streamed=DEPTH, activations=activations), expected)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_several_experts_at_once(models: dict[str, Path], quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit resident and streamed, and but for rounding as one by one."""
    shapes: set[int] = set()

    class Noted(experts.Rows):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            shapes.add(len(self.shape))

    monkeypatch.setattr(experts, "Rows", Noted)
    sections = {"quant": QUANT[quant], "adapter": {"rank": 4, "targets": "all-linear"}}
    alone = trained(models["mixtral"], sections, streamed=0, activations="keep")
    assert shapes == {1}
    expected = trained(models["mixtral"], sections, streamed=0, activations="keep", experts_together=3)
    assert shapes == {1, 2}, "tiles of one expert, and of several"
    assert expected[0] == pytest.approx(alone[0], rel=1e-5)
    with tiers(Poisoned):
        for activations in ("some", "offload"):
            streamed = {"streamed": DEPTH, "activations": activations, "experts_together": 3}
            assert same(trained(models["mixtral"], sections, **streamed), expected)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_oss"])  # Conv1D; biases; sinks
def test_other_layers(models: dict[str, Path], name: str, quant: str) -> None:
    sections = {"quant": QUANT[quant], "adapter": {"rank": 4}}
    expected = trained(models[name], sections, streamed=0, activations="keep")
    with tiers(Slow):
        assert same(trained(models[name], sections, streamed=4, activations="some"), expected)


def test_copies_into_other_slots_change_nothing_of_the_block_at_work(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    coming: list[Any] = []

    class AsOnCards(Slow):  # PyTorch copies into slots, and not the system
        def start(self, block: int, slot: Tensor) -> Any:
            coming.append(super().start(block, slot))
            return coming[-1]

        def read(self, block: int, into: Tensor) -> None:
            super().read(block, come := device_memory(len(into), into.device))
            into.copy_(come)

    def forward(mlp: LlamaMLP, x: Tensor) -> Tensor:
        hidden = mlp.up_proj(x)
        for copy in coming:  # the next block comes when this one has been read, and before its gradients
            copy.result()
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * hidden)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    sections = {"quant": QUANT["bf16"], "adapter": ADAPTERS["rslora on attention"]}
    expected = trained(models["llama"], sections, streamed=0, activations="keep")
    with tiers(AsOnCards):
        assert same(trained(models["llama"], sections, streamed=DEPTH, activations="recompute"), expected)


def test_a_saved_adapter_and_the_cache(models: dict[str, Path], tmp_path: Path) -> None:
    sections: dict[str, Any] = {"adapter": {"rank": 4}, "cache": str(tmp_path)}
    expected = trained(models["llama"], sections, streamed=0, activations="keep")
    assert same(trained(models["llama"], sections, streamed=4, activations="some"), expected), "read from the cache"


def test_weights_are_there_for_whoever_asks(models: dict[str, Path]) -> None:
    config = settings(models["llama"], {"adapter": {"rank": 4}})
    resident, streamed = (
        equipped(config, streamed=0, activations="recompute"),
        equipped(config, streamed=DEPTH, activations="recompute"),
    )
    layers = [[m for m in it.model.modules() if isinstance(m, QuantLinear)] for it in (resident, streamed)]
    generator = torch.Generator().manual_seed(0)
    for at in torch.randperm(len(layers[0]), generator=generator).tolist():  # back and forth between blocks
        assert torch.equal(get_base_weight(layers[0][at]), get_base_weight(layers[1][at]))
        assert torch.equal(layers[0][at].weight, layers[1][at].weight)
    compiled = torch.compile(layers[1][0], backend="eager")  # torch._dynamo reads what brings weights up
    x = torch.ones(1, layers[0][0].in_features)
    assert torch.equal(compiled(x), layers[0][0](x))


@pytest.mark.parametrize(
    ("name", "quant", "adapter"),
    [
        ("llama", "nf4", "lora"),
        ("llama", "bf16", "peft"),
        ("llama", "int8", "dora"),
        ("gpt2", "bf16", "lora"),
        ("mixtral", "nf4", "lora"),
        ("mixtral", "bf16", "lora"),
    ],
)
def test_the_state_has_all_weights(
    models: dict[str, Path], tmp_path: Path, name: str, quant: str, adapter: str
) -> None:
    """And not what happens to lie in the slots; where it lies, so that it takes no memory to look at it."""
    targets = {"targets": ["c_attn"]} if name == "gpt2" else {}
    config = settings(models[name], {"quant": QUANT[quant], "adapter": {**ADAPTERS[adapter], **targets}})
    resident = equipped(config, streamed=0, activations="recompute").model.state_dict()
    ready = equipped(config, streamed=DEPTH - 1, activations="recompute", stream_embeddings="both")
    batches = FullBatches(config, a_policy(config, streamed=DEPTH - 1, activations="recompute"), vocabulary=100)
    before = [eval_step(ready, batches[0]), eval_step(ready, batches[0])]
    state = ready.model.state_dict()
    assert state.keys() == resident.keys()
    assert all(torch.equal(state[key].nan_to_num(), it.nan_to_num()) for key, it in resident.items())
    assert not any(it.is_floating_point() and it.isnan().any() for it in state.values())
    below = [it for key, it in state.items() if it.untyped_storage()._cdata not in
             {tensor.untyped_storage()._cdata for tensor in ready.model.parameters()}]  # fmt: skip
    assert all(it.untyped_storage().nbytes() == it.nbytes for it in below)
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(saved[key], it) for key, it in resident.items())
    assert [eval_step(ready, batches[0])] * 2 == before, "nothing moved"
    streamed = [key for key in state if "layers.4." in key or "h.4." in key]
    with pytest.raises(UnsupportedError, match=r"nothing can be loaded over it\.\n.*load_state_dict with"):
        ready.model.load_state_dict({key: state[key] for key in streamed}, strict=False)
    with pytest.raises(UnsupportedError, match=r"load_state_dict with .*(embed_tokens|wte)"):
        ready.model.load_state_dict({key: it for key, it in state.items() if "embed" in key or "wte" in key})
    trained = {key: torch.zeros_like(it) for key, it in ready.trainable.items()}
    ready.model.load_state_dict(trained, strict=False)
    assert not any(it.any() for it in ready.trainable.values())


def test_the_state_of_a_simulated_model_has_none(models: dict[str, Path]) -> None:
    config = settings(models["llama"], {"adapter": {"rank": 4}})
    chosen = replace(a_policy(config, streamed=DEPTH, activations="keep"), stream_embeddings="both")
    states = [assemble(config, it, torch.device("meta")).model.state_dict()
              for it in (chosen, a_policy(config, streamed=0, activations="keep"))]  # fmt: skip
    shapes = [{key: (it.device.type, it.shape, it.dtype) for key, it in state.items()} for state in states]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("changes", [{"streamed_blocks": DEPTH}, {"stream_embeddings": "input"}])
def test_a_model_with_weights_below_the_device_is_not_copied(models: dict[str, Path], changes: dict[str, Any]) -> None:
    ready = equipped(
        settings(models["llama"], {"adapter": {"rank": 4}}), streamed=0, activations="recompute", **changes
    )
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        deepcopy(ready.model)


def test_generating_between_steps_changes_nothing(models: dict[str, Path]) -> None:
    config = settings(models["llama"], {"adapter": {"rank": 4}})
    ids = torch.arange(3, 11).view(1, 8)
    said = []
    for streamed in (0, DEPTH):
        ready = equipped(config, streamed=streamed, activations="keep")
        batches = FullBatches(config, a_policy(config, streamed=streamed, activations="keep"), vocabulary=100)
        first = train_step(ready, batches, lr=1e-2).loss
        ready.model.eval()
        with torch.inference_mode():
            tokens = ready.model.generate(ids, max_new_tokens=4, do_sample=False)
        said.append((first, tokens.tolist(), train_step(ready, batches, lr=1e-2).loss))
    assert said[0] == said[1]


def test_each_block_is_copied_once_for_each_pass(models: dict[str, Path]) -> None:
    copies: list[int] = []
    config = settings(models["llama"], {"adapter": {"rank": 4}, "data": {"packing": False, "seq_len": LENGTH}})
    with tiers(counting(copies)):
        ready = equipped(config, streamed=DEPTH, activations="some")
    batches = FullBatches(config, a_policy(config, streamed=DEPTH, activations="some"), vocabulary=100)
    train_step(ready, batches[:1], lr=1e-2)
    copies.clear()
    train_step(ready, batches[:1], lr=1e-2)
    # 0 and 1 lie there from the step before; 4 and 3 from the turn
    assert copies == [2, 3, 4, 2, 1, 0]
    copies.clear()
    for _ in range(2):
        eval_step(ready, batches[0])
    assert copies == [2, 3, 4, 0, 1, 2, 3, 4, 0], "evaluation goes forward only, and begins again"


def test_after_a_copy_that_failed_weights_are_asked_for_again(models: dict[str, Path]) -> None:
    class Failing(Poisoned):
        fails = False

        def read(self, block: int, into: Tensor) -> None:
            if self.fails:
                raise LowMemError("no such disk")
            super().read(block, into)

    config = settings(models["llama"], {"adapter": {"rank": 4}})
    expected = equipped(config, streamed=0, activations="keep")
    with tiers(Failing):
        ready = equipped(config, streamed=DEPTH, activations="keep")
    batches = FullBatches(config, a_policy(config, streamed=DEPTH, activations="keep"), vocabulary=100)
    Failing.fails = True
    for _ in range(2):
        with pytest.raises(LowMemError, match="no such disk"):
            eval_step(ready, batches[0])
    Failing.fails = False
    assert eval_step(ready, batches[0]) == eval_step(expected, batches[0])


def test_a_graph_that_backward_never_ran_is_given_back(tmp_path: Path) -> None:
    """As after a forward pass that was given up: what a block keeps for backward must not hold the graph itself. A plan
    traces the tiles of gpt-oss's experts, whose sigmoid keeps what it gave, one of them without a backward."""
    config = settings(save_tiny("gpt_oss", tmp_path), {"quant": QUANT["bf16"], "adapter": {"layers": [1]}})
    chosen = policy(
        rows=16, seq_len=LENGTH, depth=2, keep=2, resident_blocks=1, streamed_blocks=1, bits=16, quant="none"
    )
    stage = Stage(config, chosen, kind="cuda")
    before = stage.tracer.alive()
    gc.disable()
    try:
        stage.step(chosen, keep=2)
        assert stage.tracer.alive() == before
    finally:
        gc.enable()


def test_what_is_streamed_and_what_that_saves(models: dict[str, Path]) -> None:
    config = settings(models["llama"], {"adapter": {"rank": 4}})
    whole, streamed = (
        equipped(config, streamed=0, activations="recompute"),
        equipped(config, streamed=2, activations="recompute"),
    )
    pieces = [whole.below.streamable[index] for index in spread(DEPTH, 2)]
    names = {piece.path.split(".")[-2] for of_block in pieces for piece in of_block}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    moved = sum(piece.nbytes for of_block in pieces for piece in of_block)
    slot = max(block_bytes(of_block) for of_block in pieces)
    assert held(streamed.model) == held(whole.model) - moved + 2 * (slot + PAGE)


def held(model: torch.nn.Module) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("depth", "count"), [(5, 0), (5, 1), (5, 2), (5, 5), (32, 7), (80, 79)])
def test_streamed_blocks_lie_apart(depth: int, count: int) -> None:
    chosen = spread(depth, count)
    assert len(chosen) == count
    gaps = [b - a for a, b in zip([-1, *chosen], chosen, strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_matrix_that_is_trained_whole_cannot_be_streamed(models: dict[str, Path]) -> None:
    train = {"quant": {"bits": 16}, "adapter": {"rank": 4, "train_modules": ["q_proj"]}}
    with pytest.raises(UnsupportedError, match="trained whole"):
        equipped(settings(models["llama"], train), streamed=2, activations="recompute")


@pytest.mark.parametrize("bits", [4, 16])
def test_a_pass_that_ctrl_c_ends_leaves_nothing(bits: int, models: dict[str, Path]) -> None:
    """Whoever presses it in a notebook goes on in the same process: nothing holds its blocks then, nor their file."""
    config = settings(models["llama"], {"quant": {"bits": bits}})
    ready = equipped(config, streamed=2, activations="keep")
    batches = FullBatches(config, a_policy(config, streamed=2, activations="keep"), vocabulary=100)

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    norms = [it for it in ready.model.modules() if type(it).__name__.endswith("RMSNorm")]
    norms[-2].register_forward_pre_hook(pressed)  # of the last block
    with pytest.raises(KeyboardInterrupt):
        train_step(ready, batches, lr=1e-3)
    norm = weakref.ref(norms[-2])
    del ready, norms
    gc.collect()
    assert norm() is None
