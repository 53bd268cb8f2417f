"""The table of implementations: who is chosen, who is refused, and the reasons."""

import types

import numpy as np
import pytest

import conftest
import scree
from cases import batch
from expect import raises
from scree import kernels
from scree._backends import FRAMEWORKS
from scree.kernels import _dispatch, _recall
from scree.kernels._dispatch import TABLE, Impl

PUBLIC = [name for name in kernels.__all__ if name.startswith("varlen_") and not name.endswith("_triton")]


def test_the_table_has_every_op_and_the_reference_last():
    assert sorted(TABLE) == sorted(PUBLIC)
    for op, impls in TABLE.items():
        assert impls[-1].name == "reference", op
        assert (impls[-1].backends, impls[-1].devices, impls[-1].dtypes) == (None, None, None)
        names = [impl.name for impl in impls]
        assert len(set(names)) == len(names)
        for impl in impls:
            assert set(impl.backends or ()) <= set(FRAMEWORKS)


@pytest.mark.parametrize("op", PUBLIC)
def test_the_reference_is_public(op):
    assert callable(getattr(kernels.reference, op))
    assert callable(getattr(kernels, op))


@pytest.fixture
def room(monkeypatch):
    """Stand a made-up implementation first in the table of varlen_softmax; return what it is asked and its answer."""
    asked = []
    module = types.ModuleType("scree.kernels._made_up")
    module.answer = None

    def why_not(op, *args, **options):
        asked.append(op)
        return module.answer

    module.why_not = why_not
    module.varlen_softmax = lambda arr: arr.with_values(arr.values * 0 + 42)
    monkeypatch.setitem(_dispatch._MODULES, "._made_up", module)

    def stand(**facts):
        impl = Impl("made up", "._made_up", **facts)
        monkeypatch.setitem(_dispatch.TABLE, "varlen_softmax", (impl, *TABLE["varlen_softmax"]))

    return types.SimpleNamespace(module=module, asked=asked, stand=stand)


def softmax(xp, **options):
    """Call the front door; return one value of the result."""
    return float(xp.to_np(kernels.varlen_softmax(batch(xp, (1,), ()), **options).values)[0])


def test_the_first_that_fits_is_chosen(xp, room):
    room.stand()
    assert softmax(xp) == 42
    assert room.asked == ["varlen_softmax"]
    assert softmax(xp, implementation="made up") == 42
    assert softmax(xp, implementation="reference") == 1


def test_one_that_says_no_is_passed_over(xp, room):
    room.stand()
    room.module.answer = "head dim 7 is odd"
    assert softmax(xp) == 1
    with raises(NotImplementedError, "varlen_softmax", "made up", "head dim 7 is odd"):
        softmax(xp, implementation="made up")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"backends": ("no such",)}, ("no such",)),
        ({"devices": ("tpu",)}, ("tpu",)),
        ({"dtypes": ("float8",)}, ("float8", "float32")),
    ],
    ids=str,
)
def test_coarse_facts_say_no_without_an_import(xp, room, facts, words):
    room.stand(**facts)
    assert softmax(xp) == 1
    with raises(NotImplementedError, "varlen_softmax", "made up", *words):
        softmax(xp, implementation="made up")
    assert room.asked == []


def test_every_reason_is_listed(xp, room):
    room.stand(backends=("no such",), dtypes=("float8",))
    with raises(NotImplementedError, "no such", "float8"):
        softmax(xp, implementation="made up")


def test_an_unknown_name_lists_the_known(xp, room):
    room.stand()
    with raises(ValueError, "varlen_softmax", "implementation", "other", "made up", "reference"):
        softmax(xp, implementation="other")


def test_facts_that_fit(xp, room):
    arr = batch(xp, (1,), ())
    room.stand(backends=(xp.name,), dtypes=("float32",))
    assert softmax(xp) == 42
    assert float(xp.to_np(kernels.varlen_softmax(arr.astype("float16")).values)[0]) == 1


def test_those_who_say_no_here_say_why(xp):
    """Each implementation of the table that cannot serve this framework is refused with a reason."""
    for op, impls in TABLE.items():
        for impl in impls:
            if impl.backends is None or xp.name in impl.backends:
                continue
            arr = batch(xp, (2, 1), (2, 4))
            more = {
                "varlen_attention": (arr, arr),
                "varlen_reduce": ("sum",),
                "varlen_rope": (arr.values[:, 0, :2],) * 2,
            }
            with raises(NotImplementedError, op, impl.name):
                getattr(kernels, op)(arr, *more.get(op, ()), implementation=impl.name)


