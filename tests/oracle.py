"""What every op must give: float64 scalar loops over NumPy arrays, nothing shared with the package.

Arrays here are plain: values with the ragged axis first, and a list of offsets. Each function is the contract
spelt out once, as slowly as it takes to be obviously right.
"""

import math

import numpy as np


def offsets_of(lengths):
    """Return [0, l0, l0 + l1, ...]."""
    total, offsets = 0, [0]
    for length in lengths:
        total += int(length)
        offsets.append(total)
    return offsets


def spans(offsets):
    """Return (sequence, start, stop) of every sequence."""
    return [(b, int(offsets[b]), int(offsets[b + 1])) for b in range(len(offsets) - 1)]


def visible(i, j, n, m, causal, window_size):
    """Say whether query i of n sees key j of m."""
    place = i + m - n
    left, right = window_size
    if causal and j > place:
        return False
    if left is not None and j < place - left:
        return False
    return right is None or j <= place + right


def attention(
    q,
    k,
    v,
    q_offsets,
    k_offsets,
    causal=False,
    *,
    scale=None,
    window_size=(None, None),
    softcap=None,
    sinks=None,
    grad_out=None,
    grad_lse=None,
):
    """Return (out, lse), or with ``grad_out`` the analytic (dq, dk, dv, dsinks)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    tokens, heads, dim = q.shape
    group = heads // k.shape[1] if k.shape[1] else 1
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    out = np.zeros((tokens, heads, v.shape[2]))
    lse = np.full((tokens, heads), -np.inf)
    dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(heads)
    for (_, q0, q1), (_, k0, k1) in zip(spans(q_offsets), spans(k_offsets), strict=True):
        n, m = q1 - q0, k1 - k0
        for h in range(heads):
            for i in range(n):
                keys, scores, slopes = [], [], []
                for j in range(m):
                    if not visible(i, j, n, m, causal, window_size):
                        continue
                    s = scale * float(np.dot(q[q0 + i, h], k[k0 + j, h // group]))
                    slope = 1.0
                    if softcap is not None:
                        t = math.tanh(s / softcap)
                        s, slope = softcap * t, 1.0 - t * t
                    keys.append(k0 + j)
                    scores.append(s)
                    slopes.append(slope)
                terms = scores + ([] if sinks is None else [float(sinks[h])])
                if not terms:
                    continue
                top = max(terms)
                total = top + math.log(sum(math.exp(s - top) for s in terms))
                lse[q0 + i, h] = total
                weights = [math.exp(s - total) for s in scores]
                for j, p in zip(keys, weights, strict=True):
                    out[q0 + i, h] += p * v[j, h // group]
                if grad_out is None:
                    continue
                g = np.asarray(grad_out[q0 + i, h], np.float64)
                g_lse = 0.0 if grad_lse is None else float(grad_lse[q0 + i, h])
                delta = float(np.dot(g, out[q0 + i, h]))
                if sinks is not None:
                    dsinks[h] += math.exp(float(sinks[h]) - total) * (g_lse - delta)
                for j, p, slope in zip(keys, weights, slopes, strict=True):
                    ds = p * (float(np.dot(g, v[j, h // group])) - delta + g_lse) * slope * scale
                    dq[q0 + i, h] += ds * k[j, h // group]
                    dk[j, h // group] += ds * q[q0 + i, h]
                    dv[j, h // group] += p * g
    return (out, lse) if grad_out is None else (dq, dk, dv, dsinks)


def layernorm(x, weight=None, bias=None, eps=1e-5):
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last axis, var over all M values."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        row = [float(a) for a in x[place]]
        mean = math.fsum(row) / len(row)
        var = math.fsum((a - mean) ** 2 for a in row) / len(row)
        for c, a in enumerate(row):
            y = (a - mean) / math.sqrt(var + eps)
            y = y if weight is None else y * float(weight[c])
            out[(*place, c)] = y if bias is None else y + float(bias[c])
    return out


def rmsnorm(x, weight=None, eps=1e-6):
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        row = [float(a) for a in x[place]]
        root = math.sqrt(math.fsum(a * a for a in row) / len(row) + eps)
        for c, a in enumerate(row):
            out[(*place, c)] = a / root * (1.0 if weight is None else float(weight[c]))
    return out


def softmax(x, offsets):
    """Return exp(x) / sum exp(x) along axis 0, each sequence and feature on its own."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for _, start, stop in spans(offsets):
        if start == stop:
            continue
        for place in np.ndindex(x.shape[1:]):
            column = [float(x[(t, *place)]) for t in range(start, stop)]
            top = max(column)
            weights = [math.exp(a - top) for a in column]
            for t, w in zip(range(start, stop), weights, strict=True):
                out[(t, *place)] = w / math.fsum(weights)
    return out


