"""Sequences of different lengths as one Array: in, computed on, and out again.

    python examples/01_pack_unpack.py

It needs NumPy only. With tensors of PyTorch, JAX or MLX in `rows` nothing else changes.
"""

import numpy as np

import scree

# Four walks of different lengths, one of them empty: (steps, 2) each.
rng = np.random.default_rng(0)
rows = [rng.normal(size=(n, 2)).astype(np.float32) for n in (3, 5, 0, 2)]

# pack joins them. Nothing is padded: 10 steps are 10 steps.
walks = scree.pack(rows)
print(walks)
print("offsets", walks.offsets.tolist(), "lengths", walks.lengths.tolist(), "longest", walks.max_length)

# Sequence i is values[offsets[i]:offsets[i + 1]]; arr[i] is that slice.
assert np.array_equal(walks[1], rows[1])

# Arithmetic and functions of single steps go over all sequences at once, and keep the offsets.
sizes = walks.map(lambda steps: np.sqrt((steps * steps).sum(-1)))
print("share of the steps that are longer than 1:", (sizes > 1).values.mean())

# What needs to know where a sequence ends is a kernel. The longest step of each walk (of none: -inf):
print("longest steps", scree.kernels.varlen_reduce(sizes, "max"))
# and the weights of its steps, which sum to 1 in each walk:
weights = scree.kernels.varlen_softmax(sizes)
print("sums of weights", scree.kernels.varlen_reduce(weights, "sum"))

# Other programs want a padded batch and a mask; the way back takes exactly what the mask keeps.
padded, mask = scree.to_padded(walks)
print("padded", padded.shape, "of which tokens", int(mask.sum()), "of", mask.size)
again = scree.from_padded(padded, mask)

# unpack is the inverse of pack: the rows, as views.
for row, back in zip(rows, scree.unpack(again), strict=True):
    assert np.array_equal(row, back)
print("the same rows came back")
