"""The attention backward for Hopper, compiled without a GPU: the instructions that make it fast, and how much spills."""

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton
triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

SHARED_MEMORY = 227 * 1024  # of a program, on sm_90
MOST_STORED = 60  # registers to memory, in all: what the loops hold does not quite fit


@pytest.fixture
def assembly(monkeypatch, tmp_path):
    """Return what compiles a kernel and gives its machine code and its shared memory."""
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets its kernels here, and compiles none")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    single = {"rows_ptr", "acc_ptr", "lse_ptr", "dlse_ptr", "delta_ptr"}

    def compiled(kernel, dtype, constants):
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*i32" if name == "tiles_ptr" else "*fp32" if name in single else f"*{dtype}"
            else:
                signature[name] = kernel.params[i].annotation_type
            if name.endswith("_ptr") or name.startswith("stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        made = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
        options = {"num_warps": 4, "enable_fp_fusion": True}
        source = made(kernel, signature, constants, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        code = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
        return code.stdout, built.metadata.shared

    return compiled


@pytest.mark.parametrize("has_right", [True, False], ids=["causal", "full"])
def test_the_machine_code(assembly, capfd, has_right):
    from scree.kernels.triton import _hopper_bwd
    from scree.kernels.triton._hopper_bwd_kernels import _hopper_bwd_kernel

    (width, config), *_ = _hopper_bwd.CONFIGS.items()
    constants = {
        "SHARED": 2, "HEADS": 4, "INNER": 1, "D": width, "BLOCK_M": config.step, "STAGES": config.stages,
        "HAS_RIGHT": has_right,
    }  # fmt: skip
    code, shared = assembly(_hopper_bwd_kernel, "bf16", constants)
    assert shared <= SHARED_MEMORY
    for wanted in ("HGMMA", "UTMALDG", "USETMAXREG"):
        assert wanted in code
    assert re.search(r"UTMAREDG.*ADD", code)
    assert not re.search(r"\bHMMA\b|ATOMG\.E\.ADD\.F32", code)
    assert len(re.findall(r"\bSTL\b", code)) <= MOST_STORED
    assert "serialized" not in "".join(capfd.readouterr())


def test_what_runs_before_and_after(assembly):
    from scree.kernels.triton import _hopper_bwd_kernels as kernels

    constants = {"INNER": 4, "D": 128, "BLOCK_M": 64}
    for kernel, more in (
        (kernels._hopper_bwd_rows_kernel, {"DLSE": True}),
        (kernels._hopper_bwd_dq_kernel, {}),
    ):
        code, _ = assembly(kernel, "bf16", constants | more)
        assert not re.search(r"\b(?:LDL|STL)\b", code)
        assert re.search(r"LDG\.E\S*\.128", code)
