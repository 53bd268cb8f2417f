"""Other people's FlashAttention, on request: who is asked, and what each refuses. What they compute is in tests/gpu."""

import pytest

import scree
from cases import batch
from expect import raises
from scree import kernels
from scree.kernels import _dispatch
from scree.kernels._dispatch import TABLE
from scree.kernels._options import AttentionOptions
from test_compilers import need

NAMES = ("torch_varlen", "fa3", "fa4")
DEFAULTS = AttentionOptions(0.25)


@pytest.fixture
def th():
    return need("torch")


@pytest.fixture(params=NAMES)
def room(request, th, monkeypatch):
    """The module of one of them, as if its package were here and the device a Hopper."""
    import importlib

    module = importlib.import_module(f"scree.kernels.flash.{request.param}")
    parameters = ("q", "window_size", "enable_gqa")
    kept = {"function": lambda *given, **options: (given, options), "parameters": parameters}
    monkeypatch.setattr(module, "_KEPT", kept)
    monkeypatch.setattr(th.module.cuda, "get_device_capability", lambda device: (9, 0))
    return module


def arrays(th, features=(4, 64), key_features=None, lengths=(3, 2)):
    q = batch(th, lengths, features, dtype="float16")
    k = batch(th, lengths, key_features or features, dtype="float16")
    return q, k, k


def why_not(room, arrays, sinks=None, **options):
    return room.why_not("varlen_attention", *arrays, sinks, DEFAULTS._replace(**options))


def test_they_are_in_the_table_and_only_on_request():
    found = {impl.name: impl for impl in TABLE["varlen_attention"] if impl.on_request and impl.backends == ("torch",)}
    assert tuple(found) == NAMES
    assert all(impl.devices == ("cuda",) for impl in found.values())
    assert not any(impl.on_request for op, impls in TABLE.items() if op != "varlen_attention" for impl in impls)


@pytest.mark.parametrize("name", NAMES)
def test_they_refuse_the_cpu(th, name):
    q, k, v = arrays(th)
    with raises(NotImplementedError, "varlen_attention", f"{name}: serves device cuda, got cpu"):
        kernels.varlen_attention(q, k, v, implementation=name)


@pytest.mark.parametrize(("name", "package"), [("fa3", "flash_attn_interface"), ("fa4", "flash_attn")])
def test_they_say_which_package_is_missing(th, monkeypatch, name, package):
    table = tuple(impl._replace(devices=None) if impl.name == name else impl for impl in TABLE["varlen_attention"])
    monkeypatch.setitem(_dispatch.TABLE, "varlen_attention", table)
    monkeypatch.setitem(_dispatch._INSTALLED, package, False)
    with raises(NotImplementedError, f"{name}: needs {package}, which is not installed"):
        kernels.varlen_attention(*arrays(th), implementation=name)


def test_one_on_request_is_never_chosen(th, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("it was asked")

    first = _dispatch.Impl("mine", ".made_up", on_request=True)
    module = type("room", (), {"why_not": staticmethod(fail), "varlen_softmax": staticmethod(fail)})
    monkeypatch.setitem(_dispatch._MODULES, ".made_up", module)
    monkeypatch.setitem(_dispatch.TABLE, "varlen_softmax", (first, *TABLE["varlen_softmax"]))
    arr = batch(th, (3, 2), (4,))
    kernels.varlen_softmax(arr)
    with pytest.raises(AssertionError, match="it was asked"):
        kernels.varlen_softmax(arr, implementation="mine")


def test_a_plain_call_is_served(th, room):
    assert why_not(room, arrays(th)) is None
    assert why_not(room, arrays(th, (8, 64), (2, 64)), window_size=(5, 0)) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"return_lse": True}, "its LSE has no gradient"),
        ({"scale": 0.0}, "needs a scale of more than 0, got 0"),
        ({"scale": -0.5}, "needs a scale of more than 0, got -0.5"),
    ],
    ids=str,
)
def test_what_none_of_them_serves(th, room, options, says):
    assert says in why_not(room, arrays(th), **options)


def test_sinks_and_softcap(th, room):
    assert "it takes no sinks" in why_not(room, arrays(th), sinks=th.module.zeros(4))
    against = why_not(room, arrays(th), softcap=2.0)
    assert against == ("it takes no softcap" if room.__name__.endswith("torch_varlen") else None)


@pytest.mark.parametrize("width", [4, 12, 264])
def test_head_dims(th, room, width):
    assert f"its head_dim is a multiple of 8 up to 256, q has {width}" in why_not(room, arrays(th, (2, width)))


