"""to_tensorflow, from_tensorflow: a job of its own, since TensorFlow is heavy."""

import numpy as np
import pytest

import scree
from expect import raises

pytestmark = [pytest.mark.tensorflow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
bridges = scree.bridges

DTYPES = ["bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@pytest.fixture(scope="module")
def tf():
    """TensorFlow, which SCREE_REQUIRE makes a must in its job."""
    return pytest.importorskip("tensorflow")


def numpy_dtype(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def make(dtype, features=(2,), offsets=np.int32):
    shape = (9, *features)
    values = (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(numpy_dtype(dtype))
    return scree.Array(values, np.array([0, 0, 3, 4, 9, 9], offsets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [(), (2,), (2, 3)])
@pytest.mark.parametrize("offsets", [np.int32, np.int64])
def test_round_trip(tf, dtype, features, offsets):
    arr = make(dtype, features, offsets)
    ragged = bridges.to_tensorflow(arr)
    assert isinstance(ragged, tf.RaggedTensor)
    assert ragged.dtype == getattr(tf, dtype)
    assert ragged.row_splits.dtype == offsets
    for got, want in zip(ragged, arr, strict=True):
        assert got.numpy().tobytes() == want.tobytes()
    back = bridges.from_tensorflow(ragged)
    assert back.dtype == arr.dtype
    assert back.offsets.dtype == offsets
    assert back.values.tobytes() == arr.values.tobytes()
    np.testing.assert_array_equal(back.offsets, arr.offsets)


def test_ordinary_values(tf):
    for lengths in ([], [0, 0], [3]):
        arr = scree.from_lengths(np.ones(sum(lengths), np.float32), lengths)
        back = bridges.from_tensorflow(bridges.to_tensorflow(arr))
        assert back.batch_size == len(lengths)
    strange = scree.Array(np.arange(6, dtype=">f4")[::-1], np.array([0, 6]))
    assert bridges.to_tensorflow(strange).flat_values.numpy().tolist() == [5, 4, 3, 2, 1, 0]
    full = scree.with_capacity(make("float32"), 7, 20)
    assert bridges.to_tensorflow(full).flat_values.shape == (9, 2)


def test_what_is_refused(tf):
    with raises(TypeError, "from_tensorflow", "ndarray"):
        bridges.from_tensorflow(np.ones(3))
    with raises(ValueError, "ragged_rank 2", "needs 1"):
        bridges.from_tensorflow(tf.ragged.constant([[[1], [2, 3]], []]))
    with raises(TypeError, "string"):
        bridges.from_tensorflow(tf.ragged.constant([["a"], []]))
    wrong = tf.RaggedTensor.from_row_splits(tf.ones(6), tf.constant([0, 4, 2, 6]), validate=False)
    with raises(ValueError, "offsets[2]"):
        bridges.from_tensorflow(wrong)
    with raises(ValueError, "ragged_dim", 1):
        bridges.to_tensorflow(scree.Array(np.ones((2, 3)), [0, 3], 1))


def test_inside_of_a_tf_function(tf):
    ragged = bridges.to_tensorflow(make("float32"))

    @tf.function
    def inside(x):
        with raises(NotImplementedError, "from_tensorflow", "symbolic"):
            bridges.from_tensorflow(x)
        return x

    inside(ragged)


def test_unsigned_offsets(tf):
    ragged = bridges.to_tensorflow(make("float32", offsets=np.uint16))
    assert ragged.row_splits.dtype == tf.int64


def test_dtypes_that_tensorflow_lacks(tf):
    del tf
    with raises(TypeError, "to_tensorflow", "datetime64", "does not have"):
        bridges.to_tensorflow(scree.Array(np.zeros(2, "datetime64[s]"), [0, 2]))
