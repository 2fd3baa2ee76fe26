"""The weights that a policy has below the device: those of streamed blocks, and embeddings and output head."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_ft.core.plan import Policy
from lowmem_ft.runtime.shelf import Shelf
from lowmem_ft.runtime.streaming import Streaming, holders_of, spread, streamable
from lowmem_ft.runtime.tiers import DiskTier, HostTier, StagedDiskTier, TakingTier, Tier, refuse_copy
from lowmem_ft.runtime.vocabulary import Matrix, StreamedVocabulary, chosen, matrices_of, refuse_trained, table_of

_TURN = "_turn_of_its_calls"  # the attribute of a model that is called by one thread at a time


class Below:
    """Where a model's weights lie under a policy: `place` as they load, then `attach`, then `attach_to_adapters`.

    Args:
        model: without weights, its quantized layers in place.
        device: where it computes; what is below it is pinned host memory or a file, below a CPU a file.
        folder: of files that have no name.

    Attributes:
        streamable: what can be streamed of each block.
        matrices: embeddings and output head, which can be, too.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, device: torch.device, folder: Path) -> None:
        self._model, self._device, self._folder = model, device, folder
        self._equipped: nn.Module = model
        self.streamable, self.matrices = streamable(model), matrices_of(model)
        self._streaming = self._blocks(policy)
        self._vocabulary = self._tables(policy, self.matrices)

    @property
    def tables(self) -> set[str]:
        """Names of the tensors that lie below as tables of rows."""
        return {name for matrix in self._vocabulary.matrices for name in matrix.names}

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that was loaded, on the device, or what stands for it there if it goes below."""
        below = self._vocabulary.place(name, tensor)
        if below is None and self._streaming is not None:
            below = self._streaming.place(name, tensor)
        return tensor.to(self._device) if below is None else below

    def attach(self) -> None:
        """Let the model find its weights, now that they are loaded."""
        self._holders = holders_of(self._model, self.streamable)
        if self._streaming is not None:
            self._streaming.attach(self._holders)
        self._vocabulary.attach()

    def attach_to_adapters(self, equipped: nn.Module) -> None:
        """The same for what adapters read of them, in the model with its adapter.

        Raises:
            UnsupportedError: weights are trained that lie below.
        """
        self._equipped = equipped
        if self._streaming is not None:
            self._streaming.attach_to_adapters()
        refuse_trained(equipped, self._vocabulary.matrices)

    def follow(self, policy: Policy) -> None:
        """Put more of the weights below, as another policy says; what lies there stays.

        Raises:
            UnsupportedError: weights are trained that it streams; they stay then.
        """
        # blocks do not come back, also where an attempt to follow a policy ended after they went down
        if policy.streamed_blocks > (0 if self._streaming is None else len(self._streaming.blocks)):
            wider = self._blocks(policy)
            assert wider is not None, "it has blocks"
            wider.take_over(self._holders, self._streaming)
            self._streaming = wider
        still = [it for it in self.matrices if table_of(it.embedding or it.head) is None]
        self._tables(policy, still).take_over(self._equipped)

    def shelf(self, count: int) -> Shelf:
        """For the inputs of so many blocks, which a step puts there and takes back."""

        def open_tier(sizes: list[int]) -> TakingTier:
            if self._device.type != "cpu":
                return HostTier(sizes, self._device)
            words = {"holds": "inputs of blocks", "instead": "set policy.activations: recompute"}
            return DiskTier(self._folder, sizes, **words)

        return Shelf(count, open_tier)

    def _blocks(self, policy: Policy) -> Streaming | None:
        blocks = {index: self.streamable[index] for index in spread(len(self.streamable), policy.streamed_blocks)}
        if not blocks:
            return None
        return Streaming(self._model, blocks, device=self._device, open_tier=self._tier(policy.stream_from))

    def _tables(self, policy: Policy, matrices: Sequence[Matrix]) -> StreamedVocabulary:
        streamed = chosen(matrices, policy.stream_embeddings)
        return StreamedVocabulary(streamed, device=self._device, open_tier=self._tier(policy.stream_from))

    def _tier(self, tier: Literal["host", "disk"]) -> Callable[[list[int]], Tier]:
        """Opens that tier; below a CPU it is the disk."""

        def open_tier(sizes: list[int]) -> Tier:
            if self._device.type == "cpu":
                return DiskTier(self._folder, sizes)
            if tier == "host":
                return HostTier(sizes, self._device)
            return StagedDiskTier(self._folder, sizes, self._device)

        return open_tier


def call_one_at_a_time(model: Any) -> None:
    """Let each call of `model` wait for the one before it, of whichever thread: two would bring their weights up into
    the same slots, and compute with each other's. A backward pass is no call: one thread alone can train."""
    model.__class__ = _in_turns(type(model))  # type: ignore[arg-type]
    setattr(model, _TURN, threading.RLock())


@functools.cache
def _in_turns(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, whose objects hold their lock while they are called: hooks of the module would keep it after Ctrl-C."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[_TURN]:
            return cls.__call__(self, *args, **kwargs)

    own = {"__call__": call, "__module__": cls.__module__, "__reduce_ex__": refuse_copy}
    return type(cls.__name__, (cls,), own)
