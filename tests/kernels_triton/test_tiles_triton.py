"""Maps of tiles: every row of a batch once, and which rows are left to programs that take sequences whole."""

import pytest

import oracle

pytestmark = pytest.mark.triton
torch = pytest.importorskip("torch")
_tiles = pytest.importorskip("scree.kernels.triton._tiles")
_kernels = pytest.importorskip("scree.kernels.triton._tiles_kernels")

BLOCK, SMALL = 64, 128
QUERIES = (128, 0, 1, 129, 64, 65, 5, 300, 7)
KEYS = (128, 9, 64, 3, 129, 1, 0, 128, 7)
SPARE = 70  # rows beyond the last sequence
ABSENT, ROWS, WHOLE = _kernels.ABSENT.value, _kernels.ROWS.value, _kernels.WHOLE.value


def tiles(device, own, other, small, right=-1, offsets=None):
    """Return the tiles of a map in their order: (kind, start, length, other start, other length, block, row)."""
    cu, cu_other = (torch.tensor(oracle.offsets_of(n), dtype=torch.int32, device=device) for n in (own, other))
    cu = cu if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device)
    tiles, slots = _tiles.build(cu, cu_other, sum(own) + SPARE, sum(other) + SPARE, BLOCK, -1, right, small)
    found = [(t[5], *t[:5], t[6]) for t in tiles[:slots].tolist()]
    assert not tiles[slots].any()
    present = [tile for tile in found if tile[0] != ABSENT]
    assert found[: len(present)] == present
    return present


@pytest.mark.parametrize("right", [-1, 0], ids=["full", "causal"])
def test_sequences_that_are_taken_whole(device, right):
    every = tiles(device, QUERIES, KEYS, 0, right)
    assert WHOLE not in {kind for kind, *_ in every}
    rows = {(start + block * BLOCK + i) for _, start, length, _, _, block, _ in every for i in range(BLOCK)
            if block * BLOCK + i < length}  # fmt: skip
    assert rows == set(range(sum(QUERIES) + SPARE))
    whole = {i for i, (n, m) in enumerate(zip(QUERIES, KEYS, strict=True)) if 0 < n <= SMALL and 0 < m <= SMALL}
    assert whole == {0, 2, 5, 8}

    def taken(tile):
        return tile[0] == ROWS and tile[6] in whole

    some = tiles(device, QUERIES, KEYS, SMALL, right)
    assert sorted(some) == sorted((WHOLE if taken(tile) else tile[0], *tile[1:]) for tile in every)
    kinds = [kind for kind, *_ in some]
    assert kinds.index(ROWS) == kinds.count(WHOLE) == 6  # they come first
    assert sorted(tiles(device, QUERIES, KEYS, -SMALL, right)) == sorted(tile for tile in every if not taken(tile))


@pytest.mark.parametrize("small", [0, SMALL, -SMALL])
def test_with_wrong_offsets_all_rows_are_spare(device, small):
    wrong = [0, 128, 90, *range(91, 98)]
    found = tiles(device, QUERIES, KEYS, small, offsets=wrong)
    assert {kind for kind, *_ in found} == {_kernels.SPARE.value}
    assert len(found) == -(-(sum(QUERIES) + SPARE) // BLOCK)
