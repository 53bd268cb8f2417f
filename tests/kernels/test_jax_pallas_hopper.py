"""Attention's kernels for Hopper without a GPU: which calls have them, where their tiles lie, and that JAX can lower them."""

import numpy as np
import pytest

import scree
from pallas_room import NAME, anywhere, jx
from scree.kernels import varlen_attention

pytestmark = pytest.mark.no_poison
LENGTHS = (130, 0, 5, 128, 1)


@pytest.fixture
def hopper(anywhere, monkeypatch):
    """Take JAX's device for a Hopper."""
    pytest.importorskip("absl")
    from scree.kernels.jax_pallas import _hopper

    if not _hopper._FIRST <= _jax().__version_info__ < _hopper._BEFORE:
        pytest.skip("this JAX's Mosaic GPU backend is another one")
    monkeypatch.setattr(_hopper, "here", lambda: True)


def _jax():
    return pytest.importorskip("jax")


def lowered(dim=128, dtype="bfloat16", tokens=300, batch=(), x64=False, sinks=False, **options):
    """The program of a training step for an NVIDIA GPU."""
    jax = _jax()

    def loss(q, k, v, q_offsets, k_offsets):
        given = scree.Array(q, q_offsets), *(scree.Array(x, k_offsets) for x in (k, v))
        logits = jax.numpy.zeros(4) if sinks else None
        out, lse = varlen_attention(*given, implementation=NAME, sinks=logits, return_lse=True, **options)
        return out.values.astype("float32").sum() + lse.values.sum()

    step = jax.grad(loss, argnums=(0, 1, 2))
    if batch:
        step = jax.vmap(step, in_axes=(0, 0, 0, None, None))
    arrays = (jax.ShapeDtypeStruct((*batch, *x, dim), dtype) for x in ((tokens, 4), (tokens + 7, 2), (tokens + 7, 2)))
    with jax.enable_x64(x64):
        offsets = (jax.ShapeDtypeStruct((5,), "int64" if x64 else "int32") for _ in range(2))
        traced = jax.jit(step).trace(*arrays, *offsets)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "given",
    [
        {"causal": True},
        {"dtype": "float16", "window_size": (100, 7)},
        {"causal": True, "window_size": (20, None), "sinks": True, "tokens": 20},
        {"causal": True, "x64": True},
        {"causal": True, "batch": (3,), "x64": True},
    ],
    ids=str,
)
def test_jax_lowers_them(jx, hopper, given):
    text = lowered(**given)
    assert text.count("@mosaic_gpu") == 3
    assert "triton" not in text


@pytest.mark.parametrize("given", [{"dim": 64}, {"dtype": "float32"}, {"softcap": 5.0}, {"scale": -0.1}], ids=str)
def test_other_calls_have_the_kernels_of_the_triton_backend(jx, hopper, given):
    try:
        text = lowered(**given)
    except RuntimeError as error:
        pytest.skip(f"this JAX compiles for no GPU that is not here: {error}")
    assert "@mosaic_gpu" not in text
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_only_a_hopper_has_them_and_only_the_versions_of_jax_they_are_written_for(jx, monkeypatch):
    from scree.kernels.jax_pallas import _hopper

    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(_hopper.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_hopper.jax, "devices", lambda: [Device])
    monkeypatch.setattr(_hopper, "find_spec", lambda name: name)
    found = {}
    for version in ((0, 10, 1), (0, 10, 2), (0, 11, 2), (0, 12, 0)):
        monkeypatch.setattr(_hopper.jax, "__version_info__", version)
        found[version] = _hopper.here()
    assert found == {(0, 10, 1): False, (0, 10, 2): True, (0, 11, 2): True, (0, 12, 0): False}
    monkeypatch.setattr(_hopper.jax, "__version_info__", (0, 11, 0))
    for capability in ("8.9", "10.0"):
        Device.compute_capability = capability
        assert not _hopper.here()
    Device.compute_capability = "9.0"
    monkeypatch.setattr(_hopper, "find_spec", lambda name: None)
    assert not _hopper.here()


@pytest.mark.parametrize("offsets", [np.cumsum((0, *LENGTHS)), (7, 9, 9, 200, 250, 251)], ids=str)
def test_every_token_is_in_one_tile_and_found_again(jx, offsets):
    from scree.kernels.jax_pallas import _hopper, _table

    total, other = 300, np.array((0, 3, 150, 400, 400, 401), np.int32)
    rows, others = _table.rows_of(jx.array(offsets, "int32"), total), _table.rows_of(jx.array(other, "int32"), 500)
    x = jx.array(np.arange(2 * total).reshape(2, total), "float32")
    np.testing.assert_array_equal(_hopper._of_tokens(_hopper._of_tiles(x, rows), rows), x)

    table = np.asarray(_table.table_of(rows, others, (None, 0), 128))
    there, seen = np.concatenate([[0], other, [500]]), np.zeros(total, int)
    first_tiles = np.concatenate([[0], np.cumsum(-(-np.diff(there) // 128))])
    bounds = np.concatenate([[0], offsets, [total]])
    for begin, first, length, k_begin, k_length, number, k_number in table[table[:, 1] < table[:, 2]]:
        seen[begin : begin + min(128, length - first)] += 1
        row = np.flatnonzero((bounds[:-1] <= begin) & (begin < bounds[1:])).item()
        assert (begin - first, length) == (bounds[row], bounds[row + 1] - bounds[row])
        assert (k_begin, k_number) == (there[row], first_tiles[row])
        assert k_length == (0 if row in (0, 6) else there[row + 1] - there[row])
        assert number * 128 + 128 <= _hopper._of_tiles(x, rows).shape[1]
    assert (seen == 1).all()
    assert len(set(table[:, 5])) == len(table)
