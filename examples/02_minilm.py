"""A real pretrained transformer on texts of any lengths, without padding, on the framework of your choice.

    pip install "scree[demo]"
    python examples/02_minilm.py [numpy | torch | jax | mlx]

The model is `scree.demo.minilm`: one page over scree's own operations, the same for every framework.
"""

import sys

import numpy as np

import scree
from scree.demo import minilm, pretrained
from scree.demo.native import NATIVE

texts = [
    "A cat sits on the mat.",
    "On the rug, a small cat has sat down; it looks at the door, and it does not intend to move before it is fed.",
    "Interest rates rose.",
]

# The few dense operations that are the framework's own: linear, gelu, and arrays from NumPy.
native = NATIVE[sys.argv[1] if len(sys.argv) > 1 else "numpy"]()
model = pretrained.load().map(native.asarray)

# One array of token numbers a text, and one Array of them all.
tokens = scree.pack([native.asarray(row) for row in pretrained.tokenize(texts)])
print(tokens, "of", type(tokens.values).__module__)

# One vector of length 1 a text: (B, 384). A vector does not depend on what its text was batched with.
embeddings = np.asarray(minilm.embed(tokens, model, native))

for i, j in ((0, 1), (0, 2), (1, 2)):
    print(f"{embeddings[i] @ embeddings[j]:.3f}  {texts[i]!r} and {texts[j]!r}")
assert embeddings[0] @ embeddings[1] > embeddings[0] @ embeddings[2]