def test_head_dims_at_which_it_is_wrong(th, monkeypatch):
    from scree.kernels.flash import fa4

    monkeypatch.setattr(fa4, "_KEPT", {"function": print})
    monkeypatch.setattr(th.module.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not(fa4, arrays(th, (2, 192))) is None
    assert "it serves (64, 128, 192, 256) here, q has 72" in why_not(fa4, arrays(th, (2, 72)))


def test_the_values_own_head_dim(th, room):
    q, k, _ = arrays(th, (2, 64))
    v = k.with_values(th.module.zeros(5, 2, 128, dtype=th.module.float16))
    against = why_not(room, (q, k, v))
    assert against == "q and v need the same head_dim, got 64 and 128"


def test_nothing_to_compute_and_spare_memory(th, room):
    assert "it needs a token, q has none" in why_not(room, arrays(th, lengths=(0, 0)))
    spare = scree.with_capacity(arrays(th)[0], 3, 8)
    assert "unwritten, and q has a capacity" in why_not(room, (spare, spare, spare))


def test_a_last_axis_that_is_not_dense(th, room):
    q, k, v = arrays(th, (2, 32))
    assert "it needs a dense last axis, that of q has stride 2" in why_not(
        room, (q.with_values(th.module.zeros(5, 2, 64, dtype=th.module.float16)[..., ::2]), k, v)
    )


@pytest.mark.parametrize(("name", "says"), [("fa3", "Hopper (sm_90)"), ("fa4", "sm_90, sm_100 and sm_110")])
def test_devices(th, monkeypatch, name, says):
    import importlib

    module = importlib.import_module(f"scree.kernels.flash.{name}")
    monkeypatch.setattr(module, "_KEPT", {"function": print})
    monkeypatch.setattr(th.module.cuda, "get_device_capability", lambda device: (8, 0))
    against = why_not(module, arrays(th))
    assert says in against
    assert "this device is sm_80" in against


def test_head_dims_on_blackwell(th, monkeypatch):
    from scree.kernels.flash import fa4

    monkeypatch.setattr(fa4, "_KEPT", {"function": print})
    monkeypatch.setattr(th.module.cuda, "get_device_capability", lambda device: (10, 0))
    assert why_not(fa4, arrays(th, (2, 128))) is None
    assert "up to 128, q has 192" in why_not(fa4, arrays(th, (2, 192)))


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_a_package_that_does_not_load_says_why(th, monkeypatch, name):
    import importlib

    module = importlib.import_module(f"scree.kernels.flash.{name}")

    def broken(*_):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module, "_KEPT", {})
    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(th.module.cuda, "get_device_capability", lambda device: (9, 0))
    assert "cannot be imported: libcudart.so.13: cannot open" in why_not(module, arrays(th))


def test_a_pytorch_without_varlen_attn(th, monkeypatch):
    from scree.kernels.flash import torch_varlen

    monkeypatch.setattr(torch_varlen, "_KEPT", {"function": None, "parameters": ()})
    assert "PyTorch 2.11 or newer" in why_not(torch_varlen, arrays(th))


def test_transformations_are_refused(th, room):
    torch = th.module
    q, k, v = arrays(th)
    asked = []

    def loss(values):
        asked.append(why_not(room, (q.with_values(values), k, v)))
        return values.sum()

    torch.func.grad(loss)(q.values)
    assert asked == ["it has no rules for torch.func's transformations"]


def test_how_each_is_called(th, monkeypatch):
    """The arguments that reach the other library: a window of None is -1 for two of them, and causal a flag of its own."""
    from scree.kernels.flash import fa3, fa4, torch_varlen

    q, k, v = arrays(th, (4, 16), (2, 16))
    seen = {}

    def record(*given, **options):
        seen["given"], seen["options"] = given, options
        return given[0] * 2, None

    for module in (torch_varlen, fa3, fa4):
        monkeypatch.setattr(module, "_KEPT", {"function": record, "parameters": ("window_size", "enable_gqa")})
    causal = DEFAULTS._replace(causal=True)
    out = torch_varlen.attend(q, k, v, None, causal)
    assert out.offsets is q.offsets
    assert th.module.equal(out.values, q.values * 2)
    assert seen["options"] == {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}
    assert seen["given"][3].dtype is th.module.int32
    assert seen["given"][5:] == (3, 3)
    torch_varlen.attend(q, k, v, None, DEFAULTS._replace(window_size=(2, None)))
    assert seen["options"]["window_size"] == (2, -1)
    fa3.attend(q, k, v, None, causal)
    assert (seen["options"]["causal"], seen["options"]["window_size"]) == (True, (-1, -1))
    fa3.attend(q, k, v, None, causal._replace(window_size=(2, 5), softcap=3.0))
    assert (seen["options"]["causal"], seen["options"]["window_size"]) == (False, (2, 0))
    assert seen["options"]["softcap"] == 3.0
    fa4.attend(q, k, v, None, DEFAULTS._replace(window_size=(None, 0)))
    assert (seen["options"]["causal"], seen["options"]["window_size"]) == (True, (None, None))
    fa4.attend(q, k, v, None, DEFAULTS._replace(window_size=(4, None)))
    assert (seen["options"]["causal"], seen["options"]["window_size"]) == (False, (4, None))
    assert seen["options"]["max_seqlen_q"] == 3
