"""What the ops on PyTorch's own kernels share: memory, host offsets and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._array import Array
from ..._backends._protocol import HostArray, HostInts
from ..._backends.torch import is_traced

_LARGE = 1 << 20  # bytes
_LINE = 64  # bytes: to where torch itself aligns what it allocates


def host(offsets: Tensor) -> HostInts:
    """The offsets as NumPy sees them."""
    return offsets.detach().cpu().numpy()


def offsets_of(op: str, arr: Array) -> Tensor:
    """The offsets, on the host where no trace hides them: one copy from a device for all ops on an Array."""
    if arr.offsets.device.type == "cpu" or is_traced(arr.offsets):
        return arr.offsets
    return torch.from_numpy(arr._host_offsets(op))


def on(like: Tensor, data: HostArray) -> Tensor:
    """Data of the host on the device of a tensor."""
    return torch.from_numpy(data).to(like.device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or wider where the values are."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; large memory of the host from NumPy, which asks for huge pages where torch does not."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size < _LARGE or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.empty(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[skip : skip + size]).view(dtype).view(shape)


class Operator:
    """One operator of the namespace `torch.ops.scree`, which eager calls pass by.

    Compilers and whatever else records calls need an operator of `torch.library`, whose way through the dispatcher takes
    longer than a short row is computed. Without them the same functions are called as they are, and with gradients
    through a `torch.autograd.Function`.

    Parameters
    ----------
    name, schema : str
    forward : function
        Of the arguments in the order of the schema.
    plain : function, optional
        Called instead of `forward` where no gradient is wanted: it may leave out what only the backward reads.
    keep, backward : function, optional
        ``keep(ctx, inputs, output)`` and ``backward(ctx, *grads)``, as `register_autograd` takes them. Without them the
        operator has no gradient.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        forward: Callable[..., Any],
        *,
        plain: Callable[..., Any] | None = None,
        keep: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.plain = forward if plain is None else plain
        self.recorded = torch.library.custom_op(f"scree::{name}", forward, mutates_args=(), schema=schema)
        self.function: type[torch.autograd.Function] | None = None
        if keep is not None and backward is not None:
            self.recorded.register_autograd(backward, setup_context=keep)
            self.function = _function(forward, keep, backward)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Say what the operator gives, in shapes and dtypes."""
        self.recorded.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if is_traced(*tensors):
            return self.recorded(*args)
        if self.function is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.function.apply(*args)
        return self.plain(*args)


def _function(
    forward: Callable[..., Any], keep: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def run(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        keep(ctx, args, output)
        return output

    methods = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(backward))}
    return type(forward.__name__, (torch.autograd.Function,), methods)
