"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with 32-bit or block-wise 8-bit state (Dettmers et al. 2022,
arXiv:2110.02861), for parameters in bf16 that must not lose small steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from lowmem_ft.core.errors import CheckpointError, ConfigError
from lowmem_ft.runtime.moments import BLOCK, code
from lowmem_ft.runtime.state import fill
from lowmem_ft.runtime.together import follows, joined

_MIN_8BIT = 4096  # as in bitsandbytes: smaller tensors keep fp32 state
_MIN_PAGED = 100_000  # as in bitsandbytes: paging smaller tensors saves nothing
# Elements updated at a time; results do not depend on it. On a CPU so many stay in its cache (slices of 2^18 are 7%
# faster, and take 8 MB instead of 2), on a card a slice of bf16 is seven calls, takes 8 MiB, and is as long as a run:
# with a quarter of that, and twelve calls each, updates took 40 of the 282 ms of a step of 2048 tokens on an H200 (8B)
SLICE, SLICE_ON_CARD = 1 << 16, 1 << 21
_SMALLEST_SLICE = _MIN_8BIT
# That an update on the host takes at most beside its state: 9 MiB measured (8 bits, bf16), and a slice of gradients
HOST_WORK_BYTES = 12 << 20


@dataclass(frozen=True, slots=True)
class _Run:
    """Parameters of a group that lie one behind the other, with state that does so, too; or a single one.

    Attributes:
        first: number of the first among all parameters.
        starts: where each begins, in elements.
        state: of all of them, by name, each tensor flat.
    """

    group: dict[str, Any]
    first: int
    parameters: list[nn.Parameter]
    starts: list[int]
    state: dict[str, Tensor]


