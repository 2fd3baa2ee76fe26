"""The matrices with a row for each token, below the device: input embeddings and the output head.

Of a large vocabulary they are larger than many blocks: 2.1 GB of an 8B model whose blocks take 3.9 GB in 4 bits; and
the embeddings that give every block an input of its own (Gemma 3n and 4) are larger than all of its blocks. Rows of
embeddings are looked up where they lie, so that only those of a micro-batch's tokens come up. The head passes through a
ring of slots, tile by tile, forward and then in reverse. Where it and the embedding are one matrix (tied) it lies there
once.

Letters in shapes: V tokens of the vocabulary, D hidden size, `...` any leading dimensions.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.token_ids import on_host
from lowmem_ft.runtime.blocks import causal_model
from lowmem_ft.runtime.ring import SLOTS, Slots
from lowmem_ft.runtime.tiers import PAGE, NoTier, Tier, refuse_loading

Which: TypeAlias = Literal["none", "input", "both"]

TILE_BYTES = 32 << 20  # rows of a head that are multiplied at a time; two such pieces lie on the device
_TABLE = "_streamed_table"  # the attribute of a module whose rows lie below


def row_tiles(rows: int, row_bytes: int) -> list[slice]:
    """The rows of a matrix in pieces of about `TILE_BYTES`, each of which begins on a page where they lie in a row."""
    unit = 64 * PAGE // math.gcd(PAGE, 64 * row_bytes)
    height = max(unit, TILE_BYTES // row_bytes // unit * unit)
    return [slice(at, min(at + height, rows)) for at in range(0, rows, height)]


def tile_bytes(tiles: Sequence[slice], row_bytes: int) -> list[int]:
    """Of each below, where it fills whole pages."""
    return [-(-(tile.stop - tile.start) * row_bytes // PAGE) * PAGE for tile in tiles]


class Table:
    """A (V, D) matrix below the device.

    Args:
        dtype: of its elements.
        device: where it is used; "meta" simulates.
        multiplied: whether tiles of it are asked for.
        open_tier: bytes of each tile -> where they lie.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        *,
        device: torch.device,
        multiplied: bool,
        open_tier: Callable[[list[int]], Tier],
    ) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._row_bytes = shape[1] * dtype.itemsize
        self.tiles = row_tiles(shape[0], self._row_bytes)
        sizes = tile_bytes(self.tiles, self._row_bytes)
        self._tier: Tier = NoTier() if device.type == "meta" else open_tier(sizes)
        self._slots = Slots(self._tier, sizes, device) if multiplied else None

    def write(self, weight: Tensor) -> None:
        """Take the whole matrix."""
        for at, tile in enumerate(self.tiles):
            self._tier.write(at, 0, weight[tile])

    def placeholder(self) -> Tensor:
        """What the model holds in its place: of its shape, without its memory, and NaN for whoever reads it still."""
        return torch.full((1, 1), math.nan, dtype=self._dtype, device=self._device).expand(self._shape)

    def stored(self) -> Tensor:
        """The whole matrix where it lies, below the device."""
        if isinstance(self._tier, NoTier):
            return torch.empty(self._shape, dtype=self._dtype, device="meta")
        buffer = self._tier.buffer(0, self._shape[0] * self._row_bytes)  # tiles fill their pages, but for the last one
        return torch.frombuffer(buffer, dtype=torch.uint8).view(self._dtype).view(self._shape)

    def gather(self, ids: Tensor) -> Tensor:
        """The rows of `ids` (...) int64, as (..., D) on the device."""
        shape = (*ids.shape, self._shape[1])
        if self._device.type == "meta":
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        rows = self._tier.rows(on_host(ids).reshape(-1), self._row_bytes)
        return rows.view(self._dtype).view(shape).to(self._device)

    def tile(self, at: int, *, returns: bool) -> Tensor:
        """The rows `tiles[at]`, valid until another tile is asked for; see `Slots.bring`."""
        assert self._slots is not None, "only rows are looked up in this one"
        rows = self.tiles[at].stop - self.tiles[at].start
        slot = self._slots.bring(at, returns=returns)
        return slot[: rows * self._row_bytes].view(self._dtype).view(rows, self._shape[1])


