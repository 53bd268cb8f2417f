"""The attention backward for Hopper at head dim 64, compiled without a GPU, and which calls it serves."""

import re

import pytest

import scree
from cases import normal
from scree import kernels

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
_launch = pytest.importorskip("scree.kernels.triton._launch")
if _launch.INTERPRETED:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)
offline = pytest.importorskip("offline")

pytestmark = pytest.mark.triton

DQ, DKV = "_hopper_pair_dq_kernel", "_hopper_pair_dkv_kernel"
PROGRAMS = {DQ: 4, DKV: 3}  # at once on a multiprocessor
SHORT, LONG = (0, 100, 300, 301, 301, 400), (0, 1000)


def launches(monkeypatch, target, dim, offsets=SHORT, heads=(4, 4), dtype=torch.bfloat16, spacing=None, **options):
    """What a forward and a backward launch, by the name of the kernel."""

    def array(heads, seed):
        values = torch.from_numpy(normal((offsets[-1], heads, spacing or dim), seed)).to(dtype)[:, :, :dim]
        return scree.Array(values.requires_grad_(), torch.tensor(offsets, dtype=torch.int32))

    q, k = array(heads[0], 0), array(heads[1], 1)
    k = q.with_values(k.values)
    with offline.recording(monkeypatch, target) as found:
        kernels.varlen_attention(q, k, k, implementation="triton", **options).values.sum().backward()
    return {launch.name: launch for launch in found}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("offsets", "heads"), [(SHORT, (4, 4)), (LONG, (8, 2))], ids=["short", "long, grouped"])
def test_the_machine_code(monkeypatch, capfd, causal, offsets, heads):
    found = launches(monkeypatch, "sm_90", 64, offsets, heads, causal=causal)
    for name, programs in PROGRAMS.items():
        code = offline.compiled(found[name], "sm_90")
        registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", code.text)))
        assert registers * 128 * programs <= 65536
        assert (code.shared + 1024) * programs <= 228 * 1024  # the system takes a KiB of each program
        assert "HGMMA" in code
        assert r"LDGSTS\S*\.128" in code
        assert r"\bHMMA\b" not in code
        assert r"LDGSTS\.E\s" not in code  # nothing by 4 bytes
    assert "griddepcontrol.launch_dependents" in offline.compiled(found[DQ], "sm_90").ptx
    assert "griddepcontrol.wait" in offline.compiled(found[DKV], "sm_90").ptx
    assert dict(found[DKV].options)["launch_pdl"]
    assert "serialized" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("target", "dim", "options"),
    [
        ("sm_90", 64, {"softcap": 5.0}),
        ("sm_90", 64, {"window_size": (5, 0)}),
        ("sm_90", 64, {"dtype": torch.float32}),
        ("sm_90", 64, {"spacing": 72}),
        ("sm_90", 32, {}),
        ("sm_90", 128, {}),
        ("sm_80", 64, {}),
        ("sm_100", 64, {}),
        ("gfx942", 64, {}),
    ],
    ids=str,
)
def test_others_compute_the_rest(monkeypatch, target, dim, options):
    assert not PROGRAMS.keys() & launches(monkeypatch, target, dim, **options).keys()


def test_how_many_heads_a_program_takes(monkeypatch):
    for offsets, heads, causal, turns in (
        (SHORT, 4, False, 2), (SHORT, 3, False, 1), (SHORT, 4, True, 1), (LONG, 4, False, 1)
    ):  # fmt: skip
        found = launches(monkeypatch, "sm_90", 64, offsets, (heads, heads), causal=causal)
        assert dict(found[DKV].constants)["HEADS"] == turns
