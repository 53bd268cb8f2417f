"""The report as one HTML page that needs nothing else: charts in HTML and SVG, light and dark, wide and narrow."""

from __future__ import annotations

from html import escape
from string import Template

import numpy as np

from .._backends._protocol import HostInts
from ._waste import Strategy, Waste

_BARS = 48  # of the histogram
_BINS = 16  # bins that are drawn
_WIDTH = 1000  # of the drawings, in units of their own


def page(waste: Waste, title: str, unit: str, item_bytes: int, notes: list[str]) -> str:
    """Write the page.

    Parameters
    ----------
    waste : Waste
        Of one sequence or more.
    title : str
        What was measured.
    unit : str
        What lengths count, in the plural.
    item_bytes : int
        The bytes of one of them.
    notes : list of str
        What else has to be known.
    """
    first = waste.strategies[0]
    cards = (
        (f"{waste.wasted_share(first):.1%}", f"of what random batches of {waste.batch_size} compute is padding"),
        (f"{_ratio(first.pairs, waste.pairs)}x", "as many attention operations as the sequences need"),
        (
            f"{waste.plan.efficiency:.1%}",
            f"of the room in {waste.plan.n_bins:,} bins of {waste.capacity:,} {escape(unit)} is used",
        ),
    )
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        facts=_facts(waste, unit),
        cards="".join(f"<div class=card><b>{value}</b><span>{text}</span></div>" for value, text in cards),
        lengths=_histogram(waste.lengths, unit),
        waste=_waste_bars(waste, unit),
        attention=_attention_bars(waste),
        savings=_saving_bars(waste),
        bins=_bins(waste, unit),
        batch=_batch(waste, unit),
        table=_table(waste, item_bytes),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
    )


def _facts(waste: Waste, unit: str) -> str:
    lengths = waste.lengths
    return (
        f"{len(lengths):,} sequences, {waste.tokens:,} {escape(unit)}; lengths {lengths.min():,} to {lengths.max():,}, "
        f"median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}."
    )


def _ratio(a: int, b: int) -> str:
    return f"{a / b:,.1f}" if b else "1"


def _histogram(lengths: HostInts, unit: str) -> str:
    longest = max(int(lengths.max()), 1)
    bars = min(_BARS, longest)
    counts, edges = np.histogram(lengths, bins=bars, range=(0, longest))
    height = 260
    top = max(int(counts.max()), 1)
    wide = _WIDTH / bars
    drawn = "".join(
        f'<rect class=tokens x="{i * wide + 1:.1f}" width="{max(wide - 2, 1):.1f}" y="{height * (1 - n / top):.1f}" '
        f'height="{height * n / top:.1f}"><title>{edges[i]:,.0f} to {edges[i + 1]:,.0f}: {n:,}</title></rect>'
        for i, n in enumerate(counts.tolist())
        if n
    )
    marks = (("median", float(np.median(lengths))), ("95%", float(np.percentile(lengths, 95))))
    lines = "".join(
        f'<line x1="{_WIDTH * value / longest:.1f}" x2="{_WIDTH * value / longest:.1f}" y1="0" y2="{height}">'
        f"<title>{name}: {value:,.0f}</title></line>"
        for name, value in marks
    )
    told = "; ".join(f"{name} {value:,.0f}" for name, value in marks)
    return (
        f'<svg role=img aria-label="Histogram of the lengths; {told}" viewBox="0 0 {_WIDTH} {height}" '
        f'preserveAspectRatio="none" style="height:11rem">{drawn}{lines}</svg>'
        f"<div class=axis><span>0</span><span>{longest / 2:,.0f}</span><span>{longest:,} {escape(unit)}</span></div>"
        f"<p class=small>The tallest bar is {top:,} sequences. Lines: {told}.</p>"
    )


def _row(name: str, parts: str, value: str, title: str) -> str:
    return (
        f'<div class=row title="{escape(title)}"><span class=name>{escape(name)}</span>'
        f"<span class=track>{parts}</span><span class=value>{value}</span></div>"
    )