class _Below(nn.Module):
    """A module whose `weight` lies below the device, where its state is read."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = vars(self)[_TABLE].stored()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        refuse_loading(state_dict, [f"{prefix}weight"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Rows(_Below, nn.Embedding):
    """An embedding whose rows lie below the device."""

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = vars(self)[_TABLE].gather(input)
        return found


@functools.cache
def _looking_up(cls: type[nn.Embedding]) -> type[nn.Embedding]:
    """`cls`, which looks its rows up below; what a subclass does with them it does still."""
    bases = (_Rows,) if cls is nn.Embedding else (cls, _Rows)
    return type(cls.__name__, bases, {})


class TiledLinear(_Below, nn.Linear):
    """A linear layer whose weight lies below the device."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Tiled.apply(input, vars(self)[_TABLE], self.bias)  # type: ignore[no-untyped-call]
        return y


class _Tiled(torch.autograd.Function):
    """y = x W^T + b, tile by tile of W, of which nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Table, bias: Tensor | None) -> Tensor:
        ctx.table, returns = table, ctx.needs_input_grad[0]
        y = x.new_empty(*x.shape[:-1], table.tiles[-1].stop)
        for at, tile in enumerate(table.tiles):
            y[..., tile] = F.linear(x, table.tile(at, returns=returns), None if bias is None else bias[tile])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table: Table = ctx.table
        dx = None
        for at in reversed(range(len(table.tiles)) if ctx.needs_input_grad[0] else ()):
            part = dy[..., table.tiles[at]] @ table.tile(at, returns=True)
            dx = part if dx is None else dx.float().add_(part)
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.to(dy.dtype), None, dbias


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matrix:
    """One that can be streamed.

    Attributes:
        embedding, head: the modules that read it.
        names: of the parameter that holds it, by each of these modules, in the model without adapters.
    """

    embedding: nn.Embedding | None
    head: nn.Linear | None
    names: tuple[str, ...]

    @property
    def parameter(self) -> Tensor:
        """What the model holds of it."""
        module = self.embedding or self.head
        assert module is not None
        return module.weight

    @property
    def row_bytes(self) -> int:
        return self.parameter.shape[1] * self.parameter.element_size()

    @property
    def nbytes(self) -> int:
        """Of the device while it lies there."""
        return self.parameter.shape[0] * self.row_bytes

    @property
    def tiles(self) -> list[int]:
        """Bytes of each tile below."""
        return tile_bytes(row_tiles(self.parameter.shape[0], self.row_bytes), self.row_bytes)

    @property
    def slots(self) -> list[int]:
        """Bytes of each slot that it has on the device instead."""
        return [] if self.head is None else [max(self.tiles) + PAGE] * SLOTS

    @property
    def copies(self) -> list[int]:
        """Bytes of each tile that is copied for a chunk of the loss, in whose two passes the slots' tiles lie there."""
        return [] if self.head is None else 2 * self.tiles[SLOTS:]

    def hold(self, table: Table) -> None:
        """Let the modules read `table` from now on."""
        self.parameter.data = table.placeholder()
        if self.embedding is not None:
            self.embedding.__class__ = _looking_up(type(self.embedding))  # type: ignore[arg-type]
            setattr(self.embedding, _TABLE, table)
        if self.head is not None:
            self.head.__class__ = TiledLinear
            setattr(self.head, _TABLE, table)


