"""Models of transformers with ``attn_implementation="scree"`` against the same model, padded and eager."""

import pytest

pytest.importorskip("transformers")

import zoo

pytestmark = pytest.mark.hf


def compare(name, inputs, tokens, expected):
    model = zoo.make(name)
    out, gradients = zoo.outputs(model, "scree", inputs, tokens, gradients=True)
    zoo.assert_rounding(out, expected[0])
    assert gradients.keys() == expected[1].keys()
    whole = max(value.abs().max().item() for value in expected[1].values())
    for key, value in gradients.items():
        zoo.assert_rounding(value, expected[1][key], whole)


@pytest.fixture(scope="module")
def eager():
    """Return what the eager model gives for a padded batch, worked out once."""
    known = {}

    def of(name, side="right"):
        if (name, side) not in known:
            batch = zoo.padded(name, side)
            known[name, side] = zoo.outputs(zoo.make(name), "eager", batch.inputs, batch.tokens, gradients=True)
        return known[name, side]

    return of


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", zoo.KINDS)
def test_padded(name, side, eager):
    batch = zoo.padded(name, side)
    compare(name, batch.inputs, batch.tokens, eager(name, side))


@pytest.mark.parametrize("name", zoo.KINDS)
def test_packed(name, eager):
    compare(name, zoo.packed(name), None, eager(name))


@pytest.mark.parametrize("name", zoo.KINDS)
def test_packed_with_empty_rows(name, eager):
    a, b, c, d = zoo.LENGTHS
    compare(name, zoo.packed(name, (0, a, b, 0, 0, c, d, 0)), None, eager(name))
