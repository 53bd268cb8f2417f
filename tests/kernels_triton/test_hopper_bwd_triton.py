"""The attention backward for Hopper, compiled without a GPU: the instructions that make it fast, and how much spills."""

import re

import pytest

import scree
from cases import normal
from scree import kernels

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
_launch = pytest.importorskip("scree.kernels.triton._launch")
if _launch.INTERPRETED:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)
offline = pytest.importorskip("offline")
from uniform import reads_unwritten  # noqa: E402

pytestmark = pytest.mark.triton

BEFORE, AFTER = "_hopper_bwd_rows_kernel", "_hopper_bwd_dq_kernel"
MAIN = {False: "_hopper_bwd_kernel", True: "_hopper_bwd_stay_kernel"}  # by whether keys are masked
BARRIERS = {False: 20, True: 26}
MOST_STORED = 60  # registers to memory, in all: what the loops hold does not quite fit


def launches(monkeypatch, target, dim, **options):
    """What a forward and a backward launch, by the name of the kernel."""
    values = torch.from_numpy(normal((300, 2, dim), 0)).to(torch.bfloat16).requires_grad_()
    q = scree.Array(values, torch.tensor([0, 100, 300], dtype=torch.int32))
    with offline.recording(monkeypatch, target) as found:
        kernels.varlen_attention(q, q, q, implementation="triton", **options).values.sum().backward()
    return {launch.name: launch for launch in found}


EVERY_WAY = pytest.mark.parametrize(
    ("causal", "fixed"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["causal", "causal, free", "full", "full, free"],
)


@EVERY_WAY
def test_the_machine_code(monkeypatch, capfd, causal, fixed):
    found = launches(monkeypatch, "sm_90", 128, causal=causal, deterministic=fixed)
    assert MAIN[not causal] not in found
    code = offline.compiled(found[MAIN[causal]], "sm_90")
    assert code.shared <= offline.SHARED["sm_90"]
    turns = "LDG.E.STRONG.GPU"
    counts, early = r"REDG\.E\.ADD\.S32\.STRONG\.GPU", "PREEXIT"
    for wanted in ("HGMMA", "UTMALDG", "USETMAXREG", r"UTMAREDG.*ADD", "UTMASTG", turns, counts, early):
        assert wanted in code
    for unwanted in (r"\bHMMA\b", r"ATOMG\.E\.ADD\.F32"):
        assert unwanted not in code
    assert len(re.findall(r"\bSTL\b", code.text)) <= MOST_STORED
    assert not reads_unwritten(code.text)
    assert "serialized" not in "".join(capfd.readouterr())


def loops(text):
    """The instructions of each loop of a disassembly, in lines."""
    lines, labels = text.splitlines(), {}
    for at, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif (back := re.search(r"\bBRA `\((\.L_x_\d+)\)", line)) and back[1] in labels:
            yield lines[labels[back[1]] : at + 1]


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="what other Tritons spill is in MOST_STORED")
def test_steps_hold_all_in_registers_and_few_places_in_plain_ones(monkeypatch, fixed):
    found = launches(monkeypatch, "sm_90", 128, causal=True, deterministic=fixed)
    code = offline.compiled(found[MAIN[True]], "sm_90").text
    steps = ["\n".join(loop) for loop in loops(code) if sum("HGMMA" in line for line in loop) == 32]
    assert len(steps) == 4  # with a mask and without, in each of two warpgroups
    for step in steps:
        assert not re.search(r"\b(?:LDL|STL)\b", step)
        assert len(re.findall(r"\bR2UR\b", step)) <= 4  # of 32 products


@EVERY_WAY
def test_no_product_waits_for_the_one_before(monkeypatch, causal, fixed):
    found = launches(monkeypatch, "sm_90", 128, causal=causal, deterministic=fixed)
    code = offline.compiled(found[MAIN[causal]], "sm_90").text
    steps = re.findall(r"HGMMA\.64x(64|128)x16\S* .*gsb0|DEPBAR\.LE gsb0, 0x(\d)", code)
    order = "".join({"64": "m", "128": "M"}.get(product, wait) for product, wait in steps)
    # S and dP, a wait for each, dV; dQ and dK, a wait for dV, dQ and dK: in two loops of two warpgroups
    assert order.count("mm10MmM210") == 4, order


@EVERY_WAY
def test_no_barrier_shares_its_memory(monkeypatch, causal, fixed):
    # The compiler takes a barrier that no warp uses for dead once it is initialised, and puts other things there; but the
    # hardware may still write to it.
    found = launches(monkeypatch, "sm_90", 128, causal=causal, deterministic=fixed)
    ptx = offline.compiled(found[MAIN[causal]], "sm_90").ptx
    places = {register: int(place) for register, place in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    barriers = [places[register] for register in re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx)]
    others = set()
    for count, bits, place in re.findall(r"(?:st|ld)\.shared\.(?:v(\d)\.)?b(\d+)\s.*\[global_smem\+(\d+)\]", ptx):
        others |= set(range(int(place), int(place) + int(count or 1) * int(bits) // 8))
    assert len(barriers) == BARRIERS[causal]
    assert others
    assert not others & {place + i for place in barriers for i in range(8)}


def test_what_runs_before_and_after(monkeypatch):
    found = launches(monkeypatch, "sm_90", 128)
    for name in (BEFORE, AFTER):
        code = offline.compiled(found[name], "sm_90")
        assert code.spills == 0
        assert code.loads_wide


def test_sums_are_read_when_they_are_known_to_be_there(monkeypatch):
    launch = launches(monkeypatch, "sm_90", 128)[AFTER]
    assert dict(launch.options)["launch_pdl"]
    code = offline.compiled(launch, "sm_90").text
    order = re.findall(r"ACQBULK|LDG\.E\.STRONG\.GPU|ATOMG|CCTL\.IVALL|LDG\.E\.128", code)
    # The last program waits in any case; one that does not find all done waits, before the first sum is read.
    assert order[:4] in (
        ["ACQBULK", "LDG.E.STRONG.GPU", "CCTL.IVALL", "ACQBULK"],
        ["ACQBULK", "ATOMG", "CCTL.IVALL", "ACQBULK"],
    )
    assert set(order[4:]) == {"LDG.E.128"}


@pytest.mark.parametrize(
    ("target", "dim", "options"),
    [
        ("sm_90", 64, {"softcap": 5.0}),
        ("sm_90", 96, {"deterministic": False}),
        ("sm_90", 128, {"softcap": 5.0}),
        ("sm_90", 128, {"window_size": (5, 0)}),
        ("sm_80", 128, {}),
        ("gfx942", 128, {"deterministic": False}),
    ],
    ids=str,
)
def test_the_portable_kernels_compute_the_rest(monkeypatch, target, dim, options):
    assert not {BEFORE, *MAIN.values(), AFTER} & launches(monkeypatch, target, dim, **options).keys()


def test_what_is_written_and_read_under_a_condition():
    copy = """
        /*0010*/   VOTEU.ANY UP2, P0 ;
        /*0020*/   VOTEU.ANY UP4, P0 ;
        /*0030*/   @UP2 UMOV UR0, 0x10 ;
        /*0040*/   @UP4 UTMASTG.4D [UR0], [UR0] ;
        /*0050*/   EXIT ;
    """
    assert reads_unwritten(copy) == []
    for spoilt in (copy.replace("@UP4 ", ""), copy.replace("UMOV UR0", "UMOV UR1")):
        assert [(address, registers) for address, _, registers in reads_unwritten(spoilt)] == [("0040", [0])]
