"""What the room numpy_blas promises beyond the suite: bits at sizes where libraries switch, accuracy, memory."""

import threading
import tracemalloc

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from scree import kernels
from scree.kernels.numpy_blas import _attention, _threads

pytestmark = pytest.mark.no_poison
NAME = "numpy_blas"


def arr_of(lengths, features, seed=0, dtype=np.float32):
    """Make an Array of normals on NumPy."""
    values = normal((sum(lengths), *features), seed).astype(dtype)
    return scree.Array(values, np.array(oracle.offsets_of(lengths), np.int32))


CALLS = {
    "softmax": lambda a: kernels.varlen_softmax(a, implementation=NAME).values,
    "sum": lambda a: kernels.varlen_reduce(a, "sum", implementation=NAME),
    "logsumexp": lambda a: kernels.varlen_reduce(a, "logsumexp", implementation=NAME),
    "rmsnorm": lambda a: kernels.varlen_rmsnorm(a, implementation=NAME).values,
    "layernorm": lambda a: kernels.varlen_layernorm(a, implementation=NAME).values,
}


@pytest.mark.parametrize("features", [(1,), (5,), (33,), (1100,)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_row_alone_at_many_sizes(name, features):
    lengths = (7, 130, 7, 1, 7, 130, 700)
    a = arr_of(lengths, features)
    out, cuts = CALLS[name](a), oracle.offsets_of(lengths)
    for i, row in enumerate(scree.unpack(a)):
        place = slice(cuts[i], cuts[i + 1]) if len(out) == len(a.values) else slice(i, i + 1)
        assert_same_bits(CALLS[name](scree.pack([row])), out[place])


@pytest.mark.parametrize("implementation", [NAME, "reference"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4"])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_foreign_byte_order(op, dtype, implementation):
    for features in ((), (33,)):
        a = arr_of((3, 0, 2), features).map(lambda x: (8 * x).astype(dtype))
        b = a.map(lambda x: x.astype(x.dtype.newbyteorder()))
        want, got = (kernels.varlen_reduce(x, op, implementation=implementation) for x in (a, b))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("lengths", [(1, 33, 17, 33, 5, 17), (200, 97, 200, 31), (800, 3, 520)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 16), (4, 2, 5), (3, 3, 64)])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (40, 3)}, {"softcap": 2.0}], ids=str)
def test_attention_of_a_row_alone_at_many_sizes(lengths, heads, kv_heads, dim, options):
    q, k, v = (arr_of(lengths, (h, dim), seed) for seed, h in enumerate((heads, kv_heads, kv_heads)))
    out, lse = kernels.varlen_attention(q, k, v, return_lse=True, implementation=NAME, **options)
    want = kernels.varlen_attention(q, k, v, implementation="reference", **options)
    assert_close(out.values, want.values, "float32")
    for i, rows in enumerate(zip(q, k, v, strict=True)):
        mine = [scree.pack([row]) for row in rows]
        alone, lse_alone = kernels.varlen_attention(*mine, return_lse=True, implementation=NAME, **options)
        assert_same_bits(alone.values, out[i])
        assert_same_bits(lse_alone.values, lse[i])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of the NaN
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [5, 100])
def test_a_key_that_is_hidden_does_not_count_whatever_it_is(n, bad):
    q, k, v = (arr_of((n,), (2, 8), seed) for seed in range(3))
    broken = k.values.copy()
    broken[-1, 0] = bad
    want = kernels.varlen_attention(q, k, v, causal=True, implementation=NAME).values
    got = kernels.varlen_attention(q, k.with_values(broken), v, causal=True, implementation=NAME).values
    assert_same_bits(got[:-1], want[:-1])
    assert_same_bits(got[-1, 1], want[-1, 1])
    assert np.isnan(got[-1, 0]).all()


def test_how_a_long_row_is_cut_depends_on_its_own_shape():
    a = arr_of((1200, 700, 300, 40), (4, 5))

    def attend(a):
        return kernels.varlen_attention(a, a, a, causal=True, implementation=NAME)

    together = attend(a)
    for i in range(4):
        assert_same_bits(attend(a[i : i + 1]).values, together[i])
    cut, _ = _attention._tasks(np.array([0, 1200, 1900]), np.array([0, 1200, 1900]), 4, 1)
    alone, _ = _attention._tasks(np.array([0, 1200]), np.array([0, 1200]), 4, 1)
    assert {(task.heads.start, task.heads.stop) for task in cut if task.n == 1200} == {
        (task.heads.start, task.heads.stop) for task in alone
    }
    assert len({task.heads.start for task in alone}) > 1


@pytest.mark.parametrize("features", [(), (64,)], ids=str)
def test_a_long_sum_is_no_long_row_of_additions(features):
    a = arr_of((200_000,), features).map(lambda x: np.abs(x) + 1)
    got = kernels.varlen_reduce(a, "sum", implementation=NAME)
    np.testing.assert_allclose(got[0], a.values.astype(np.float64).sum(0), rtol=1e-6)


