"""Drawing an Array: what is on the axes is what is in the rows."""

import sys

import numpy as np
import pytest

import scree
from expect import raises

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def ax():
    """Axes of a figure that pyplot does not know."""
    from matplotlib.figure import Figure

    return Figure().subplots()


def image_of(ax):
    (image,) = ax.images
    return image.get_array()


def test_the_rows_are_drawn(xp, floating, ax):
    arr = scree.pack([xp.array([1, 2, 3], floating), xp.array([], floating), xp.array([4], floating)])
    assert scree.plot(arr, ax) is ax
    image = image_of(ax)
    assert image.filled(-1).tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert ax.get_title(loc="left") == "3 rows, lengths 0 to 3"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2"]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 3), (3, 0))
    assert ax.figure.axes[1].get_ylabel() == "value"


def test_features_are_drawn_by_their_norm(xp, ax):
    arr = scree.Array(xp.array([[3, 0, 1], [4, 0, 0]], "float32"), [0, 2, 3], ragged_dim=1)
    scree.plot(arr, ax)
    assert image_of(ax).filled(-1).tolist() == [[5, 0], [1, -1]]
    assert ax.figure.axes[1].get_ylabel() == "norm of the features"


def test_many_rows_are_thinned(ax):
    arr = scree.from_lengths(np.repeat(np.arange(200.0), 2), [2] * 200)
    scree.plot(arr, ax, max_rows=5)
    assert image_of(ax)[:, 0].tolist() == [0, 50, 100, 149, 199]
    assert ax.get_title(loc="left") == "5 of 200 rows, lengths 2 to 2"


def test_long_rows_are_thinned(ax):
    scree.plot(scree.from_lengths(np.arange(100_000.0), [99_999, 1]), ax)
    image = image_of(ax)
    assert image.shape[1] <= 4096
    assert image[0, 1] == -(-99_999 // 4096)
    assert image.mask[1].tolist() == [False] + [True] * (image.shape[1] - 1)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_draw(lengths, ax):
    scree.plot(scree.from_lengths(np.zeros(0), lengths), ax)
    ax.figure.canvas.draw()
    assert image_of(ax).mask.all()
    assert len(ax.figure.axes) == 1


@pytest.mark.parametrize("values", [[1j, 2], [True, False], [np.nan, 1.0]])
def test_other_values(values, ax):
    scree.plot(scree.from_lengths(np.array(values), [2]), ax)
    ax.figure.canvas.draw()


def test_the_current_axes_unless_said():
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    figure, axes = plt.subplots(1, 2)
    assert scree.plot(scree.from_lengths(np.arange(3), [3])) is axes[1]
    plt.close(figure)


def test_bad_arguments(ax, monkeypatch):
    arr = scree.from_lengths(np.arange(3), [3])
    with raises(TypeError, "plot: arr is list; needs a scree.Array"):
        scree.plot([1, 2], ax)
    with raises(ValueError, "max_rows: got 0; needs 1 or more"):
        scree.plot(arr, ax, max_rows=0)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with raises(ImportError, "plot: needs matplotlib", 'pip install "scree[plot]"'):
        scree.plot(arr)
