"""Compiling Triton kernels for GPUs that are not here, from launches that were recorded instead of made.

The public functions are called on tensors of the CPU; what would have been launched is kept: the kernel, the types and
alignment of its arguments, its constants and options. So there is no list of kernels to keep beside the code. Must be
used where Triton's interpreter is off.
"""

import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from scree.kernels import _dispatch
from scree.kernels import triton as fast
from scree.kernels.triton import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (0, 0)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""The shared memory of a program at most, in bytes."""
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
"""Triton's names of pointers."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel and all that it is compiled for."""

    kernel: object
    signature: tuple  # (name, type) of every parameter
    constants: tuple
    divisible: tuple  # the indices of the arguments that are multiples of 16
    options: tuple

    @property
    def name(self):
        """Return the kernel's own name."""
        return self.kernel.fn.__name__

    def __str__(self):
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.constants)})"


def _launch_of(launcher, tensors, scalars):
    """Say what Triton would be asked to compile, as its own specialisation does."""
    kernel, constants = launcher._kernel, launcher._constants
    names = list(kernel.arg_names)
    signature, divisible, given = {}, [], dict(constants)
    for i, x in enumerate(tensors):
        signature[names[i]] = POINTERS[x.dtype]
        if x.data_ptr() % 16 == 0:
            divisible.append(i)
    for i, x in enumerate(scalars, len(tensors)):
        parameter = kernel.params[i]
        plain = parameter.do_not_specialize
        annotated = parameter.annotation_type
        if isinstance(x, float):
            signature[names[i]] = annotated or "fp32"
        elif x == 1 and not plain:
            signature[names[i]], given[names[i]] = "constexpr", 1
        else:
            signature[names[i]] = annotated or ("i32" if -(2**31) <= x < 2**31 else "i64")
            if x % 16 == 0 and not plain and not parameter.do_not_specialize_on_alignment:
                divisible.append(i)
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = tuple((name, signature[name]) for name in names)
    return Launch(kernel, ordered, tuple(given.items()), tuple(divisible), tuple(launcher._options.items()))


# What the modules keep of a device, all of which bear one number here.
KEPT = ("_LAUNCHERS", "_PLANNED", "_PLANS", "_WAYS", "_FORWARD", "_BACKWARD")


@contextlib.contextmanager
def recording(monkeypatch, target):
    """Record what is launched in the block, as if on a device of this target, tensors being on the CPU."""
    found = []
    fast._load()

    def record(launcher, grid, tensors, scalars):
        launch = _launch_of(launcher, tensors, scalars)
        if launch not in found:
            found.append(launch)

    def on_the_cpu(impl):
        return impl._replace(devices=("cpu",)) if impl.module == ".triton" else impl

    with monkeypatch.context() as patch:
        for op, impls in _dispatch.TABLE.items():
            patch.setitem(_dispatch.TABLE, op, tuple(map(on_the_cpu, impls)))
        patch.setattr(_launch.Launcher, "__call__", record)
        patch.setattr(_launch, "_CAPABILITIES", {-1: CAPABILITIES[target]})
        patch.setattr(_launch, "_PROCESSORS", {-1: 132})
        for name, module in list(sys.modules.items()):
            if name.startswith("scree.kernels.triton."):
                for there, instead in (
                    *((kept, {}) for kept in KEPT),
                    ("current_stream", lambda device: 0),
                    ("is_capturing", lambda: False),
                    ("refuse_device", lambda *_: None),
                    ("serves", lambda *_: True),
                ):
                    if hasattr(module, there):
                        patch.setattr(module, there, instead)
        yield found


class Code:
    """What the compiler made of one launch for one target."""

    def __init__(self, launch, target):
        attributes = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
        kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
        source = kind(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
        options = dict(launch.options)
        made = triton.compile(source, target=TARGETS[target], options=options)
        self.launch, self.target = launch, target
        self.shared = made.metadata.shared
        self.ptx = made.asm.get("ptx", "")
        self.text = made.asm["amdgcn"] if "amdgcn" in made.asm else _sass(made.asm["cubin"])

    def __contains__(self, pattern):
        """Say whether an instruction matches."""
        return re.search(pattern, self.text) is not None

    @property
    def spills(self):
        """Count the instructions that move registers to memory and back; on AMD, the registers."""
        if self.target.startswith("gfx"):
            return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", self.text)))
        return len(re.findall(r"\b(?:LDL|STL)\b", self.text))

    @property
    def uses_tensor_cores(self):
        """Say whether matrices are multiplied by the units that are there for it."""
        return {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC.?MMA|HMMA", "gfx942": "v_mfma"}[self.target] in self

    @property
    def loads_wide(self):
        """Say whether memory is read 16 bytes at a time, or by the copy engine."""
        if self.target.startswith("gfx"):
            return r"(?:global|buffer)_load_dwordx4" in self
        return r"LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG" in self


def _sass(cubin):
    """Disassemble with the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


_COMPILED = {}


def compiled(launch, target):
    """Compile once in this process."""
    found = _COMPILED.get((launch, target))
    if found is None:
        found = _COMPILED[(launch, target)] = Code(launch, target)
    return found
