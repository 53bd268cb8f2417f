"""The inputs that the kernel tests share. Few shapes, used everywhere: JAX compiles one program a shape."""

import dataclasses

import numpy as np

import oracle
import scree

# Empty first, last and in between; length 1; an odd length; equal lengths apart from each other.
LENGTHS = (0, 3, 1, 5, 0, 3, 0)
# Against LENGTHS: no keys for some queries, no queries for some keys, fewer keys, more keys, equal.
KEY_LENGTHS = (3, 5, 1, 3, 0, 0, 0)
# A capacity batch holds LENGTHS, then two more empty rows and four spare tokens.
CAPACITY = (len(LENGTHS) + 2, sum(LENGTHS) + 4)

# The edges of a batch's shape; every one is an ordinary value.
EDGES = {
    "no rows": (),
    "one empty row": (0,),
    "only empty rows": (0, 0, 0),
    "length 1": (1,),
    "empty first": (0, 3),
    "empty last": (3, 0),
    "odd": (3, 5, 1),
}


def normal(shape, seed, scale=1.0):
    """Draw float64 normals; the same seed gives the same numbers."""
    return np.random.default_rng(seed).normal(size=shape) * scale


def batch(xp, lengths, features, dtype="float32", seed=0, ragged_dim=0, scale=1.0):
    """Make an Array of normals."""
    shape = list(features)
    shape.insert(ragged_dim, sum(lengths))
    values = xp.array(normal(tuple(shape), seed, scale), dtype)
    return scree.Array(values, xp.array(oracle.offsets_of(lengths), "int32"), ragged_dim)


def wide(xp, x):
    """Return an array's values as float64 NumPy: what the framework really holds after rounding to its dtype."""
    return xp.to_np(x.values if isinstance(x, scree.Array) else x).astype(np.float64)


def host_offsets(xp, arr):
    """Return an Array's offsets as a list of ints."""
    return [int(o) for o in xp.to_np(arr.offsets)]


def with_spare(xp, arr, batch_size, total_length, spare=np.nan):
    """Give the Array a capacity, and fill what lies beyond its sequences with ``spare``."""
    full = scree.with_capacity(arr, batch_size, total_length)
    values = xp.to_np(full.values).astype(np.float64)
    used = xp.to_np(arr.values).shape[arr.ragged_dim]
    np.moveaxis(values, arr.ragged_dim, 0)[used:] = spare
    return full.with_values(xp.array(values, xp.dtype_of(arr.values)))


@dataclasses.dataclass(frozen=True)
class Attention:
    """One way to call varlen_attention: shapes, and options by name."""

    name: str
    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    v_dim: int = 8
    lengths: tuple = LENGTHS
    key_lengths: tuple = LENGTHS
    options: dict = dataclasses.field(default_factory=dict)
    sinks: bool = False

    def __str__(self):
        return self.name

    def make(self, xp, dtype="float32", seed=0):
        """Return q, k, v as Arrays, sinks as an array or None."""
        q = batch(xp, self.lengths, (self.heads, self.dim), dtype, seed)
        k = batch(xp, self.key_lengths, (self.kv_heads, self.dim), dtype, seed + 1)
        v = batch(xp, self.key_lengths, (self.kv_heads, self.v_dim), dtype, seed + 2)
        sinks = xp.array(normal((self.heads,), seed + 3), dtype) if self.sinks else None
        return q, k, v, sinks

    def arguments(self, sinks):
        """Return the keyword arguments of the call."""
        return dict(self.options) if sinks is None else {**self.options, "sinks": sinks}


ATTENTION = (
    Attention("plain"),
    Attention("causal", options={"causal": True}),
    Attention("grouped", heads=4, kv_heads=2, options={"causal": True}),
    Attention("one key head", heads=4, kv_heads=1),
    Attention("cross", key_lengths=KEY_LENGTHS),
    Attention("cross causal", key_lengths=KEY_LENGTHS, options={"causal": True}),
    Attention("own value dim", v_dim=5, dim=6),
    Attention("scale", options={"scale": 0.7}),
    Attention("window", options={"window_size": (1, 1)}),
    Attention("window left", options={"window_size": (1, None)}),
    Attention("window right", options={"window_size": (None, 0)}),
    Attention("window itself", options={"window_size": (0, 0)}),
    Attention("window cross", key_lengths=KEY_LENGTHS, options={"window_size": (1, 0)}),
    Attention("window causal", options={"causal": True, "window_size": (2, 3)}),
    Attention("softcap", options={"softcap": 0.8}),
    Attention("sinks", heads=4, kv_heads=2, sinks=True),
    Attention("sinks cross causal", key_lengths=KEY_LENGTHS, options={"causal": True}, sinks=True),
    Attention(
        "everything",
        heads=4,
        kv_heads=2,
        dim=6,
        v_dim=5,
        key_lengths=KEY_LENGTHS,
        options={"causal": True, "scale": 0.5, "window_size": (2, 1), "softcap": 1.5},
        sinks=True,
    ),
)
