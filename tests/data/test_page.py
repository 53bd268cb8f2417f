"""The page of `scree report` in a browser: laptop and phone, light and dark, by its boxes and by its pixels."""

import json
import os

import browser
import numpy as np
import pytest

from scree.data import _waste
from scree.data._page import page

pytestmark = pytest.mark.browser

SCREENS = {"laptop": (1366, 768, False), "phone": (360, 780, True)}
SCHEMES = {"light": False, "dark": True}
CORPORA = {
    "log-normal": (np.clip(np.random.default_rng(0).lognormal(5, 1, 3000), 1, 4096), "corpus.parquet: input_ids"),
    "large numbers": (np.full(2000, 10**9), "a" * 90 + "/" + "b" * 90 + ".parquet: " + "c" * 40),
    "one": ([5], "tiny.jsonl: ids"),
    "empty rows": ([0, 0], "empty.npz"),
}

# Everything that is wrong with the page on this screen, as texts.
LOOK = """(() => {
  const wrong = [], root = document.documentElement, seen = new Set()
  if (root.scrollWidth > root.clientWidth) wrong.push(`page is ${root.scrollWidth} wide on ${root.clientWidth}`)
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05)
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor)
      if (colour.length == 3 || colour[3] == 1) return colour
    }
    return [255, 255, 255]
  }
  const scrolls = element => element.closest('.scroll')
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), boxes = []
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const text = node.textContent.trim(), parent = node.parentElement
    if (!text || parent.closest('title, style')) continue
    const range = document.createRange()
    range.selectNodeContents(node)
    const style = getComputedStyle(parent)
    if (parseFloat(style.fontSize) < 11) wrong.push(`small: ${text}`)
    const contrast = ratio(numbers(style.color), ground(parent))
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)}: ${text}`)
    const section = parent.closest('section, .card') || document.body
    const limits = section.getBoundingClientRect(), own = parent.getBoundingClientRect()
    for (const box of range.getClientRects()) {
      if (!scrolls(parent) && (box.left < limits.left - 1 || box.right > limits.right + 1)) wrong.push(`sticks out: ${text}`)
      if (style.display != 'inline' && box.right > own.right + 1) wrong.push(`sticks out of its place: ${text}`)
      for (const [other, said] of boxes)
        if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 1
            && Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 4) wrong.push(`${text} over ${said}`)
      boxes.push([box, text])
    }
    for (let e = parent; e && e != document.body; e = e.parentElement) {
      const hides = ['hidden', 'clip'].includes(getComputedStyle(e).overflowX)
      if (hides && e.scrollWidth > e.clientWidth + 1) wrong.push(`clipped: ${text}`)
    }
  }
  for (const bar of document.querySelectorAll('.track')) {
    if (bar.clientWidth < 60) wrong.push(`a bar has ${bar.clientWidth}`)
    if (bar.scrollWidth > bar.clientWidth + 1) wrong.push('a bar is longer than its track')
  }
  for (const drawing of document.querySelectorAll('svg'))
    if (drawing.clientWidth < 200 || drawing.clientHeight < 8) wrong.push('a drawing is small')
  return wrong
})()"""

COLOURS = "['paper', 'card', 'tokens', 'padding'].map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n))"


@pytest.fixture(scope="module")
def chromium():
    """A browser; missing, it is a failure where SCREE_REQUIRE names it."""
    if browser.find() is None:
        if "chromium" in os.environ.get("SCREE_REQUIRE", "").split(","):
            pytest.fail(f"SCREE_REQUIRE names chromium, and none of {', '.join(browser.NAMES)} is on PATH")
        pytest.skip("no Chromium on PATH")
    with browser.Chromium() as started:
        yield started


def written(folder, lengths, title):
    path = folder / "report.html"
    waste = _waste.measure(np.asarray(lengths, np.int64), 64)
    notes = ["bytes: of the padding, 4 each, as the data has them; --bytes says what one takes in your model."]
    path.write_text(page(waste, title, "tokens", 4, notes), encoding="utf-8")
    return path


def channels(colour):
    """The three channels of #rrggbb."""
    return np.array([int(colour.strip()[i : i + 2], 16) for i in (1, 3, 5)])


def brightness(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_nothing_sticks_out_is_clipped_covered_or_faint(chromium, tmp_path, corpus, screen, scheme):
    width, height, mobile = SCREENS[screen]
    chromium.open(written(tmp_path, *CORPORA[corpus]), width, height, SCHEMES[scheme], mobile)
    assert chromium.run("innerWidth") == width
    assert chromium.run(LOOK) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("screen", SCREENS)
def test_the_pixels_are_the_charts(chromium, tmp_path, screen, scheme):
    width, height, mobile = SCREENS[screen]
    chromium.open(written(tmp_path, *CORPORA["log-normal"]), width, height, SCHEMES[scheme], mobile)
    shot = chromium.screenshot().astype(int)
    assert shot.shape[1] == width
    paper, card, tokens, padding = chromium.run(COLOURS)

    def share(colour, box=None):
        part = shot if box is None else shot[round(box[1]) : round(box[3]), round(box[0]) : round(box[2])]
        return float((np.abs(part - channels(colour)).max(axis=2) <= 3).mean())

    assert share(paper) + share(card) > 0.4
    assert (brightness(paper) < 0.05) == (scheme == "dark")
    # A bar of padding beside one of tokens can be told apart without its colour.
    assert (max(map(brightness, (tokens, padding))) + 0.05) / (min(map(brightness, (tokens, padding))) + 0.05) >= 3
    boxes = chromium.run(
        "[...document.querySelectorAll('svg, .row:first-of-type .track')].map(e => e.getBoundingClientRect())"
        ".map(b => [b.left, b.top + scrollY, b.right, b.bottom + scrollY])"
    )
    drawn = [(share(tokens, box), share(padding, box)) for box in boxes]
    assert len(drawn) >= 5
    histogram, waste, attention = drawn[:3]
    assert 0.05 < histogram[0] < 0.5
    assert 0.1 < waste[0] < 0.25  # 15.6% are tokens, the rest padding
    assert waste[1] > 0.7
    assert attention[1] > 0.9
    assert drawn[-1][0] + drawn[-1][1] > 0.6  # the padded batch, with gaps between its rows


@pytest.mark.parametrize(
    ("style", "words"),
    [
        ("section { min-width: 900px }", "page is"),
        (".row { grid-template-columns: 1rem 1fr 4.4rem }", "sticks out of its place"),
        (".row { grid-template-columns: 5.2rem 1fr 0 }", "sticks out: 84.4%"),
        (".small { margin-top: -1.5rem }", "over"),
        (".track { min-width: 300px }", "page is"),
        (".small { color: #bbb !important }", "contrast"),
        (".value { overflow: hidden; width: 10px }", "clipped"),
        (".axis { font-size: 9px }", "small"),
        ("svg { height: 2px !important }", "a drawing is small"),
    ],
)
def test_the_look_can_fail(chromium, tmp_path, style, words):
    path = written(tmp_path, *CORPORA["log-normal"])
    path.write_text(path.read_text(encoding="utf-8").replace("</style>", f"{style}</style>"), encoding="utf-8")
    chromium.open(path, *SCREENS["phone"][:2], dark=False, mobile=True)
    assert any(words in told for told in chromium.run(LOOK)), json.dumps(chromium.run(LOOK))


def test_the_page_fetches_nothing(chromium, tmp_path):
    chromium.open(written(tmp_path, *CORPORA["log-normal"]), 1366, 768, dark=False, mobile=False)
    assert chromium.run("performance.getEntriesByType('resource').length") == 0
