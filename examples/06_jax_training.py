"""Training in JAX on batches of every shape, with one compilation.

    pip install "scree[jax]"
    python examples/06_jax_training.py

`collate` gives each batch the same fixed shapes, so that `jax.jit` compiles the step, its gradient included, once.
"""

import jax
import jax.numpy as jnp
import numpy as np

import scree
from scree.data import collate, token_batches

N_WORDS, WIDTH, ROWS, TOKENS = 40, 16, 64, 1024


def make_texts():
    """Make 3,000 texts whose class is whether their first word comes again within them."""
    rng = np.random.default_rng(0)
    texts = [
        rng.integers(0, N_WORDS, n).astype(np.int32) for n in np.clip(rng.lognormal(3, 0.8, 3000), 1, 300).astype(int)
    ]
    return texts, np.array([text[0] in text[1:] for text in texts], np.float32)


def logits(params, ids):
    """Score each text by how much the most similar of its other tokens resembles its first."""
    vectors = params["embed"][ids.values]  # (T, WIDTH); what lies beyond the last text belongs to none
    rows = scree.segment_ids(ids)
    first = vectors[ids.offsets[:-1]][jnp.minimum(rows, ids.batch_size - 1)]
    alike = jnp.einsum("td,td->t", vectors, first) / WIDTH**0.5
    alike = jnp.where(scree.position_ids(ids) > 0, alike, -jnp.inf)
    best = jax.ops.segment_max(alike, rows, ids.batch_size, indices_are_sorted=True)
    return jnp.where(jnp.isfinite(best), best, 0.0) * params["slope"] - params["bias"]


TRACES = []


@jax.jit
def step(params, batch, n_texts):
    """One step of gradient descent on the mean loss of the texts in the batch, its empty rows left out."""
    TRACES.append(1)

    def loss_of(params):
        scores, labels = logits(params, batch["ids"]), batch["label"]
        losses = jnp.logaddexp(0.0, scores) - labels * scores
        right = (scores > 0) == (labels > 0)
        used = jnp.arange(ROWS) < n_texts
        return jnp.where(used, losses, 0.0).sum() / n_texts, jnp.where(used, right, False).sum()

    (loss, right), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), loss, right


def main():
    """Train until the first word is recognised."""
    texts, labels = make_texts()
    lengths = [len(text) for text in texts]
    params = {
        "embed": jax.random.normal(jax.random.key(0), (N_WORDS, WIDTH)),
        "slope": jnp.float32(1.0),
        "bias": jnp.float32(1.0),
    }
    batches = token_batches(lengths, TOKENS)
    shapes, accuracy = set(), 0.0
    for epoch in range(4):
        n_right = n_seen = 0
        for rows in batches:
            for part in (rows[i : i + ROWS] for i in range(0, len(rows), ROWS)):
                samples = [{"ids": texts[i], "label": labels[i]} for i in part]
                batch = collate(samples, "jax", capacity=(ROWS, TOKENS))
                shapes.add((len(part), sum(lengths[i] for i in part)))
                params, loss, right = step(params, batch, len(part))
                n_right, n_seen = n_right + int(right), n_seen + len(part)
        accuracy = n_right / n_seen
        print(f"epoch {epoch}: loss {float(loss):.3f}, {accuracy:.1%} right")
    print(f"{len(shapes)} shapes of batches, {len(TRACES)} compilation")
    assert len(TRACES) == 1
    assert len(shapes) > 50
    assert accuracy > 0.9


if __name__ == "__main__":
    main()
