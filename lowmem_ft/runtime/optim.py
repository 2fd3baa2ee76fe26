"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with 32-bit or block-wise 8-bit state (Dettmers et al. 2022,
arXiv:2110.02861), for parameters in bf16 that must not lose small steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from lowmem_ft.core.errors import CheckpointError, ConfigError

_BLOCK = 256  # elements that share one scale in bitsandbytes' 8-bit state
_MIN_8BIT = 4096  # as in bitsandbytes: smaller tensors keep fp32 state
_MIN_PAGED = 100_000  # as in bitsandbytes: paging smaller tensors saves nothing
SLICE = 1 << 18  # elements updated at a time (1 MiB in fp32); results do not depend on it
_SMALLEST_SLICE = _MIN_8BIT
# That an update on the host takes at most beside its state: 9 MiB measured (8 bits, bf16), and a slice of gradients
HOST_WORK_BYTES = 12 << 20


class AdamW(torch.optim.Optimizer):
    """AdamW whose every update is done in fp32, whatever the parameter's dtype.

    fp32 parameters are updated as by `torch.optim.AdamW` (bits=32) or `bitsandbytes.optim.AdamW8bit` (bits=8). The
    value of a bf16 parameter is held as two 16-bit numbers: the parameter itself and a *remainder* of 16 bits, which
    together are one exact fp32 number. No update is lost, for 2 bytes per parameter where fp32 masters take 4. How far
    the learned update is from that of fp32 adapters (`benchmarks/bf16_updates.py`: 100 steps at 2e-4, 32-bit state;
    rounding of the forward alone makes 0.44%): this split 0.64%, masters 0.63%, a Kahan compensation in bf16 0.64%
    (also 2 bytes, not exact), stochastic rounding 2.2% (no bytes), plain bf16 updates 6.0%. fp16 parameters, whose
    exponent differs from that of fp32, get an fp32 master.

    All state is allocated here, not in the first step. An error in a step, such as one of memory, leaves whole slices
    of parameters updated and the others untouched, and `resume` goes on with these.

    Args:
        groups: parameters, or dicts as in torch. A group's own `lr` keeps its ratio to `lr` in `set_lr` (LoRA+).
        lr: learning rate of groups that have none.
        betas, eps, weight_decay: as in `torch.optim.AdamW`, but for a decay of 0.
        bits: size of the two moments.
        paged: on CUDA, moments in managed memory, which the driver moves to the host when the device runs out.
        on_host: all state lies in host RAM, and the host updates (as in ZeRO-Offload, Ren et al. 2021,
            arXiv:2101.06840, but here a step waits for it): slice by slice gradients and values go down and new values
            come up. Equal bit by bit to an update of parameters on the CPU.

    Attributes:
        slice_elements: updated at a time, a multiple of 4096.
        guarded: whether a slice is copied first, because a kernel that takes memory may fail in the middle of it. On a
            card none does: all that an update takes is taken before anything changes.

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
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                "AdamW cannot work with these values.",
                given=f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}",
                allowed="lr, eps, weight_decay >= 0 and 0 <= beta < 1",
            )
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bits, self.paged, self.on_host, self.slice_elements = bits, paged, on_host, SLICE
        self._stopped = 0, 0  # where the last step ended with an error: which parameter, its first element to do
        self._codes: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:
            group["lr_ratio"] = group["lr"] / lr if lr > 0 else 1.0
        parameters = list(self._parameters())
        self.guarded = on_host or any(p.device.type != "cuda" for p in parameters)
        if paged and (on_host or any(p.device.type == "cpu" for p in parameters)):
            warnings.warn("Paging does not exist on the CPU: the optimizer's state stays in RAM.", stacklevel=2)
            self.paged = False
        for parameter in parameters:
            self.state[parameter] = self._new_state(parameter)

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
        first = self._stopped[0]
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for index, (parameter, group) in enumerate(pairs[first:], start=first):
            grad = gradient(parameter)
            if grad is not None:
                self._update(parameter, grad, group, start=self._stopped[1])
            self._stopped = index + 1, 0
        self._stopped = 0, 0
        if self.paged and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # the host may look at managed memory only after the device is done with it

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
        return [*self.state_tensors().values(), *chain.from_iterable(self._codes.values())]

    def state_meta(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it: step counts and the groups' settings."""
        groups = [{name: value for name, value in g.items() if name != "params"} for g in self.param_groups]
        steps = [self.state[parameter]["step"] for parameter in self._parameters()]
        return {"bits": self.bits, "steps": steps, "groups": groups}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go on from a saved state, exactly.

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
            tensor.copy_(tensors[name])
        for parameter, step in zip(parameters, meta["steps"], strict=True):
            self.state[parameter]["step"] = int(step)
        for group, saved in zip(self.param_groups, meta["groups"], strict=True):
            group.update({name: tuple(value) if name == "betas" else value for name, value in saved.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.state_tensors(), "meta": self.state_meta()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch's own would round the moments to the dtype of the parameter
        self.load_state(state_dict["tensors"], state_dict["meta"])

    def _parameters(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        if not (parameter.is_floating_point() and parameter.is_contiguous()):
            raise ConfigError(
                "This parameter cannot be trained.",
                given=f"{parameter.dtype}, shape {tuple(parameter.shape)}, strides {parameter.stride()}",
                allowed="contiguous tensors of fp32, bf16 or fp16",
            )
        elements, device = parameter.numel(), self._place(parameter)
        eight = self.bits == 8 and elements >= _MIN_8BIT
        dtype = torch.uint8 if eight else torch.float32
        state: dict[str, Any] = {"step": 0, "state1": self._moment(parameter, dtype)}
        state["state2"] = self._moment(parameter, dtype)
        if eight:
            for name in ("absmax1", "absmax2"):
                state[name] = torch.zeros(-(-elements // _BLOCK), dtype=torch.float32, device=device)
            if device not in self._codes:
                self._codes[device] = _code(device, signed=True), _code(device, signed=False)
        if parameter.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros(elements, dtype=torch.int16, device=device)
        elif parameter.dtype != torch.float32:
            master = torch.empty(elements, dtype=torch.float32, device=device)
            state["master"] = master if parameter.is_meta else master.copy_(parameter.detach().view(-1))
        return state

    def _place(self, parameter: nn.Parameter) -> torch.device:
        """Where its state lies and its updates are computed."""
        return torch.device("cpu") if self.on_host else parameter.device

    def _pages(self, parameter: nn.Parameter) -> bool:
        return self.paged and parameter.numel() >= _MIN_PAGED

    def _moment(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        elements = parameter.numel()
        if not self._pages(parameter):
            return torch.zeros(elements, dtype=dtype, device=self._place(parameter))
        if parameter.device.type != "cuda":  # simulated: counted as host memory
            return torch.zeros(elements, dtype=dtype, device="cpu")
        paged: Tensor = bnb.get_paged(elements, dtype=dtype, device=parameter.device)
        return paged.zero_()

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], *, start: int) -> None:
        """One step of one parameter, slice by slice from element `start` on."""
        state = self.state[parameter]
        if self.on_host and parameter.is_meta:  # it would be work on real numbers, and takes nothing of the device
            state["step"] += 1
            return
        for moment in (state["state1"], state["state2"]):
            if getattr(moment, "is_paged", False):
                bnb.prefetch_tensor(moment)
        flat, gradient = parameter.detach().view(-1), gradient.reshape(-1)
        while start < flat.numel():
            here = slice(start, min(start + self.slice_elements, flat.numel()))
            own = _state_of(state, here)
            value, grad = flat[here], gradient[here].float()
            held = [value, *own.values()]
            before = [tensor.clone() for tensor in held] if self.guarded else []
            try:
                below = value.to("cpu", copy=True) if self.on_host else value
                self._update_slice(below, grad.to(below.device), own, group, state["step"] + 1)
                if self.on_host:
                    value.copy_(below)
            except BaseException:
                for tensor, values in zip(held, before, strict=False):
                    tensor.copy_(values)  # which takes no memory
                raise
            start = here.stop
            self._stopped = self._stopped[0], start
        state["step"] += 1

    def _update_slice(
        self, value: Tensor, grad: Tensor, own: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        if "master" in own:
            self._adam(own["master"], grad, own, group, step)
            value.copy_(own["master"])
        elif "remainder" in own:
            whole = join_bf16(value, own["remainder"])
            scratch = torch.empty_like(whole, dtype=torch.int32)  # now, when nothing has changed yet
            self._adam(whole, grad, own, group, step)
            split_bf16(whole, value, own["remainder"], scratch)
        else:
            self._adam(value, grad, own, group, step)

    def _adam(self, value: Tensor, grad: Tensor, own: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
        """bitsandbytes' kernels on an fp32 slice of a parameter; they change `value` and its state in place."""
        (beta1, beta2), moment1, moment2 = group["betas"], own["state1"], own["state2"]
        eps, decay, lr = group["eps"], group["weight_decay"], group["lr"]
        # the operators themselves, since slices of paged tensors would not pass their wrapper's check of devices.
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
    return value.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(remainder).view(torch.float32)


def split_bf16(whole: Tensor, value: Tensor, remainder: Tensor, scratch: Tensor) -> None:
    """Inverse of `join_bf16`, exactly: `value` becomes the nearest bf16, `remainder` what is missing to `whole`.

    Ties go away from zero, not to even as usual: so the remainder always lies in [-2^15, 2^15) and fits. `whole` is
    used up, and so is `scratch`, as many int32. No memory is taken.
    """
    bits = whole.view(torch.int32)
    upper = torch.add(bits, 1 << 15, out=scratch).bitwise_right_shift_(16)
    value.view(torch.int16).copy_(upper)
    remainder.copy_(bits.sub_(upper.bitwise_left_shift_(16)))


def _state_of(state: dict[str, Any], here: slice) -> dict[str, Tensor]:
    """The state of a slice of a parameter, as views."""
    blocks = slice(here.start // _BLOCK, -(-here.stop // _BLOCK))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value[blocks if name.startswith("absmax") else here] for name, value in tensors.items()}


def _code(device: torch.device, *, signed: bool) -> Tensor:
    """bitsandbytes' dynamic 8-bit code: 256 fp32 values."""
    with torch.device("cpu"):
        values: Tensor = bnb.create_dynamic_map(signed=signed)
    return values.to(device)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
