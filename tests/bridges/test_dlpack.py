"""to_numpy, to_torch, to_jax, to_mlx: every framework to every other, exactly."""

import sys

import numpy as np
import pytest

import conftest
import scree
from expect import assert_same_bits, raises
from frameworks import np_dtype
from scree import bridges
from scree._backends import FRAMEWORKS

LENGTHS = (0, 3, 1, 5, 0)
OFFSETS = np.array([0, 0, 3, 4, 9, 9])
TO = {name: getattr(bridges, f"to_{name}") for name in FRAMEWORKS}
HERE = list(conftest.HERE.values())
OTHERS = [x for x in HERE if x.name != "numpy"]

into = pytest.mark.parametrize("target", HERE, ids=str)
beyond_numpy = pytest.mark.parametrize("target", OTHERS, ids=str)


def harness(name):
    if name not in conftest.HERE:
        pytest.skip(f"needs {name}")
    return conftest.HERE[name]


def data(dtype, shape=(9, 2)):
    return (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(np_dtype(dtype))


def make(xp, dtype="float32", offsets_dtype="int32"):
    return scree.Array(xp.array(data(dtype), dtype), xp.array(OFFSETS, offsets_dtype))


def read(xp, x):
    return xp.to_np(np.asarray(x) if xp.name == "numpy" else x)


def assert_holds(target, arr, dtype, values, offsets=OFFSETS, offsets_dtype="int32"):
    assert target.is_array(arr.values)
    assert target.is_array(arr.offsets)
    assert target.dtype_of(arr.values) == dtype
    assert target.dtype_of(arr.offsets) == offsets_dtype
    np.testing.assert_array_equal(target.to_np(arr.offsets), offsets)
    wanted = values.astype(np.float32) if dtype == "bfloat16" else values
    assert_same_bits(target.to_np(arr.values), wanted)


def test_one_bridge_for_every_framework():
    assert {f"to_{name}" for name in FRAMEWORKS} <= set(bridges.__all__)


@into
def test_round_trips_are_exact(xp, any_dtype, target):
    arr = make(xp, any_dtype)
    if any_dtype not in target.dtypes:
        if any_dtype.endswith("64"):
            with raises(ValueError, f"to_{target.name}", any_dtype, "narrow", "astype"):
                TO[target.name](arr)
        return  # bfloat16 of CuPy: tests/gpu
    there = TO[target.name](arr)
    assert_holds(target, there, any_dtype, data(any_dtype))
    back = TO[xp.name](there)
    assert_holds(xp, back, any_dtype, data(any_dtype))
    assert (there is arr) == (xp is target)


@into
def test_wide_offsets(xp, target):
    given = "int64" if "int64" in xp.dtypes else "int16"
    there = TO[target.name](make(xp, offsets_dtype=given))
    kept = given if given in target.dtypes else "int32"
    assert_holds(target, there, "float32", data("float32"), offsets_dtype=kept)
    part = there[1:3]  # the offsets on the host went along in a dtype that this framework has
    np.testing.assert_array_equal(target.to_np(part.lengths), LENGTHS[1:3])


@into
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_offsets(target, dtype):
    arr = scree.Array(data("float32"), OFFSETS.astype(dtype))
    there = TO[target.name](arr)
    np.testing.assert_array_equal(target.to_np(there.offsets), OFFSETS)
    np.testing.assert_array_equal(target.to_np(there[1:3].lengths), LENGTHS[1:3])
    if target.name == "torch":
        assert target.dtype_of(there.offsets) == "int64"


@beyond_numpy
@pytest.mark.parametrize("code", ["l", "q", "L", "Q"])
def test_both_64_bit_integers_of_c(target, code):
    if np.dtype(code).name in target.dtypes or target.name == "torch":
        there = TO[target.name](scree.Array(np.arange(3, dtype=code), [0, 3]))
        assert bridges.to_numpy(there).values.tolist() == [0, 1, 2]
    else:
        assert target.name in ("jax", "mlx")


@into
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (2, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_empty_rows_and_the_ragged_dim(xp, target, lengths, ragged_dim):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = data("float32", (int(offsets[-1]), 3) if ragged_dim == 0 else (3, int(offsets[-1])))
    there = TO[target.name](scree.Array(xp.array(values), xp.array(offsets), ragged_dim))
    assert there.ragged_dim == ragged_dim
    assert_holds(target, there, "float32", values, offsets)
    assert (there.batch_size, there.max_length) == (len(lengths), max(lengths, default=0))


@into
def test_what_the_host_knows_goes_along(xp, target):
    arr = scree.from_cu_seqlens(xp.array(data("float32")), xp.array(OFFSETS, "int32"), max_length=8)
    there = TO[target.name](arr)
    assert there.max_length == 8
    known = make(xp)
    assert (known.max_length, known.min_length) == (5, 0)
    there = TO[target.name](known)
    assert there._structure.max_length == 5
    assert there._structure.min_length == 0
    assert there._structure.host is not None


@into
def test_capacity_stays(xp, target):
    arr = scree.with_capacity(make(xp), 8, 16)
    there = TO[target.name](arr)
    assert there._structure.spare
    assert (there.batch_size, there.total_length) == (8, 16)
    assert [len(row) for row in scree.unpack(there)] == [*LENGTHS, 0, 0, 0]


@into
def test_offsets_that_the_host_sees_now_are_checked(xp, target):
    if (
        xp.checks_at_construction
        or not target.checks_at_construction
        or {xp.device_kind, target.device_kind} != {"cpu"}
    ):
        return
    arr = scree.Array(xp.array(data("float32")), xp.array([0, 0, 4, 3, 9, 9], "int32"))
    with raises(ValueError, "offsets[3]", "fall"):
        TO[target.name](arr)
    bound = scree.from_cu_seqlens(xp.array(data("float32")), xp.array(OFFSETS, "int32"), max_length=4)
    with raises(ValueError, "max_length", "4", "5"):
        TO[target.name](bound)


@into
def test_arguments(xp, target):
    to = TO[target.name]
    with raises(TypeError, f"to_{target.name}", "scree.Array"):
        to(xp.array([1.0, 2.0]))


@pytest.mark.parametrize("name", [n for n in FRAMEWORKS if n != "numpy"])
def test_a_missing_framework_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, FRAMEWORKS[name][0], None)
    with raises(ImportError, f"to_{name}", f'pip install "scree[{name}]"'):
        TO[name](scree.Array(np.zeros(2), [0, 2]))


# NumPy arrays as they come


@beyond_numpy
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("negative strides", lambda x: x[::-1]),
        ("negative strides within", lambda x: x[:, ::-1]),
        ("every other", lambda x: np.repeat(x, 2, axis=0)[::2]),
        ("column order", np.asfortranarray),
        ("broadcast", lambda x: np.broadcast_to(x[:1], x.shape)),
        ("foreign byte order", lambda x: x.astype(x.dtype.newbyteorder())),
        ("a field of records", lambda x: _field(x)),
        ("read-only", lambda x: _read_only(x)),
        ("a slice of records, unaligned", lambda x: _unaligned(x)),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_numpy_arrays_of_every_layout(target, kind, change):
    values = change(data("float32"))
    offsets = change(OFFSETS.astype(np.int32)[:, None])[:, 0] if kind in ("every other", "read-only") else OFFSETS
    offsets = np.asarray(offsets, OFFSETS.astype(np.int32).dtype)
    there = TO[target.name](scree.Array(values, offsets))
    assert_holds(target, there, "float32", np.ascontiguousarray(values, np.float32))


def _field(x):
    records = np.zeros(x.shape, [("a", np.int8), ("b", x.dtype)])
    records["b"] = x
    return records["b"]


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def _unaligned(x):
    return np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def test_read_only_memory_is_never_lent_to_torch():
    torch = harness("torch").module
    values = _read_only(data("float32"))
    there = bridges.to_torch(scree.Array(values, _read_only(OFFSETS)))
    there.values.zero_()
    there.offsets.zero_()
    assert values.any()
    assert isinstance(there.values, torch.Tensor)


@beyond_numpy
@pytest.mark.parametrize("values", [np.zeros(2, "datetime64[s]"), np.zeros(2, "U3"), np.zeros(2, "longdouble")])
def test_dtypes_that_the_other_lacks(target, values):
    with raises(TypeError, f"to_{target.name}", values.dtype.name, "does not have"):
        TO[target.name](scree.Array(values, [0, 2]))


def test_mlx_has_no_complex128():
    harness("mlx")
    with raises(ValueError, "to_mlx", "complex128"):
        bridges.to_mlx(scree.Array(np.zeros(2, complex), [0, 2]))


def test_mlx_on_a_gpu_has_no_float64(monkeypatch):
    mx = harness("mlx").module
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    with raises(ValueError, "to_mlx", "float64"):
        bridges.to_mlx(scree.Array(np.zeros(2), [0, 2]))


def test_mlx_keeps_every_bit_of_float64():
    mlx = harness("mlx")
    if "float64" not in mlx.dtypes:
        pytest.skip("float64 is on MLX's CPU only")
    values = np.array([1 + 2.0**-52, np.pi])
    for given in (values, values[::-1]):
        assert_same_bits(mlx.to_np(bridges.to_mlx(scree.Array(given, [0, 2])).values), given.copy())


# JAX's 64-bit types


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_jax_narrows_nothing(dtype):
    jax = harness("jax").module
    arr = scree.Array(data(dtype), OFFSETS)
    if not jax.config.jax_enable_x64:
        with raises(ValueError, "to_jax", dtype, "jax_enable_x64"):
            bridges.to_jax(arr)
    with jax.enable_x64(True):
        there = bridges.to_jax(arr)
        assert there.dtype == dtype
        assert there.offsets.dtype == "int64"
        assert_same_bits(np.asarray(there.values), data(dtype))


@into
def test_offsets_beyond_int32(target):
    arr = scree.Array(np.zeros((2**31 + 5, 0), np.float32), np.array([0, 5, 2**31 + 5]))  # no memory
    if "int64" not in target.dtypes:
        with raises(ValueError, f"to_{target.name}", str(2**31 + 5), "jax_enable_x64"):
            TO[target.name](arr)
    elif target.name in ("numpy", "torch"):  # MLX counts an axis in 32 bits
        there = TO[target.name](arr)
        assert there.offsets.tolist() == [0, 5, 2**31 + 5]
        assert there.max_length == 2**31


# Memory


def test_torch_shares_host_memory():
    torch = harness("torch").module
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        arr = scree.Array(torch.ones(4096, 2).to(dtype), torch.tensor([0, 1, 4096]))
        if dtype != torch.bfloat16 or "ml_dtypes" in sys.modules:
            host = bridges.to_numpy(arr)
            assert host.values.ctypes.data == arr.values.data_ptr()
            assert host.offsets.ctypes.data == arr.offsets.data_ptr()
            assert bridges.to_torch(host).values.data_ptr() == arr.values.data_ptr()
    for name in ("jax", "mlx"):
        if name in conftest.HERE and conftest.HERE[name].device_kind == "cpu":
            arr = scree.Array(conftest.HERE[name].array(data("float32")), conftest.HERE[name].array(OFFSETS, "int32"))
            there = bridges.to_torch(arr)
            host = bridges.to_numpy(arr)
            assert there.values.data_ptr() == host.values.ctypes.data
            assert not host.values.flags.writeable
            assert not host.offsets.flags.writeable


def test_jax_shares_the_memory_of_torch():
    harness("jax")
    torch = harness("torch").module
    values = torch.arange(4096.0)
    there = bridges.to_jax(scree.Array(values, torch.tensor([0, 4096], dtype=torch.int32)))
    assert there.values.unsafe_buffer_pointer() == values.data_ptr()


@beyond_numpy
def test_torch_tensors_of_every_layout(target):
    torch = harness("torch").module
    full = torch.arange(36.0).reshape(9, 4)
    offsets = torch.from_numpy(OFFSETS).int()
    layouts = {
        "every other column": full[:, ::2],
        "transposed": full.reshape(4, 9).T,
        "expanded": full[:1].expand(9, 4),
        "from the middle": torch.arange(40.0)[3:39].reshape(9, 4),
        "conjugate": torch.complex(full, full + 1).conj(),
        "negative": torch.complex(full, full + 1).conj().imag,
    }
    for kind, values in layouts.items():
        there = TO[target.name](scree.Array(values, offsets))
        wanted = values.resolve_conj().resolve_neg().numpy()
        got = values.numpy(force=True) if target.name == "torch" else target.to_np(there.values)
        np.testing.assert_array_equal(got, wanted, err_msg=kind)


def test_mlx_arrays_of_every_layout(xp):
    mx = harness("mlx").module
    full = mx.arange(36).astype(mx.float32).reshape(9, 4)
    offsets = mx.array(OFFSETS.astype(np.int32))
    for values in (full[:, ::2], full.reshape(4, 9).T, mx.broadcast_to(full[:1], (9, 4)), full[::-1]):
        there = TO[xp.name](scree.Array(values, offsets))
        np.testing.assert_array_equal(xp.to_np(there.values), np.array(values))


# float8 where both sides have it


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype):
    torch = harness("torch").module
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(9).astype(getattr(ml_dtypes, dtype))
    arr = scree.Array(values, OFFSETS.astype(np.int32))
    there = bridges.to_torch(arr)
    assert there.dtype == getattr(torch, dtype)
    assert_same_bits(bridges.to_numpy(there).values, values)
    if "jax" in conftest.HERE:
        assert_same_bits(np.asarray(bridges.to_jax(there).values), values)
        assert bridges.to_torch(bridges.to_jax(arr)).dtype == getattr(torch, dtype)
    if "mlx" in conftest.HERE:
        with raises(TypeError, "to_mlx", dtype):
            bridges.to_mlx(there)


def test_bfloat16_needs_ml_dtypes_in_numpy(monkeypatch):
    torch = harness("torch").module
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with raises(ImportError, "to_numpy", "bfloat16", "ml_dtypes"):
        bridges.to_numpy(scree.Array(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([0, 2])))


# Gradients and traces


@into
def test_tensors_that_need_gradients(target):
    torch = harness("torch").module
    leaf = torch.nn.Parameter(torch.arange(9.0))
    for values in (leaf, leaf * 2):
        arr = scree.Array(values, torch.from_numpy(OFFSETS).int())
        there = TO[target.name](arr)
        if target.name == "torch":
            assert there is arr
        else:
            np.testing.assert_array_equal(target.to_np(there.values), values.detach().numpy())
    assert leaf.requires_grad
