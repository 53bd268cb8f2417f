"""How a notebook shows an Array: one bar a row."""

from __future__ import annotations

from html import escape

from ._backends._protocol import HostInts

_MOST_BARS = 64
_WIDTH, _BAR, _GAP = 320, 5, 2


def raggedness(title: str, lengths: HostInts | None) -> str:
    """Draw rows of these lengths as bars (SVG), under `title`; without lengths, the title alone.

    More than 64 rows are thinned out evenly, and the caption says so.
    """
    head = f"<code>{escape(title)}</code>"
    if lengths is None or len(lengths) == 0:
        return f"<div>{head}</div>"
    count = len(lengths)
    shown = min(count, _MOST_BARS)
    rows = [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]
    longest = max(int(lengths.max()), 1)
    step = _BAR + _GAP
    bars = "".join(
        f'<rect x="0" y="{y * step}" width="{_WIDTH * int(lengths[row]) / longest:.1f}" height="{_BAR}" rx="1">'
        f"<title>row {row}: {lengths[row]}</title></rect>"
        for y, row in enumerate(rows)
    )
    padded = count * longest
    caption = (
        f"{f'{shown} of {count} rows; ' if shown < count else ''}lengths {int(lengths.min())} to {int(lengths.max())}; "
        f"{1 - int(lengths.sum()) / padded:.0%} of a padded batch would be padding"
    )
    height = shown * step
    svg = (
        f'<svg role="img" aria-label="{escape(caption)}" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}"><rect width="{_WIDTH}" height="{height}" fill="currentColor" opacity="0.08"/>'
        f'<g fill="#4c8bf5">{bars}</g></svg>'
    )
    return f"<div>{head}<br>{svg}<br><small>{escape(caption)}</small></div>"
