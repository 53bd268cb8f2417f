"""Launching kernels with little time on the host, and the facts about a device that choose their tiles."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ..._backends.torch import PLAIN, is_recorded

current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a PyTorch without CUDA has none

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs kernels in Python (``TRITON_INTERPRET=1``), so that tensors on the CPU serve."""


class Launcher:
    """One kernel with everything static that it is compiled for, launched without Triton's own look at each argument.

    The kernel's parameters are, in this order: pointers, scalars, constants. Triton compiles it at the first call,
    once for every pattern of pointers that are aligned to 16 bytes, and the compiled kernel is called directly from
    then on. So the strides and whatever else a kernel is specialised for must be part of the key under which the
    caller keeps the Launcher, and scalars that change from call to call must be in the kernel's ``do_not_specialize``,
    with their types annotated.

    Parameters
    ----------
    kernel : triton.jit function
    device : int
        Number of the CUDA device.
    constants : dict
        The kernel's constexpr parameters, in the order of its signature.
    workspace : bool
        Whether it needs Triton's allocator (tensor descriptors that are made on the device).
    options : int or bool
        ``num_warps``, ``num_stages`` and the like.
    """

    __slots__ = ("_compiled", "_constants", "_device", "_kernel", "_options", "_values", "_workspace")

    def __init__(
        self, kernel: Any, device: int, constants: dict[str, Any], *, workspace: bool = False, **options: Any
    ) -> None:
        names = list(kernel.arg_names)
        if names[len(names) - len(constants) :] != list(constants):
            raise ValueError(f"constants: got {list(constants)}; needs the last parameters of {names}")
        self._kernel = kernel
        self._device = device
        self._constants = constants
        self._values = tuple(constants.values())
        self._options = options
        self._workspace = workspace
        self._compiled: dict[int, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[torch.Tensor, ...], scalars: tuple[int | float, ...]
    ) -> None:
        """Launch on the current stream of the device; an empty grid launches nothing."""
        if 0 in grid:
            return
        if INTERPRETED:
            self._kernel[grid](*tensors, *scalars, **self._constants, **self._options)
            return
        device = self._device
        if torch._C._cuda_getDevice() != device:  # pyright: ignore[reportAttributeAccessIssue]
            with torch.cuda.device(device):
                self(grid, tensors, scalars)
            return
        pointers = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        pattern = 0 if bits & 15 == 0 else sum(1 << i for i, pointer in enumerate(pointers) if pointer & 15) + 1
        if self._workspace:
            triton.set_allocator(_allocate)  # a context variable: the thread of autograd has its own
        compiled = self._compiled.get(pattern)
        if compiled is None:
            self._compiled[pattern] = self._kernel[grid](*tensors, *scalars, **self._constants, **self._options)
            return
        compiled.run(
            *grid,
            current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *pointers,
            *scalars,
            *self._values,
        )


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def device_number(x: torch.Tensor) -> int:
    """The number of a tensor's CUDA device; -1 on the CPU, where the interpreter runs."""
    return x.get_device()


_CAPABILITIES: dict[int, tuple[int, int]] = {}
_PROCESSORS: dict[int, int] = {}


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, (9, 0) for Hopper; that of Hopper too where the interpreter runs."""
    found = _CAPABILITIES.get(device)
    if found is None:
        found = _CAPABILITIES[device] = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    return found


def processors(device: int) -> int:
    """How many multiprocessors a device has; a few where the interpreter runs."""
    found = _PROCESSORS.get(device)
    if found is None:
        found = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
        _PROCESSORS[device] = found
    return found


def refuse_device(op: str, name: str, x: torch.Tensor) -> None:
    """Refuse a tensor on a device that the kernels do not run on."""
    if not (x.is_cuda or INTERPRETED):
        raise NotImplementedError(f"{op}: {name} is on {x.device}; needs a CUDA device, where Triton's kernels run")


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether no compiler or transformation looks on, so that a kernel may be launched rather than recorded."""
    if torch.compiler.is_compiling() or is_recorded() or torch._C._are_functorch_transforms_active():
        return False  # under a transformation even fresh memory is wrapped
    return all(x is None or type(x) in PLAIN for x in tensors)