def peak(call):
    """Return the bytes that a call holds at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_attention_needs_memory_of_the_order_of_the_tokens():
    def of(n, implementation=NAME):
        a = arr_of((n,), (2, 8))
        return peak(lambda: kernels.varlen_attention(a, a, a, causal=True, implementation=implementation))

    # Four times the tokens: at most four times the memory of the tokens, and never a square of them.
    assert of(4000) <= 4.5 * of(1000)
    assert of(4000) < 4000 * 4000 * 4 / 4 < of(4000, "reference")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf
@pytest.mark.parametrize("implementation", [NAME, pytest.param("numba", marks=pytest.mark.engines)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (70, 3)}], ids=str)
def test_a_value_that_is_hidden_does_not_count_whatever_it_is(options, bad, implementation):
    if implementation == "numba":
        pytest.importorskip("numba")
    q, k, v = (arr_of((5, 150, 5), (4 if seed == 0 else 2, 8), seed) for seed in range(3))
    broken, place = v.values.copy(), 5 + 90
    broken[[1, place], 0, 3] = bad
    want = kernels.varlen_attention(q, k, v, implementation=implementation, **options).values
    got = kernels.varlen_attention(q, k, v.with_values(broken), implementation=implementation, **options).values
    left, right = (200, 0) if "causal" in options else options["window_size"]
    token, query = np.arange(160), np.zeros(160, bool)
    query[max(1 - right, 0) : 5] = True  # of the first row, those that see its second token
    query |= (token >= max(place - right, 5)) & (token <= min(place + left, 154))
    seen = np.zeros(got.shape, bool)
    seen[query, :2, 3] = True  # the heads that read key head 0
    assert not np.isfinite(got[seen]).any()
    np.testing.assert_allclose(got[~seen], want[~seen], rtol=2e-5, atol=2e-6)
    assert_same_bits(got[155:], want[155:])


def on_threads(monkeypatch, count):
    """Compute attention on so many threads, however little there is to compute; return what they were asked for."""
    asked = []

    def share(tasks, work, threads):
        asked.append(threads)
        return _threads.share(tasks, work, threads)

    monkeypatch.setattr(_attention, "available", lambda: count)
    monkeypatch.setattr(_attention, "_WORTH_THREADS", 0)
    monkeypatch.setattr(_attention, "share", share)
    return asked


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1)])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (40, 3)}, {}], ids=str)
def test_the_number_of_threads_does_not_show(monkeypatch, heads, kv_heads, options):
    q, k, v = (arr_of((700, 3, 0, 3, 130), (h, 16), seed) for seed, h in enumerate((heads, kv_heads, kv_heads)))

    def attend():
        return kernels.varlen_attention(q, k, v, return_lse=True, implementation=NAME, **options)

    want = attend()
    for threads in (1, 2, 5):
        asked = on_threads(monkeypatch, threads)
        for a, b in zip(attend(), want, strict=True):
            assert_same_bits(a.values, b.values)
        assert asked == [threads]


def test_few_scores_start_no_threads(monkeypatch):
    a = arr_of((30, 40), (2, 8))
    monkeypatch.setattr(_threads, "ThreadPoolExecutor", lambda *_: pytest.fail("threads were started"))
    kernels.varlen_attention(a, a, a, implementation=NAME)


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [("OMP_NUM_THREADS", "1", 1), ("OPENBLAS_NUM_THREADS", "3", 2), ("OMP_NUM_THREADS", "0", 2), ("X", "1", 2)],
)
def test_as_many_threads_as_blas_is_told_to_use(monkeypatch, name, value, want):
    for known in _threads._LIMITS:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setattr(_threads.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setenv(name, value)
    assert _threads.available() == want


def test_what_goes_wrong_on_another_thread_is_raised_and_what_numpy_is_told_holds_there():
    here, both = threading.get_ident(), threading.Barrier(2)

    def work(tasks):
        next(tasks)
        both.wait(10)  # so that each thread has one
        if threading.get_ident() != here:
            np.float32(3e38) * np.float32(10)

    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        _threads.share([1, 2], work, 2)


def test_this_thread_takes_the_first_tasks_and_the_others_the_last():
    here, both, taken = threading.get_ident(), threading.Barrier(2), {}

    def work(tasks):
        taken[threading.get_ident()] = next(tasks)
        both.wait(10)  # so that each thread has one

    _threads.share([1, 2, 3], work, 2)
    assert taken.pop(here) == 1
    assert list(taken.values()) == [3]


def test_every_task_is_computed_once():
    done = []
    _threads.share(list(range(500)), done.extend, 4)
    assert sorted(done) == list(range(500))
