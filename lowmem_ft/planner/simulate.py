"""A run on fake tensors: the trainer's own code, without weights and without the device that is planned for.

`assemble` and `train_step` run unchanged under FakeTensorMode. What lies on the device is on `meta`, what lies on the
host on `cpu`; where the device is a CPU both are the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_ft.assemble import assemble
from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Policy
from lowmem_ft.data.packing import Batch
from lowmem_ft.planner.scratch import scratch_of, whole_of
from lowmem_ft.planner.trace import Trace, Tracer
from lowmem_ft.runtime.blocks import find_blocks
from lowmem_ft.step import eval_step, train_step

# What a simulation cannot see: tables that libraries make once per process (bitsandbytes' codes: 1276 bytes measured),
# and what PyTorch's own code takes for a moment.
UNSEEN_BYTES = 4 << 10
BATCH_BYTES_PER_TOKEN = 28  # of a micro-batch: three int64 and an int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What a simulated run allocated, in bytes.

    Attributes:
        trace: of loading, one training step and one evaluation step.
        held: by the weights, the adapter, its gradients and the optimizer, before the step.
        train_peak, eval_peak: the most held at once, on the device and the host together.
        unseen: what is in both peaks beside the trace's own.
    """

    trace: Trace
    held: int
    train_peak: int
    eval_peak: int
    unseen: int

    def holders(self) -> dict[str, int]:
        """Bytes at the training peak that the step itself holds: `activations`, `loss` and `workspace`."""
        found = {"activations": self.unseen, "loss": 0, "workspace": 0}
        for event in self.trace.alive_at_peak():
            if event.inside:
                found["workspace"] += event.nbytes
            elif event.phase == "loss":
                found["loss"] += event.nbytes
            elif event.phase != "load":
                found["activations"] += event.nbytes
        return found


def simulate(
    config: RunConfig, policy: Policy, *, kind: Literal["cpu", "cuda"], loss_tokens: int | None = None
) -> Simulation:
    """Run one step of `config` under `policy` on fake tensors.

    The step has one micro-batch: all of them allocate the same, and what the others hold (their token ids) is added.

    Args:
        kind: of the device that is planned for.
        loss_tokens: of each micro-batch; by default all of its tokens, which is the most.
    """
    tracer = Tracer(scratch_of(kind), whole_of(kind))
    with FakeTensorMode(allow_non_fake_inputs=True), tracer:
        ready = assemble(config, policy, torch.device("meta"))
        held = sum(event.nbytes for event in tracer.trace.events)
        with _marked(tracer, ready.model), torch.device("cpu"):
            tracer.phase = "forward"
            batch = _batch(config, policy, kind, loss_tokens)
            train_step(ready, [batch], lr=1e-4)
            trained = len(tracer.trace.events)
        tracer.phase, tracer.block = "eval", None
        with torch.device("cpu"):
            eval_step(ready, batch)
    levels = list(tracer.trace.curve())
    others = (policy.accumulation - 1) * policy.micro_batch_tokens * BATCH_BYTES_PER_TOKEN
    unseen = UNSEEN_BYTES + others
    return Simulation(
        trace=tracer.trace,
        held=held,
        train_peak=max(levels[:trained]) + unseen,
        eval_peak=max(levels[trained:]) + unseen,
        unseen=unseen,
    )


def _batch(config: RunConfig, policy: Policy, kind: str, loss_tokens: int | None) -> Batch:
    """A full micro-batch; where the device is the CPU it lies there already."""
    length = config.data.seq_len
    shape = (max(1, policy.micro_batch_tokens // length), length)
    count = shape[0] * shape[1]
    device = "meta" if kind == "cpu" else "cpu"
    names: dict[str, Any] = {"input_ids": torch.int64, "labels": torch.int64, "position_ids": torch.int64}
    tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, dtype in names.items()}
    return Batch(
        **tensors,
        segment_ids=torch.zeros(shape, dtype=torch.int32, device=device),
        tokens=count,
        loss_tokens=count if loss_tokens is None else loss_tokens,
        packed=config.data.packing,
    )


@contextmanager
def _marked(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Within it the tracer knows which block is at work, in forward and in backward."""
    blocks = list(find_blocks(model)[1])

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            tracer.block = index

        return hook

    def leave(index: int) -> Any:
        def arrived(_: Any) -> None:
            tracer.phase, tracer.block = "backward", index

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tracer.block = None
            if tracer.phase == "forward" and index == len(blocks) - 1:
                tracer.phase = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(hidden) and hidden.requires_grad:
                hidden.register_hook(arrived)  # type: ignore[no-untyped-call]

        return hook

    handles = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leave(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
