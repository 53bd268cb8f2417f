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
from uniform import reads_unwritten  # noqa: E402

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
        assert not reads_unwritten(code.text)
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


def test_o_and_lse_are_asked_for_before_the_first_wait(monkeypatch):
    """One wait for memory in place of two: left alone, ptxas moves these loads behind the wait for the copies."""
    for offsets, causal in ((SHORT, False), (SHORT, True), (LONG, True)):
        code = offline.compiled(launches(monkeypatch, "sm_90", 64, offsets, causal=causal)[DQ], "sm_90")
        before, after = code.text.split("DEPBAR.LE SB0", 1)
        assert len(re.findall(r"LDG\.E\.128 ", before)) == 4
        assert "LDG." not in after


def test_what_is_read_before_it_is_written():
    loop = """
        /*0010*/   S2UR UR4, SR_CTAID.X ;
        /*0020*/   @!P0 BRA `(.L_x_1) ;
        /*0030*/   UMOV UR8, UR4 ;
        /*0040*/   UMOV UR9, 0x40000040 ;
        .L_x_0:
        /*0050*/   HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88 ;
        /*0060*/   @P0 BRA `(.L_x_0) ;
        .L_x_1:
        /*0070*/   UIADD3 UR10, UR8, 0x2, URZ ;
        /*0080*/   EXIT ;
    """
    assert reads_unwritten(loop) == [("0070", "UIADD3 UR10, UR8, 0x2, URZ", [8])]
    assert reads_unwritten(loop.replace("UIADD3 UR10, UR8", "UIADD3 UR10, UR4")) == []
    assert reads_unwritten(loop.replace("UMOV UR9", "UMOV UR5"))[0] == (
        "0050", "HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88", [9]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("offsets", "heads", "wholes"),
    [(SHORT, (4, 4), True), (SHORT, (4, 2), False), ((0, 300), (4, 4), False), (LONG, (4, 4), False)],
    ids=str,
)
def test_where_sequences_are_taken_whole(monkeypatch, offsets, heads, wholes):
    found = launches(monkeypatch, "sm_90", 64, offsets, heads)
    assert dict(found[DKV].constants)["WHOLES"] is wholes
    small = [dict(launch.constants)["SMALL"] for launch in found.values() if launch.name == "_place_tiles_kernel"]
    assert small == [128 if wholes else 0]  # the last one, of the keys


def test_what_a_program_takes_whole_is_what_it_has_room_for():
    from scree.kernels.triton import _hopper_pair
    from scree.kernels.triton import _hopper_pair_whole_kernels as whole

    assert whole.BLOCKS.value * whole.ROWS.value == _hopper_pair._SMALL


def test_how_many_heads_a_program_takes(monkeypatch):
    for offsets, heads, causal, turns in (
        (SHORT, 4, False, 2), (SHORT, 3, False, 1), (SHORT, 4, True, 1), (LONG, 4, False, 1)
    ):  # fmt: skip
        found = launches(monkeypatch, "sm_90", 64, offsets, (heads, heads), causal=causal)
        assert dict(found[DKV].constants)["HEADS"] == turns
