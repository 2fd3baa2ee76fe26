"""LoRA on stacked expert weights, with the parameters of peft's `target_parameters`.

Letters in shapes: E experts, R and C rows and columns of a slice as stored, K rank, T tokens. "in" and "out" are
peft's: (R, C) of a slice where the experts module says `is_transposed`, else (C, R).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowmem_ft.adapters.lora import initial_factor, lora_linear, lora_scaling, module_device
from lowmem_ft.core.config import Init
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.experts import QuantStack, StackSlice, frozen_product, matrix_of, slices_of
from lowmem_ft.quant.linear import get_base_weight

_BATCHED = frozenset({torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__})


class DenseStack(nn.Module):
    """A frozen 3-D parameter (E, R, C) of unquantized experts behind the protocol of QuantStack.

    It holds the very parameter whose place it takes, and answers `stack[e]` and `torch.bmm(x, stack)`, so that the
    architecture's own eager forward reaches the adapter.
    """

    adapter: nn.Module | None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.adapter = weight, None

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def base_slice(self, e: int | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Slice `e`, (R, C) as stored; of G experts a copy of theirs, (G, R, C)."""
        return slices_of(self.weight.detach(), e).to(dtype or self.dtype)

    matmul = frozen_product

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int | Tensor) -> StackSlice:
        return StackSlice(cast(QuantStack, self), operator.index(e))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BATCHED and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x_ETI, stack = args
            return torch.stack([x_TI @ stack[e] for e, x_TI in enumerate(x_ETI)])
        raise UnsupportedError(
            f"LoRA on stacked experts does not support `{getattr(func, '__name__', func)}`",
            allowed="F.linear(x, stack[e]), x @ stack[e], torch.bmm(x, stack)",
            fix="set the model's experts implementation to 'eager', or leave the experts out of the targets",
        )


@get_base_weight.register
def _(module: DenseStack, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    if index is None:
        raise UnsupportedError("stacked experts are read one by one", allowed=f"index 0..{len(module) - 1}")
    return module.base_slice(index, dtype)


class LoraStack(nn.Module):
    """Low-rank updates of every slice of a stack; set as the stack's `adapter` it computes the slices' products.

    Args:
        stack: QuantStack or DenseStack, frozen.
        rank: K, of each expert.
        is_transposed: whether a slice is stored as (in, out); the experts module's attribute of that name.
        alpha, dropout, rslora, init, dtype: as for `LoraLinear`.

    Shapes, which are peft's: `lora_A` (K * E, in), expert by expert; `lora_B` (out, K * E), all experts' first rank,
    then all experts' second, and so on.
    """

    def __init__(
        self,
        stack: QuantStack | DenseStack,
        *,
        rank: int,
        alpha: float,
        is_transposed: bool,
        dropout: float = 0.0,
        rslora: bool = False,
        init: Init = "default",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.__dict__["stack"] = stack  # not a submodule: the stack holds this module
        self.experts, rows, columns = stack.shape
        self.in_features, self.out_features = (rows, columns) if is_transposed else (columns, rows)
        self.is_transposed, self.rank, self.alpha = is_transposed, rank, alpha
        self.dropout, self.rslora = dropout, rslora
        self.scaling = lora_scaling(rank, alpha, rslora=rslora)
        self.enabled = True
        self._splits_once = False
        self._factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        device = module_device(stack)
        ranks = rank * self.experts
        self.lora_A = nn.Parameter(
            initial_factor(ranks, self.in_features, rank=rank, init=init, dtype=dtype, device=device)
        )
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, ranks, dtype=dtype, device=device))
        self.train(stack.training)

    def forward(
        self,
        x: Tensor,
        e: int | tuple[int, ...],
        transposed: bool,
        bias: Tensor | None = None,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        unread: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """The adapted product of x (T, ...) with slice `e`: x @ W if `transposed`, else x @ W^T; plus `bias`.

        With G experts at once x is (G, T, ...), and all else has a leading G, too.

        Args:
            factors: A (K, in) and B (out, K) of the expert, instead of the module's own.
            unread, out: as of `lora_linear`.
        """
        stack: QuantStack | DenseStack = self.__dict__["stack"]
        if not self.enabled:
            return stack.matmul(x, e, transposed, bias, unread=unread, out=out)
        A_KI, B_OK = (slices_of(of, e) for of in self.factors()) if factors is None else factors
        if transposed != self.is_transposed:  # the product runs from peft's "out" to its "in"
            A_KI, B_OK = B_OK.mT, A_KI.mT
        weight = partial(matrix_of, stack, e, transposed)
        p = self.dropout if self.training else 0.0
        return lora_linear(x, A_KI, B_OK, bias, None, weight=weight, scaling=self.scaling, p=p, unread=unread, out=out)

    def attach(self, experts: nn.Module) -> list[RemovableHandle]:
        """Split the factors once for each forward of the module that owns the stack.

        One split for all experts has one backward, which writes each gradient once. A split for each expert would
        make a gradient of the size of all experts' factors for each of them.
        """
        return [
            experts.register_forward_pre_hook(self._before_forward),
            experts.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _before_forward(self, *_: object) -> None:
        self._splits_once = True

    def _after_forward(self, *_: object) -> None:
        self._splits_once, self._factors = False, None

    def factors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A (K, in) and B (out, K) of each expert."""
        factors = self._factors or self.split(self.lora_A, self.lora_B)
        if self._splits_once:
            self._factors = factors
        return factors

    def split(self, lora_A: Tensor, lora_B: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views of what is shaped as A and B, by expert: (K, in) and (out, K)."""
        A_EKI, B_EOK = self.stacked(lora_A, lora_B)
        return A_EKI.unbind(0), B_EOK.unbind(0)

    def stacked(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same views of all experts at once: (E, K, in) and (E, out, K)."""
        A_EKI = lora_A.view(self.experts, self.rank, self.in_features)
        return A_EKI, lora_B.view(self.out_features, self.rank, self.experts).permute(2, 0, 1)

    def draws(self) -> bool:
        """Whether it draws random numbers now."""
        return self.enabled and self.training and self.dropout > 0.0

    def extra_repr(self) -> str:
        return f"experts={self.experts}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
