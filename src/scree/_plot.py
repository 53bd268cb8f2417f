"""Drawing an Array with matplotlib."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _check, bridges
from ._array import Array, expect_array
from ._backends._protocol import HostArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 4096  # more than a screen shows
_NOTHING = "#8888881a"


def plot(arr: Array, ax: Axes | None = None, *, max_rows: int = 64, cmap: str = "viridis") -> Axes:
    """Draw the rows of an Array, one below the other, each as long as it is.

    Values of one number a token give the colours, with a bar that says which; with features, the colour is their
    Euclidean norm. Complex values are drawn without colours, and values that are not finite like the ground.

    Parameters
    ----------
    arr : Array of (..., T, ...)
        Of any framework. Values and offsets are copied to the host where they are not there.
    ax : matplotlib Axes, optional
        Where to draw; the current axes unless said.
    max_rows : int
        With more rows than these, some are drawn, evenly chosen, and the title says so.
    cmap : str
        The name of a colormap of matplotlib.

    Returns
    -------
    matplotlib Axes
        What was drawn on.

    Raises
    ------
    ImportError
        matplotlib is missing.
    TypeError, ValueError
        An argument is not as described.

    Examples
    --------
    >>> import matplotlib.figure, numpy as np, scree
    >>> arr = scree.from_lengths(np.arange(6.0), [3, 1, 2])
    >>> ax = scree.plot(arr, matplotlib.figure.Figure().subplots())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('place in the row', 'row')
    """
    expect_array("plot", arr)
    most = _check.whole(max_rows, "max_rows")
    if most < 1:
        raise ValueError(f"max_rows: got {most}; needs 1 or more")
    if ax is None:
        ax = _current_axes()
    offsets = arr._host_offsets("plot")
    count = len(offsets) - 1
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.zeros(0, int)
    lengths = np.diff(offsets)[rows]
    chosen = arr[rows]
    coloured = not arr._xp.dtype_name(arr.values).startswith("complex")
    if coloured and arr._xp.dtype_name(arr.values) != "float64":
        chosen = chosen.astype("float32")
    host = bridges.to_numpy(chosen)
    longest = int(lengths.max(initial=0))
    ax.set_facecolor(_NOTHING)
    step = -(-max(longest, 1) // _MOST_COLUMNS)
    image = np.full((max(len(rows), 1), max(-(-longest // step), 1)), np.nan)
    for y, row in enumerate(host):
        values = _magnitudes(row, arr.ragged_dim) if coloured else np.ones(lengths[y])
        image[y, : -(-len(values) // step)] = values[::step]
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "cmap": cmap}
    extent = (0, max(image.shape[1] * step, 1), len(image), 0)
    drawn = ax.imshow(np.ma.masked_invalid(image), extent=extent, **options)
    figure = ax.get_figure()
    if coloured and figure is not None and np.isfinite(image).any():
        figure.colorbar(drawn, ax=ax, label="norm of the features" if arr.feature_shape else "value")
    shown = f"{len(rows)} of {count} rows" if len(rows) < count else f"{count} row{'' if count == 1 else 's'}"
    ax.set_title(f"{shown}, lengths {lengths.min(initial=longest)} to {longest}", loc="left", fontsize="medium")
    ax.set_xlabel("place in the row")
    ax.set_ylabel("row")
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 8)).round().astype(int)) if len(rows) else []
    ax.set_yticks([place + 0.5 for place in places], [str(rows[place]) for place in places])
    return ax


def _current_axes() -> Axes:
    try:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError as missing:
        raise ImportError(
            f'plot: needs matplotlib, which cannot be imported ({missing}); pip install "scree[plot]"'
        ) from missing
    return pyplot.gca()


def _magnitudes(row: HostArray, axis: int) -> HostArray:
    """One number a token of a row. (n,)."""
    tokens = np.moveaxis(row, axis, 0)
    return tokens if tokens.ndim == 1 else np.sqrt((tokens.reshape(len(tokens), -1) ** 2).sum(axis=1))