class AdamW(torch.optim.Optimizer):
    """AdamW whose every update is done in fp32, whatever the parameter's dtype.

    fp32 parameters are updated as by `torch.optim.AdamW` (bits=32) or `bitsandbytes.optim.AdamW8bit` (bits=8, but for
    what `runtime.moments` says). The value of a bf16 parameter is held as two 16-bit numbers: the parameter itself and
    a *remainder* of 16 bits, which together are one exact fp32 number. No update is lost, for 2 bytes per parameter
    where fp32 masters take 4. How far the learned update is from that of fp32 adapters (`benchmarks/bf16_updates.py`:
    100 steps at 2e-4, 32-bit state; rounding of the forward alone makes 0.44%): this split 0.64%, masters 0.63%, a
    Kahan compensation in bf16 0.64% (also 2 bytes, not exact), stochastic rounding 2.2% (no bytes), plain bf16 updates
    6.0%. fp16 parameters, whose exponent differs from that of fp32, get an fp32 master.

    All state is allocated here, not in the first step. Neighbours that lie together (`runtime.together`) have state
    that does so, too, and are updated together. An error in a step, such as one of memory, leaves whole slices of
    parameters updated and the others untouched, and `resume` goes on with these.

    Args:
        groups: parameters, or dicts as in torch. A group's own `lr` keeps its ratio to `lr` in `set_lr` (LoRA+).
        lr: learning rate of groups that have none.
        betas, eps, weight_decay: as in `torch.optim.AdamW`, but for a decay of 0.
        bits: size of the two moments.
        paged: on CUDA, moments in managed memory, which the driver moves to the host when the device runs out.
        on_host: all state lies in host RAM, and the host updates (as in ZeRO-Offload, Ren et al. 2021,
            arXiv:2101.06840, but here a step waits for it): slice by slice gradients and values go down and new values
            come up. Equal bit by bit to an update of parameters on the CPU.
        on_card: whether the parameters' device is a card; to be told of parameters without data.

    Attributes:
        slice_elements: updated at a time, a multiple of 4096.
        guarded: whether a slice is copied first, because a kernel that takes memory may fail in the middle of it. On a
            card none does: all that an update takes is taken before anything changes.
        runs: parameters that are updated together where all have gradients.

    Raises:
        ConfigError: a value that AdamW cannot have, or a parameter that is not a dense floating-point tensor.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: Literal[32, 8] = 32,
        paged: bool = False,
        on_host: bool = False,
        on_card: bool | None = None,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                "AdamW cannot work with these values.",
                given=f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}",
                allowed="lr, eps, weight_decay >= 0 and 0 <= beta < 1",
            )
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bits, self.paged, self.on_host = bits, paged, on_host
        # where the last step ended with an error: which parameter, the first element from there on to do
        self._stopped = 0, 0
        self._codes: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:
            group["lr_ratio"] = group["lr"] / lr if lr > 0 else 1.0
        parameters = list(self._parameters())
        self.guarded = on_host or not (all(p.device.type == "cuda" for p in parameters) if on_card is None else on_card)
        self.slice_elements = SLICE if self.guarded else SLICE_ON_CARD
        if paged and (on_host or any(p.device.type == "cpu" for p in parameters)):
            warnings.warn("Paging does not exist on the CPU: the optimizer's state stays in RAM.", stacklevel=2)
            self.paged = False
        self._runs = list(self._new_runs())

    def set_lr(self, lr: float) -> None:
        """Set the base learning rate; every group keeps its ratio to it."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_ratio"]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        gradient: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.grad,
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: as in torch: evaluates the model again and returns the loss.
            gradient: where to find a parameter's gradient, such as `GradientAccumulator.gradient`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stopped = 0, 0  # of a step that nobody went on with
        self.resume(gradient=gradient)
        return loss

    @torch.no_grad()
    def resume(self, *, gradient: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Go on with a step that an error has ended, with the same gradients and learning rates."""
        done = self._stopped[0]
        for run in self._runs:
            for members, gradients in self._together(run, gradient, done):
                self._update(run, members, gradients, start=self._stopped[1])
                self._stopped = run.first + members.stop, 0
        self._stopped = 0, 0
        for device in {it.device for it in self._parameters() if self.paged and it.is_cuda}:
            torch.cuda.synchronize(device)  # the host may look at managed memory only after the device is done with it

    def halve_slices(self) -> bool:
        """Take less memory for a moment from now on; False if it is little already."""
        if self.slice_elements <= _SMALLEST_SLICE:
            return False
        self.slice_elements //= 2
        return True

    def state_tensors(self) -> dict[str, Tensor]:
        """All state by name ("3.state1": of the fourth parameter), as it is held: copy it or write it at once."""
        return {
            f"{index}.{name}": value
            for index, parameter in enumerate(self._parameters())
            for name, value in self.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def held(self) -> list[Tensor]:
        """All that it holds: the state, and the tables of 8-bit codes."""
        state = chain.from_iterable(run.state.values() for run in self._runs)
        return [*state, *chain.from_iterable(self._codes.values())]

    def state_meta(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it: step counts and the groups' settings."""
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.param_groups]
        steps = [self.state[parameter]["step"] for parameter in self._parameters()]
        return {"bits": self.bits, "steps": steps, "groups": groups}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, settings: bool = True) -> None:
        """Go on from a saved state, exactly.

        Args:
            settings: whether the groups' settings, such as weight decay, are those that were saved, too.

        Raises:
            CheckpointError: it belongs to other parameters or to another kind of AdamW; nothing was changed.
        """
        own, parameters = self.state_tensors(), list(self._parameters())
        bad = sorted(own.keys() ^ tensors.keys())
        bad += sorted(k for k in own.keys() & tensors.keys() if _kind(own[k]) != _kind(tensors[k]))
        if bad or len(meta["steps"]) != len(parameters) or len(meta["groups"]) != len(self.param_groups):
            raise CheckpointError(
                "The optimizer state belongs to other parameters or to another optimizer.",
                given=f"{meta['bits']}-bit state of {len(meta['steps'])} parameters; at odds: {', '.join(bad[:5])}",
                allowed=f"{self.bits}-bit state of {len(parameters)} parameters",
                fix="resume with the adapter and optimizer settings that the run was started with",
            )
        for name, tensor in own.items():
            fill(tensor, tensors, name)
        for parameter, step in zip(parameters, meta["steps"], strict=True):
            self.state[parameter]["step"] = int(step)
        for group, saved in zip(self.param_groups, meta["groups"], strict=True) if settings else ():
            group.update({name: tuple(value) if name == "betas" else value for name, value in saved.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.state_tensors(), "meta": self.state_meta()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch's own would round the moments to the dtype of the parameter
        self.load_state(state_dict["tensors"], state_dict["meta"])

    def _parameters(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def runs(self) -> list[list[nn.Parameter]]:
        return [run.parameters for run in self._runs]

    def _new_runs(self) -> Iterator[_Run]:
        """All parameters with new state, which each of them finds in `self.state` as views of its run's."""
        first = 0
        for group in self.param_groups:
            members: list[nn.Parameter] = []
            for parameter in [*group["params"], None]:
                if members and not (parameter is not None and self._goes_with(members[-1], parameter)):
                    yield self._new_run(group, first, members)
                    first, members = first + len(members), []
                if parameter is not None:
                    members.append(parameter)

    def _goes_with(self, before: nn.Parameter, parameter: nn.Parameter) -> bool:
        kinds = [(self._has_8_bits(it), self._pages(it)) for it in (before, parameter)]
        return kinds[0] == kinds[1] and not self._pages(parameter) and follows(before, parameter)

    def _has_8_bits(self, parameter: nn.Parameter) -> bool:
        return self.bits == 8 and parameter.numel() >= _MIN_8BIT

    def _new_run(self, group: dict[str, Any], first: int, parameters: list[nn.Parameter]) -> _Run:
        for parameter in parameters:
            if not (parameter.is_floating_point() and parameter.is_contiguous()):
                raise ConfigError(
                    "This parameter cannot be trained.",
                    given=f"{parameter.dtype}, shape {tuple(parameter.shape)}, strides {parameter.stride()}",
                    allowed="contiguous tensors of fp32, bf16 or fp16",
                )
        whole = joined(parameters)
        elements, device = whole.numel(), self._place(whole)
        eight, pages = self._has_8_bits(parameters[0]), self._pages(parameters[0])
        dtype = torch.uint8 if eight else torch.float32
        state = {name: self._moment(whole, dtype, pages) for name in ("state1", "state2")}
        if eight:
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(-(-elements // BLOCK), dtype=torch.float32, device=device)
            if device not in self._codes:
                self._codes[device] = code(signed=True).to(device), code(signed=False).to(device)
        if whole.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros(elements, dtype=torch.int16, device=device)
        elif whole.dtype != torch.float32:
            master = torch.empty(elements, dtype=torch.float32, device=device)
            state["master"] = master if whole.is_meta else master.copy_(whole)
        starts = [int(parameter.storage_offset() - whole.storage_offset()) for parameter in parameters]
        for parameter, start in zip(parameters, starts, strict=True):
            self.state[parameter] = {"step": 0, **_state_of(state, slice(start, start + parameter.numel()))}
        return _Run(group, first, parameters, starts, state)

    def _place(self, tensor: Tensor) -> torch.device:
        """Where its state lies and its updates are computed."""
        return torch.device("cpu") if self.on_host else tensor.device

    def _pages(self, parameter: nn.Parameter) -> bool:
        return self.paged and parameter.numel() >= _MIN_PAGED

    def _moment(self, flat: Tensor, dtype: torch.dtype, pages: bool) -> Tensor:
        if not pages:
            return torch.zeros(flat.numel(), dtype=dtype, device=self._place(flat))
        if flat.device.type != "cuda":  # simulated: counted as host memory
            return torch.zeros(flat.numel(), dtype=dtype, device="cpu")
        with torch.cuda.device(flat.device):  # whose context manages the memory
            paged: Tensor = bnb.get_paged(flat.numel(), dtype=dtype, device=flat.device)
        return paged.zero_()

    def _together(
        self, run: _Run, gradient: Callable[[nn.Parameter], Tensor | None], done: int
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """Members of `run` from number `done` on, with their gradients: those of which each lies behind the one before,
        as its gradient does, and has made as many steps. Who has no gradient is left out."""
        gradients: list[Tensor] = []
        first = max(0, done - run.first)
        for at in range(first, len(run.parameters)):
            grad = gradient(run.parameters[at])
            if gradients and (grad is None or not self._fits(run.parameters[at - 1 : at + 1], gradients[-1], grad)):
                yield range(first, at), gradients
                gradients = []
            if grad is not None:
                first = first if gradients else at
                gradients.append(grad)
        if gradients:
            yield range(first, first + len(gradients)), gradients

    def _fits(self, pair: list[nn.Parameter], *gradients: Tensor) -> bool:
        steps = [self.state[parameter]["step"] for parameter in pair]
        return steps[0] == steps[1] and follows(*pair) and follows(*gradients)

    def _update(self, run: _Run, members: range, gradients: list[Tensor], *, start: int) -> None:
        """One step of some parameters, slice by slice from element `start` on."""
        parameters = run.parameters[members.start : members.stop]
        if not (self.on_host and parameters[0].is_meta):  # work on real numbers, which takes nothing of the device
            state = _state_of(run.state, slice(run.starts[members.start], None))
            for moment in (run.state["state1"], run.state["state2"]):
                if getattr(moment, "is_paged", False):
                    bnb.prefetch_tensor(moment)
            step = self.state[parameters[0]]["step"] + 1
            self._update_flat(joined(parameters), joined(gradients), state, run.group, step, start)
        for parameter in parameters:
            self.state[parameter]["step"] += 1

    def _update_flat(
        self, flat: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int, start: int
    ) -> None:
        while start < flat.numel():
            here = slice(start, min(start + self.slice_elements, flat.numel()))
            own = _state_of(state, here)
            value, grad = flat[here], gradient[here].float()
            held = [value, *own.values()]
            before = [tensor.clone() for tensor in held] if self.guarded else []
            try:
                below = value.to("cpu", copy=True) if self.on_host else value
                self._update_slice(below, grad.to(below.device), own, group, step)
                if self.on_host:
                    value.copy_(below)
            except BaseException:
                for tensor, values in zip(held, before, strict=False):
                    tensor.copy_(values)  # which takes no memory
                raise
            start = here.stop
            self._stopped = self._stopped[0], start

    def _update_slice(
        self, value: Tensor, grad: Tensor, own: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        if "master" in own:
            self._adam(own["master"], grad, own, group, step)
            value.copy_(own["master"])
        elif "remainder" in own:
            whole = join_bf16(value, own["remainder"])
            self._adam(whole, grad, own, group, step)
            split_bf16(whole, value, own["remainder"])
        else:
            self._adam(value, grad, own, group, step)

    def _adam(self, value: Tensor, grad: Tensor, own: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        """Kernels on an fp32 slice of a parameter; they change `value` and its state in place."""
        (beta1, beta2), moment1, moment2 = group["betas"], own["state1"], own["state2"]
        eps, decay, lr = group["eps"], group["weight_decay"], group["lr"]
        if moment1.dtype == torch.uint8 and (self.guarded if value.is_meta else value.device.type == "cpu"):
            torch.ops.lowmem_ft.adam_8bit(
                *(value, grad, moment1, moment2, own["absmax1"], own["absmax2"], *self._codes[value.device]),
                *(beta1, beta2, eps, decay, lr, step),
            )
            return
        # bitsandbytes' operators themselves: slices of paged tensors would not pass their wrapper's check of devices.
        # Left at rest: update-norm clipping (None, 0, 0), beta3 and alpha of AdEMAMix (0, 0), gradient scale (1)
        if moment1.dtype == torch.uint8:
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                *("adam", grad, value, moment1, moment2, beta1, beta2, 0.0, 0.0, eps, step, lr),
                *(*self._codes[value.device], own["absmax1"], own["absmax2"], decay, 1.0),
            )
        else:
            torch.ops.bitsandbytes.optimizer_update_32bit(
                *("adam", grad, value, moment1, moment2, None, 0.0, 0.0, beta1, beta2, 0.0, 0.0),
                *(eps, decay, step, lr, 1.0),
            )


def join_bf16(value: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 numbers whose halves are `value` (bf16) and `remainder` (int16)."""
    # the same 16 bits as an integer, moved up: the bf16 number itself as fp32
    return remainder.to(torch.int32).add_(value.view(torch.int16), alpha=1 << 16).view(torch.float32)


def split_bf16(whole: Tensor, value: Tensor, remainder: Tensor) -> None:
    """Inverse of `join_bf16`, exactly: `value` becomes the nearest bf16, `remainder` what is missing to `whole`.

    Ties go away from zero, not to even as usual: so the remainder always lies in [-2^15, 2^15) and fits. `whole` is
    used up. No memory is taken.
    """
    bits = whole.view(torch.int32)
    remainder.copy_(bits)  # the lower half: what is missing to the nearest number that has zeros there, as int16 wraps
    value.view(torch.int16).copy_(bits.add_(1 << 15).bitwise_right_shift_(16))


def _state_of(state: Mapping[str, Tensor], here: slice) -> dict[str, Tensor]:
    """The state of a slice of what it belongs to, as views."""
    blocks = slice(here.start // BLOCK, None if here.stop is None else -(-here.stop // BLOCK))
    return {name: value[blocks if name.startswith("absmax") else here] for name, value in state.items()}


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