def matrices_of(model: nn.Module) -> list[Matrix]:
    """What can be streamed of a model's vocabulary.

    Args:
        model: a transformers model before adapters; meta is enough.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    further = [it for it in model.modules() if it is not embedding and _per_token(it, embedding, head)]
    head = head if type(head) is nn.Linear else None
    found = []
    for it in (embedding, *further):
        if isinstance(it, nn.Embedding) and _only_looks_up(it):
            tied, head = (head, None) if head is not None and it.weight is head.weight else (None, head)
            of = [names[id(module)] for module in (it, tied) if module is not None]
            found.append(Matrix(embedding=it, head=tied, names=tuple(of)))
    if head is not None:
        found.append(Matrix(embedding=None, head=head, names=(names[id(head)],)))
    return found


def _per_token(module: nn.Module, embedding: Any, head: Any) -> bool:
    """Whether `module` is a further embedding with a row for each token that `embedding` knows, or nearly."""
    if not (isinstance(module, nn.Embedding) and isinstance(embedding, nn.Embedding)):
        return False
    shared = any(module.weight is getattr(it, "weight", None) for it in (embedding, head))
    return not shared and 0.9 <= module.num_embeddings / embedding.num_embeddings <= 1.1


def chosen(matrices: Sequence[Matrix], which: Which) -> list[Matrix]:
    """Those that a policy streams: of `input` those that the head does not read."""
    return [it for it in matrices if which == "both" or (which == "input" and it.head is None)]


def _only_looks_up(embedding: nn.Embedding) -> bool:
    """Whether it reads its weight by nn.Embedding's own forward alone, tried without its weight."""
    asked = _Asked(embedding)
    probe = copy.copy(embedding)
    probe.__class__ = _looking_up(type(embedding))  # type: ignore[arg-type]
    setattr(probe, _TABLE, asked)
    try:
        with torch.no_grad():
            found = probe(torch.zeros(1, 2, dtype=torch.int64, device=embedding.weight.device))
    except Exception:  # it needs what an nn.Embedding does not have
        return False
    return asked.times == 1 and tuple(found.shape) == (1, 2, embedding.embedding_dim)


@dataclass(slots=True)
class _Asked:
    """In a table's place: counts how often rows are asked for."""

    embedding: nn.Embedding
    times: int = 0

    def gather(self, ids: Tensor) -> Tensor:
        self.times += 1
        return torch.zeros(*ids.shape, self.embedding.embedding_dim, device=self.embedding.weight.device)


class StreamedVocabulary:
    """Some of a model's matrices, below the device.

    Args:
        matrices: which.
        device, open_tier: as for `Table`.
    """

    def __init__(
        self, matrices: Sequence[Matrix], *, device: torch.device, open_tier: Callable[[list[int]], Tier]
    ) -> None:
        self.matrices = list(matrices)
        self._tables = [
            Table(
                (it.parameter.shape[0], it.parameter.shape[1]),
                it.parameter.dtype,
                device=device,
                multiplied=it.head is not None,
                open_tier=open_tier,
            )
            for it in matrices
        ]

    def place(self, name: str, tensor: Tensor) -> Tensor | None:
        """Take a matrix that was loaded. Returns what the model shall hold instead; None if it is not streamed."""
        for matrix, table in zip(self.matrices, self._tables, strict=True):
            if name in matrix.names:
                table.write(tensor)
                return table.placeholder()
        return None

    def attach(self) -> None:
        """Have the modules ask for rows and tiles from now on."""
        for matrix, table in zip(self.matrices, self._tables, strict=True):
            matrix.hold(table)

    def take_over(self, model: nn.Module) -> None:
        """The same for a model that is in use, whose matrices go below the device.

        Raises:
            UnsupportedError: see `refuse_trained`; nothing has changed then.
        """
        refuse_trained(model, self.matrices)
        for matrix, table in zip(self.matrices, self._tables, strict=True):
            table.write(matrix.parameter.detach())
            matrix.hold(table)


def table_of(module: nn.Module | None) -> Table | None:
    """Where the rows of an embedding or a head lie, if that is below the device."""
    table: Table | None = None if module is None else vars(module).get(_TABLE)
    return table


def refuse_trained(model: nn.Module, matrices: Sequence[Matrix]) -> None:
    """Check what is streamed of a model with its adapters.

    Raises:
        UnsupportedError: they train a matrix, or something else in its place.
    """
    for matrix in matrices:
        if is_trained(model, matrix):
            raise UnsupportedError(
                "An embedding that is streamed is trained.",
                given=matrix.names[0],
                fix="set policy.stream_embeddings: none, or train other modules",
            )


def is_trained(model: nn.Module, matrix: Matrix) -> bool:
    """Whether `model`, with its adapters, trains a matrix or has something in the place of its modules."""
    causal, modules = causal_model(model), [it for it in (matrix.embedding, matrix.head) if it is not None]
    places = [causal.get_submodule(name.rpartition(".")[0]) for name in matrix.names]
    replaced = any(place is not module for place, module in zip(places, modules, strict=True))
    return replaced or matrix.parameter.requires_grad