def _part(kind: str, share: float) -> str:
    return f'<i class={kind} style="width:{100 * share:.3f}%"></i>' if share > 0 else ""


def _waste_bars(waste: Waste, unit: str) -> str:
    most = max(strategy.places for strategy in waste.strategies) or 1
    return "".join(
        _row(
            s.name,
            _part("tokens", waste.tokens / most) + _part("padding", waste.wasted(s) / most),
            f"{waste.wasted_share(s):.1%}",
            f"{s.how}: {s.places:,} places for {waste.tokens:,} {unit}",
        )
        for s in waste.strategies
    )


def _attention_bars(waste: Waste) -> str:
    most = max(max(strategy.pairs for strategy in waste.strategies), 1)
    return "".join(
        _row(
            s.name,
            _part("tokens", min(s.pairs, waste.pairs) / most) + _part("padding", max(s.pairs - waste.pairs, 0) / most),
            short(s.pairs),
            f"{s.how}: {s.pairs:,} pairs of a query and a key",
        )
        for s in waste.strategies
    )


def _saving_bars(waste: Waste) -> str:
    def saved(name: str, share: float, strategy: Strategy) -> str:
        return _row(name, _part("saved", max(share, 0.0)), f"{share:.1%}", strategy.how)

    return "".join(
        f"<div class=pair>{saved(s.name, waste.saved_places(s), s)}{saved('attention', waste.saved_pairs(s), s)}</div>"
        for s in waste.strategies[1:]
    )


def _bins(waste: Waste, unit: str) -> str:
    plan = waste.plan
    shown = np.unique(np.linspace(0, plan.n_bins - 1, min(plan.n_bins, _BINS)).astype(int))
    ends = np.cumsum(plan.lengths)
    rows = []
    for number in shown.tolist():
        a, b = plan.bins.offsets[number : number + 2]
        begin = int(ends[a] - plan.lengths[a]) if b > a else 0
        rows.append([int(end) - begin for end in ends[a:b]])
    label = f"{len(shown)} of {plan.n_bins:,} bins of {waste.capacity:,} {unit}"
    return _drawing(rows, waste.capacity, label) + f"<p class=small>{escape(label)}; each piece is a sequence.</p>"


