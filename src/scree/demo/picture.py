"""A picture of how uneven the texts are, and of what padding them costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .compare import TEXTS_A_BATCH
from .pretrained import MAX_LENGTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".pdf", ".png", ".svg")

_INK, _GREY = "#2b2d42", "#8d99ae"
_PAPER, _PADDING = "#ffffff", "#e9c9c4"
_TOKENS = ("#2a6f97", "#61a5c2")  # alternating, so that neighbours can be told apart
_BATCHES = 6  # in the picture of the batches


def draw(lengths: NDArray[np.integer[Any]], padded_places: int, path: Path) -> None:
    """Draw the lengths of texts, a few padded batches of them, and the same tokens packed.

    Parameters
    ----------
    lengths : array of (texts,), integer
        In tokens, in the order in which they are batched.
    padded_places : int
        Tokens of all padded batches, padding included.
    path : Path
        Where to; its suffix is one of `FORMATS`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=160, layout="constrained", facecolor=_PAPER)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _draw_lengths(left, lengths)
    shown = lengths[: _BATCHES * TEXTS_A_BATCH]
    _draw_blocks(middle, _padded_image(shown))
    _draw_blocks(right, _packed_image(shown, len(shown)))
    waste = 1 - int(lengths.sum()) / padded_places
    middle.set_title(f"padded: {waste:.0%} of the work is padding", fontsize=11, color=_INK, loc="left")
    right.set_title("packed: none of it", fontsize=11, color=_INK, loc="left")
    middle.set_xlabel(f"{len(shown)} texts in {_batches(shown)} of at most {TEXTS_A_BATCH}", color=_INK)
    right.set_xlabel(f"the same {int(shown.sum()):,} tokens, {MAX_LENGTH} a line", color=_INK)
    figure.savefig(path)


def _batches(shown: NDArray[np.integer[Any]]) -> str:
    n = -(-len(shown) // TEXTS_A_BATCH)
    return f"{n} batch{'es' if n > 1 else ''}"


def _draw_lengths(axes: Axes, lengths: NDArray[np.integer[Any]]) -> None:
    bins = np.arange(0, MAX_LENGTH + 8, 8)
    axes.hist(lengths, bins=bins.tolist(), color=_TOKENS[0], edgecolor=_PAPER, linewidth=0.6)
    top = axes.get_ylim()[1] * 1.08
    axes.set_ylim(0, top)
    median, mean = float(np.median(lengths)), float(np.mean(lengths))
    for value, height, name in ((median, 0.97, "median"), (mean, 0.88, "mean")):
        axes.axvline(value, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(
            f"{name} {value:.0f}", (value, top * height), (6, 0), textcoords="offset points", va="top", color=_INK,
            bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    n_cut = int((lengths == MAX_LENGTH).sum())
    if n_cut:
        axes.annotate(
            f"cut at {MAX_LENGTH}", (MAX_LENGTH, top * 0.02 + n_cut), (0, 8), textcoords="offset points",
            ha="right", va="bottom", color=_GREY,
        )  # fmt: skip
    axes.set_xlim(0, MAX_LENGTH + 8)
    axes.set_title(f"{len(lengths):,} docstrings of very uneven length", fontsize=11, color=_INK, loc="left")
    axes.set_xlabel("tokens in a text", color=_INK)
    axes.set_ylabel("texts", color=_INK)
    axes.tick_params(colors=_GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_GREY)


def _draw_blocks(axes: Axes, image: NDArray[np.uint8]) -> None:
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, MAX_LENGTH, len(image), 0))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _padded_image(lengths: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    image = np.full((len(lengths), MAX_LENGTH, 3), _rgb(_PAPER), np.uint8)
    for start in range(0, len(lengths), TEXTS_A_BATCH):
        batch = lengths[start : start + TEXTS_A_BATCH]
        image[start : start + len(batch), : batch.max()] = _rgb(_PADDING)
        for i, length in enumerate(batch.tolist(), start):
            image[i, :length] = _rgb(_TOKENS[i % 2])
    return image


def _packed_image(lengths: NDArray[np.integer[Any]], n_lines: int) -> NDArray[np.uint8]:
    """The texts end to end, `MAX_LENGTH` tokens a line: to the same scale as `_padded_image`."""
    image = np.full((n_lines * MAX_LENGTH, 3), _rgb(_PAPER), np.uint8)
    colours = np.array([_rgb(colour) for colour in _TOKENS], np.uint8)
    which = np.repeat(np.arange(len(lengths)) % 2, lengths)
    image[: len(which)] = colours[which]
    return image.reshape(n_lines, MAX_LENGTH, 3)


def _rgb(colour: str) -> Sequence[int]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
