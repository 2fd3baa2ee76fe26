"""Decoder and blocks are found in every architecture."""

import pytest
import torch
from torch import nn

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.runtime.blocks import find_blocks, find_decoder, stand_alone
from tests.models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_what_runs_between_embedding_and_head(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    path, blocks = find_blocks(model)
    assert model.get_submodule(path) is blocks
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    ran: list[nn.Module] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    ids = torch.randint(0, 131, (1, 5))
    with torch.no_grad():
        find_decoder(model)(input_ids=ids, use_cache=False)
    assert ran == list(blocks)


def test_path_counts_from_a_peft_wrapper() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    path, blocks = find_blocks(wrapped)
    assert wrapped.get_submodule(path) is blocks
    assert path.startswith("base_model.")


def test_lists_of_the_same_length_do_not_confuse() -> None:
    model = tiny_model("mixtral", num_hidden_layers=4)
    # as many projections beside the layers, and as many parts inside each layer
    find_decoder(model).projections = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    model.model.layers[0].parts = nn.ModuleList(nn.Linear(99, 99) for _ in range(4))
    assert find_blocks(model)[1] is model.model.layers


def test_layers_in_several_lists_are_refused() -> None:
    """As XLM has its attention beside its MLPs; the message says which lists there are."""
    model = tiny_model("llama")
    model.model.mlps = nn.ModuleList(layer.mlp for layer in model.model.layers)
    with pytest.raises(UnsupportedError, match=r"not found as one list[\s\S]*layers of 2, mlps of 2"):
        find_blocks(model)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedError, match="not found"):
        find_blocks(model)
    with pytest.raises(UnsupportedError, match="no decoder-only"):
        find_decoder(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_kv_shared_layers", 1), ("indexer_types", ["full", "shared"]), ("hidden_size_per_layer_input", 8)],
)
def test_blocks_that_need_others_do_not_stand_alone(name: str, value: object) -> None:
    model = tiny_model("llama")
    assert stand_alone(model)
    setattr(model.config, name, value)
    assert not stand_alone(model)
