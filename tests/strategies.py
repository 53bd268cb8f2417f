"""What hypothesis draws: raggedness, features, masks, and batches as plain lists of rows."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

lengths = st.lists(st.integers(0, 5), max_size=6)
some_lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6)
features = st.lists(st.integers(1, 3), max_size=2).map(tuple)
sides = st.sampled_from(["left", "right"])


@st.composite
def batches(draw, dtypes, lengths=some_lengths):
    """Draw (rows, dtype, ragged_dim): rows as NumPy arrays whose ragged axis is ``ragged_dim``, every value distinct."""
    sizes = draw(lengths)
    feature = draw(features)
    dtype = draw(st.sampled_from(dtypes))
    ragged_dim = draw(st.integers(0, len(feature)))
    rows, first = [], 1
    for size in sizes:
        shape = (*feature[:ragged_dim], size, *feature[ragged_dim:])
        count = int(np.prod(shape))
        # All below 128, so that every dtype of the suite holds them exactly.
        rows.append(
            (np.arange(first, first + count) % 100).reshape(shape).astype("bool" if dtype == "bool" else "int64")
        )
        first += count
    return rows, dtype, ragged_dim


@st.composite
def masks(draw):
    """Draw a bool mask of any shape and pattern."""
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 5)))
    bits = draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(bits, bool).reshape(shape)


def check(xp, prop, **strategies):
    """Run a property with as many examples as the framework is worth; the same ones every time."""
    few = settings(
        max_examples=xp.examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    few(given(**strategies)(prop))()