def _batch(waste: Waste, unit: str) -> str:
    step = max(len(waste.lengths) // _BINS, 1)
    lengths = waste.lengths[::step][:_BINS]
    longest = max(int(lengths.max()), 1)
    label = f"{len(lengths)} of the sequences as one padded batch of {longest:,} {unit} each"
    return _drawing([[n] for n in lengths.tolist()], longest, label) + f"<p class=small>{escape(label)}.</p>"


def _drawing(rows: list[list[int]], capacity: int, label: str) -> str:
    """Rows of pieces that end at these places, on a ground of padding."""
    step, high = 16, 12
    drawn: list[str] = []
    for y, ends in enumerate(rows):
        drawn.append(f'<rect class=padding x="0" y="{y * step}" width="{_WIDTH}" height="{high}"/>')
        begin = 0
        for i, end in enumerate(ends):
            kind = "other" if i % 2 else "tokens"
            x, width = _WIDTH * begin / capacity, _WIDTH * (end - begin) / capacity
            drawn.append(f'<rect class={kind} x="{x:.1f}" y="{y * step}" width="{width:.1f}" height="{high}"/>')
            begin = end
    height = len(rows) * step
    return (
        f'<svg role=img aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none" '
        f'style="height:{len(rows) * 0.6:.1f}rem">{"".join(drawn)}</svg>'
    )


def _table(waste: Waste, item_bytes: int) -> str:
    head = ("", "places", "padding", "", "padding, bytes", "attention pairs", "saved", "saved, attention")
    rows = "".join(
        f"<tr><th scope=row>{escape(s.name)}<small>{escape(s.how)}</small></th><td>{s.places:,}</td>"
        f"<td>{waste.wasted(s):,}</td><td>{waste.wasted_share(s):.1%}</td><td>{size(waste.wasted(s) * item_bytes)}</td>"
        f"<td>{s.pairs:,}</td><td>{waste.saved_places(s):.1%}</td><td>{waste.saved_pairs(s):.1%}</td></tr>"
        for s in waste.strategies
    )
    headings = "".join(f"<th scope=col>{name}</th>" for name in head)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>"


def short(n: float) -> str:
    """A number in three digits and a letter."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if n < 999.5:
            return f"{n:.0f}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.0f}E"


def size(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return ""


_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d2433; --soft: #5b6477; --line: #d9dde4; --card: #ffffff;
  --tokens: #2a6f97; --other: #61a5c2; --padding: #ecc9bd; --saved: #3f8f5f; --mark: #b4552d }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e6e9ef; --soft: #9aa4b5; --line: #323945;
  --card: #1c2129; --tokens: #5aa9d6; --other: #2f7ba6; --padding: #6b4338; --saved: #5cb883; --mark: #f0a27a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 0 0 .75rem }
p { margin: 0 0 1rem } .small, small { color: var(--soft); font-size: .85rem } small { display: block; font-weight: 400 }
.cards, .two { display: grid; gap: 1rem; margin: 1.25rem 0 } .cards { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
.two { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; min-width: 0 }
.card b { display: block; font-size: 1.9rem; line-height: 1.2 } .card span { color: var(--soft) }
svg { display: block; width: 100% }
rect.tokens, i.tokens { fill: var(--tokens); background: var(--tokens) } rect.other { fill: var(--other) }
rect.padding, i.padding { fill: var(--padding); background: var(--padding) } i.saved { background: var(--saved) }
line { stroke: var(--mark); stroke-width: 2; stroke-dasharray: 6 4; vector-effect: non-scaling-stroke }
.axis { display: flex; justify-content: space-between; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem }
.row { display: grid; grid-template-columns: 5.2rem 1fr 4.4rem; gap: .6rem; align-items: center; margin: .35rem 0 }
.pair { margin-bottom: .8rem } .pair .row { margin: .1rem 0 } .pair .row + .row { color: var(--soft); font-size: .85rem }
.track { display: flex; height: 1.15rem; border-radius: .2rem; overflow: hidden; background: color-mix(in srgb, var(--line) 45%, transparent) }
.pair .row + .row .track { height: .6rem } .track i { display: block; height: 100% } .value { text-align: right; font-variant-numeric: tabular-nums }
.key { display: flex; gap: 1rem; flex-wrap: wrap; color: var(--soft); font-size: .85rem; margin: .6rem 0 0 }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; vertical-align: -.05rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .45rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top }
th:first-child { text-align: left; white-space: normal; min-width: 11rem } thead th { color: var(--soft); font-weight: 500 }
ul { padding-left: 1.1rem; color: var(--soft); font-size: .85rem }
"""

_KEY = "<div class=key><span><i class=tokens></i>sequences</span><span><i class=padding></i>padding</span></div>"

_PAGE = Template(
    """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body><main>
<h1>$title</h1><p>$facts</p>
<div class=cards>$cards</div>
<section><h2>Lengths</h2>$lengths</section>
<div class=two>
<section><h2>Waste: places computed on, and the share that is padding</h2>$waste"""
    + _KEY
    + """</section>
<section><h2>Attention: pairs of a query and a key</h2>$attention"""
    + _KEY
    + """</section>
<section><h2>Saved beside random batches: places, and attention</h2>$savings</section>
<section><h2>Bins</h2>$bins<h2>A padded batch</h2>$batch</section>
</div>
<section><h2>In numbers</h2><div class=scroll>$table</div></section>
<ul>$notes</ul>
</main></body></html>
"""
)
