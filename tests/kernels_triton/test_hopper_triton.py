"""The attention kernel for Hopper, compiled without a GPU: no spills, and the instructions that make it fast."""

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton
triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

SHARED_MEMORY = 227 * 1024  # of a program, on sm_90

CASES = (
    (64, "fp16", {"HAS_RIGHT": True}),
    (64, "bf16", {"HAS_RIGHT": True, "SOFTCAP": True, "SINKS": True}),
    (64, "fp16", {"HAS_LEFT": True, "HAS_RIGHT": True}),
    (64, "bf16", {"AHEAD": True}),
    (64, "bf16", {"AHEAD": True, "HAS_LEFT": True, "HAS_RIGHT": True, "SINKS": True}),
    (128, "bf16", {"HAS_RIGHT": True}),
    (128, "fp16", {}),
    (128, "bf16", {"HAS_LEFT": True, "HAS_RIGHT": True}),
    (128, "bf16", {"SCALED": True, "LSE": False}),
)


@pytest.fixture
def assembly(monkeypatch, tmp_path):
    """Return what compiles the kernel and gives its machine code and its shared memory."""
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets its kernels here, and compiles none")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from scree.kernels.triton import _hopper
    from scree.kernels.triton._hopper_fwd_kernels import _hopper_fwd_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"tiles_ptr": "*i32", "lse_ptr": "*fp32", "sinks_ptr": "*fp32"}

    def compiled(width, dtype, flags):
        config = _hopper.CONFIGS[width]
        constants = {
            "HEADS": 8, "SHARED": 2, "INNER": 2, "D": width, "D_V": width,
            "BLOCK_N": config.step, "TILES": config.tiles, "STAGES": config.stages,
            "HAS_LEFT": False, "HAS_RIGHT": False, "SOFTCAP": False, "SCALED": False, "SINKS": False, "LSE": True,
            "BRIEF": config.brief, "AHEAD": False,
        } | flags  # fmt: skip
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = (
                "constexpr"
                if name in constants
                else types.get(name, f"*{dtype}")
                if name.endswith("_ptr")
                else kernel.params[i].annotation_type
            )
            if name.endswith("_ptr") or name.startswith("stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = GluonASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4, "enable_fp_fusion": True}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        code = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
        return code.stdout, built.metadata.shared

    return compiled


@pytest.mark.parametrize(("width", "dtype", "flags"), CASES, ids=str)
def test_the_machine_code(assembly, capfd, width, dtype, flags):
    code, shared = assembly(width, dtype, flags)
    assert shared <= SHARED_MEMORY
    for wanted in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"):
        assert wanted in code
    # A left window's kernel keeps a few numbers in memory that do not change in its loops: a debt.
    spills = len(re.findall(r"\bSTL\b", code))
    assert spills <= (8 if flags.get("HAS_LEFT") else 0), "registers spill"
    assert not re.search(r"\bHMMA\b", code)
    # Of the first block, also half may be multiplied by the queries: keys are read as they lie, values across.
    half = [x for x in re.findall(r"HGMMA\.64x64x16\S* [^;]*;", code) if "tnsp" not in x]
    assert bool(half) == (width == 64)
    assert "serialized" not in "".join(capfd.readouterr())