def test_the_suite_runs_every_implementation_that_serves(xp):
    for op in TABLE:
        assert "reference" in conftest.implementations(op, xp)


def test_bad_arguments_are_refused_before_anyone_is_asked(xp, room):
    room.stand()
    with raises(TypeError, "varlen_softmax"):
        kernels.varlen_softmax(np.zeros(3) if xp.name == "numpy" else xp.array(np.zeros(3)))
    assert room.asked == []
    assert isinstance(kernels.varlen_softmax(batch(xp, (1,), ())), scree.Array)


def test_a_call_that_is_made_again_is_neither_checked_nor_asked_about(xp, room):
    room.stand()
    arr = batch(xp, (1, 2), ())
    for _ in range(3):
        kernels.varlen_softmax(arr)
        kernels.varlen_softmax(arr.with_values(arr.values * 2))
    assert room.asked == ["varlen_softmax"]
    kernels.varlen_softmax(arr.with_values(xp.array(np.ones((3, 2)), "float32")))
    kernels.varlen_softmax(batch(xp, (1, 2), ()))
    assert room.asked == ["varlen_softmax"] * 3


def test_what_differs_is_checked_whatever_was_called_before(xp):
    arr = batch(xp, (1, 2), (2, 4))
    heads = arr.values
    ones = {size: xp.array(np.ones(size), "float32") for size in ((4,), (5,), (3, 2), (2, 2))}
    cos = ones[3, 2]
    kernels.varlen_layernorm(arr, ones[4,])
    kernels.varlen_rope(arr, cos, cos, start=0)
    kernels.varlen_attention(arr, arr, arr, window_size=(1, None))
    kernels.varlen_reduce(arr, "sum")
    with raises(ValueError, "varlen_layernorm", "weight", "(5,)"):
        kernels.varlen_layernorm(arr, ones[5,])
    with raises(ValueError, "varlen_layernorm", "bias", "(5,)"):
        kernels.varlen_layernorm(arr, None, ones[5,])
    with raises(ValueError, "varlen_layernorm", "eps"):
        kernels.varlen_layernorm(arr, ones[4,], eps=-1.0)
    with raises(TypeError, "varlen_layernorm", "weight", "list"):
        kernels.varlen_layernorm(arr, [1.0] * 4)
    with raises(ValueError, "varlen_rope", "cos", "positions"):
        kernels.varlen_rope(arr, cos, cos, start=2)
    with raises(ValueError, "varlen_rope", "cos"):
        kernels.varlen_rope(arr, ones[2, 2], ones[2, 2], start=1)
    for odd in (0.0, False):
        with raises(TypeError, "start"):
            kernels.varlen_rope(arr, cos, cos, start=odd)
    with raises(TypeError, "window_size left"):
        kernels.varlen_attention(arr, arr, arr, window_size=(1.0, None))
    with raises(ValueError, "head"):
        kernels.varlen_attention(arr, arr.with_values(heads[:, :, :2]), arr)
    with raises(ValueError, "varlen_reduce", "op"):
        kernels.varlen_reduce(arr, "product")
    with raises(ValueError, "implementation"):
        kernels.varlen_reduce(arr, "sum", implementation="none such")


def test_a_weight_is_no_bias(xp):
    arr, vector = batch(xp, (1, 2), (4,)), xp.array(np.arange(4.0), "float32")
    scaled, shifted = kernels.varlen_layernorm(arr, vector), kernels.varlen_layernorm(arr, None, vector)
    plain = xp.to_np(kernels.varlen_layernorm(arr).values)
    np.testing.assert_allclose(xp.to_np(scaled.values), plain * np.arange(4), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(xp.to_np(shifted.values), plain + np.arange(4), rtol=1e-5, atol=1e-6)


def test_little_is_kept_of_options_that_change_at_every_call(xp, monkeypatch):
    monkeypatch.setattr(_recall, "_MOST_KEPT", 8)
    arr = batch(xp, (1,), (4,))
    kept = []
    for i in range(20):
        kernels.varlen_rmsnorm(arr, eps=1e-6 * (i + 1))
        kept.append(len(arr._structure.derived))
    assert 0 < min(kept) and max(kept) <= 8
    heads = batch(xp, (1,), (1, 4))
    for i in range(20):
        kernels.varlen_attention(heads, heads, heads, scale=1e-3 * (i + 1))
    assert len(heads._structure.derived) <= 8
    assert len(_recall.CHOSEN) <= 8 or xp.name != "torch"
