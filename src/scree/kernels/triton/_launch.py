"""Launching kernels with little time on the host, and the facts about a device that choose their tiles."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from ..._backends.torch import is_recorded

# The functions below torch.cuda's own, which take longer than what they do; a PyTorch without CUDA has none.
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_is_transformed = torch._C._are_functorch_transforms_active
_pointer = torch.Tensor.data_ptr

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

    __slots__ = ("_constants", "_device", "_kernel", "_launches", "_options", "_values", "_workspace")

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
        self._launches: dict[int, _Launch] = {}

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
        if _current_device() != device:
            with torch.cuda.device(device):
                self(grid, tensors, scalars)
            return
        pointers = [*map(_pointer, tensors)]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        pattern = 0 if bits & 15 == 0 else sum(1 << i for i, pointer in enumerate(pointers) if pointer & 15) + 1
        launch = self._launches.get(pattern)
        if launch is None:
            if self._workspace:
                triton.set_allocator(_allocate)  # a context variable: the thread of autograd has its own
            compiled = self._kernel[grid](*tensors, *scalars, **self._constants, **self._options)
            found = _direct(compiled, device, self._values) or _indirect(compiled, self._workspace, self._values)
            self._launches[pattern] = found
            return
        launch(grid, current_stream(device), pointers, scalars)


_Launch = Callable[[tuple[int, int, int], int, list[int], tuple[int | float, ...]], None]
"""Launches a compiled kernel: grid, stream, pointers and scalars."""


def _indirect(compiled: Any, workspace: bool, constants: tuple[Any, ...]) -> _Launch:
    """Launch a compiled kernel as Triton does."""

    def launch(grid: tuple[int, int, int], stream: int, pointers: list[int], scalars: tuple[int | float, ...]) -> None:
        if workspace:
            triton.set_allocator(_allocate)
        head = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(*grid, stream, *head, *pointers, *scalars, *constants)

    return launch


def _direct(compiled: Any, device: int, constants: tuple[Any, ...]) -> _Launch | None:
    """Launch it without Triton's own Python, by the function that it compiled for that; None where that is another."""
    run = compiled.run
    if not triton.__version__.startswith("3.6.") or type(run).__name__ != "CudaLauncher" or run.profile_scratch_size:
        return None
    call, size = run.launch, run.global_scratch_size * run.num_ctas
    before = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    behind = None, compiled.packed_metadata, None, None, None

    def launch(grid: tuple[int, int, int], stream: int, pointers: list[int], scalars: tuple[int | float, ...]) -> None:
        scratch = _scratch(device, stream, size * grid[0] * grid[1] * grid[2]) if size else None
        call(*grid, stream, *before, scratch, *behind, *pointers, *scalars, *constants)

    return launch


_SCRATCH: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}  # with where it lies, which takes time to ask
_MOST_SCRATCH = 1 << 20  # bytes that are kept for a stream


def _scratch(device: int, stream: int, size: int) -> int | torch.Tensor:
    """Memory for the descriptors that a kernel makes for itself, which the next one on the stream may overwrite.

    A CUDA graph gets its own: it may be replayed on any stream, beside any other.
    """
    if size > _MOST_SCRATCH or captures(stream):
        return torch.empty(size, dtype=torch.int8, device=torch.device("cuda", device))
    kept = _SCRATCH.get((device, stream))
    if kept is None:
        memory = torch.empty(_MOST_SCRATCH, dtype=torch.int8, device=torch.device("cuda", device))
        kept = _SCRATCH[device, stream] = memory.data_ptr(), memory
    return kept[0]


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def captures(stream: int) -> bool:
    """Whether a CUDA graph is captured on the current stream, which is `stream`: never on the default one, 0."""
    return stream != 0 and is_capturing()


def capture_number(stream: int) -> int | None:
    """0 outside of the capture of a CUDA graph, else the driver's number of the capture; None where it tells none."""
    if not captures(stream):
        return 0
    ask = _capture_info()
    if ask is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return None if failed or not number.value else number.value


_CAPTURE_INFO: list[Any] = []


def _capture_info() -> Any:
    """The driver's cuStreamGetCaptureInfo, or None where there is no such thing (AMD)."""
    if not _CAPTURE_INFO:
        found = None
        if torch.version.cuda is not None:
            try:
                found = ctypes.CDLL(
                    "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
                ).cuStreamGetCaptureInfo_v2
            except (OSError, AttributeError):
                found = None
        _CAPTURE_INFO.append(found)
    return _CAPTURE_INFO[0]


def device_number(x: torch.Tensor) -> int:
    """The number of a tensor's CUDA device; -1 on the CPU, where the interpreter runs."""
    return x.get_device()


_CAPABILITIES: dict[int, tuple[int, int]] = {}
_PROCESSORS: dict[int, int] = {}


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, (9, 0) for Hopper; (0, 0) for AMD, Hopper's where the interpreter runs."""
    found = _CAPABILITIES.get(device)
    if found is None:
        amd = torch.version.hip is not None
        found = (9, 0) if INTERPRETED else (0, 0) if amd else torch.cuda.get_device_capability(device)
        _CAPABILITIES[device] = found
    return found


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD's local data share
_SHARED_KIB = {(0, 0): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}


def shared_memory(device: int) -> int:
    """How many bytes of shared memory one program may have; 99 KiB on what is not known to have more."""
    return _SHARED_KIB.get(capability(device), 99) * 1024


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
    if torch.compiler.is_compiling() or is_recorded() or _is_transformed():
        return False
    for x in tensors:  # noqa: SIM110, in less time than a generator takes
        if type(x) not in _PLAIN:
            return False
    return True


def is_transformed() -> bool:
    """Whether a transformation of `torch.func` is at work, outside of any compiler."""
    return _is_transformed() and not torch.compiler.is_compiling()


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