def reduce(x, offsets, op):
    """Return one value a sequence and feature, (B, *features); the contract's values for empty sequences."""
    x = np.asarray(x)
    integer = x.dtype.kind in "iu"
    smallest = int(np.iinfo(x.dtype).min) if integer else (False if x.dtype.kind == "b" else -math.inf)
    largest = int(np.iinfo(x.dtype).max) if integer else (True if x.dtype.kind == "b" else math.inf)
    out = np.zeros((len(offsets) - 1, *x.shape[1:]), x.dtype if x.dtype.kind in "iub" else np.float64)
    for b, start, stop in spans(offsets):
        for place in np.ndindex(x.shape[1:]):
            column = [x[(t, *place)].item() for t in range(start, stop)]
            if op == "sum":
                value = sum(column) if integer else math.fsum(column)
            elif op == "mean":
                value = math.fsum(column) / len(column) if column else math.nan
            elif op == "max":
                value = max(column) if column else smallest
            elif op == "min":
                value = min(column) if column else largest
            else:
                top = max(column) if column else -math.inf
                value = top + math.log(math.fsum(math.exp(a - top) for a in column)) if column else -math.inf
            out[(b, *place)] = value
    return out


def rope(x, offsets, cos, sin, *, interleaved=False, start=None):
    """Turn each pair of the last axis by its angle: pairs (c, c + D/2), or (2c, 2c + 1) when interleaved."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    out = np.zeros_like(x)
    for b, first, stop in spans(offsets):
        shift = 0 if start is None else int(start) if np.ndim(start) == 0 else int(start[b])
        for t in range(first, stop):
            place = t - first + shift
            for rest in np.ndindex(x.shape[1:-1]):
                for c in range(half):
                    i, j = (2 * c, 2 * c + 1) if interleaved else (c, c + half)
                    a, z = x[(t, *rest, i)], x[(t, *rest, j)]
                    out[(t, *rest, i)] = a * float(cos[place, c]) - z * float(sin[place, c])
                    out[(t, *rest, j)] = z * float(cos[place, c]) + a * float(sin[place, c])
    return out


def to_padded(rows, features, dtype, side="right", fill_value=0.0, max_length=None):
    """Return (padded, mask) of a list of rows, the ragged axis first in each."""
    longest = max((len(r) for r in rows), default=0) if max_length is None else max_length
    padded = np.full((len(rows), longest, *features), fill_value, dtype)
    mask = np.zeros((len(rows), longest), bool)
    for b, row in enumerate(rows):
        for t in range(len(row)):
            place = t if side == "right" else longest - len(row) + t
            padded[b, place] = row[t]
            mask[b, place] = True
    return padded, mask


def from_padded(padded, mask):
    """Return the list of rows that the mask keeps."""
    return [
        np.array([padded[b, t] for t in range(padded.shape[1]) if mask[b, t]], padded.dtype).reshape(
            (-1, *padded.shape[2:])
        )
        for b in range(padded.shape[0])
    ]


def gradient(fn, cotangent, *arrays, step=1e-5):
    """Return the gradients of sum(cotangent * fn(*arrays)) by central differences in float64."""
    arrays = [np.array(a, np.float64) for a in arrays]
    cotangent = np.asarray(cotangent, np.float64)
    grads = []
    for a in arrays:
        g = np.zeros_like(a)
        for place in np.ndindex(a.shape):
            kept = a[place]
            a[place] = kept + step
            up = fn(*arrays)
            a[place] = kept - step
            down = fn(*arrays)
            a[place] = kept
            change = np.where(cotangent == 0, 0.0, (up - down) / (2 * step))
            g[place] = float((cotangent * change).sum())
        grads.append(g)
    return grads
