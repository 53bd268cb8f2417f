"""The room jax_pallas without a GPU: what its tests share."""

import pytest

import oracle
import scree
from cases import normal
from scree.kernels import _dispatch
from test_compilers import need

NAME = "jax_pallas"


@pytest.fixture
def jx():
    """JAX, which takes calls of this room anywhere."""
    return need("jax")


@pytest.fixture
def anywhere(jx, monkeypatch):
    """Serve every device: what is not an NVIDIA GPU gets the tiles of jax_xla."""
    from scree.kernels import jax_pallas

    for op, impls in _dispatch.TABLE.items():
        served = tuple(impl._replace(devices=None) if impl.name == NAME else impl for impl in impls)
        monkeypatch.setitem(_dispatch.TABLE, op, served)
    monkeypatch.setattr(jax_pallas, "why_not_here", lambda: None)


@pytest.fixture
def interpreted(anywhere, monkeypatch):
    """Run the kernels in the interpreter."""
    if not hasattr(pytest.importorskip("jax.experimental.pallas.triton"), "load"):
        pytest.skip("this JAX's Pallas is too old")
    from scree.kernels.jax_pallas import _attention, _where

    for module in (_attention, _where):
        monkeypatch.setattr(module, "INTERPRET", True)


def arr_of(jx, lengths, features, seed=0, dtype="float32"):
    """Make an Array of normals."""
    values = jx.array(normal((sum(lengths), *features), seed), dtype)
    return scree.Array(values, jx.array(oracle.offsets_of(lengths), "int32"))


def for_bits(jx, fn):
    """Compile attention whose bits are compared: XLA's older code for the CPU rounds the same row otherwise elsewhere."""
    return lambda *given: jx.module.jit(fn).lower(*given).compile({"xla_backend_optimization_level": 0})(*given)
