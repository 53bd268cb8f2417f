"""The body of the Metal kernel, to which MLX adds the signature.

Template arguments: ``T``, the dtype of q, k, v and the result; ``D`` and ``D_V``, the head dims; ``ROWS``, the queries
of a simdgroup. One simdgroup of 32 lanes computes ROWS queries that lie one behind the other, for one head: a lane
holds every 32nd element of each query and each result, the score is a sum over the lanes, and the softmax is rescaled
as the keys go by.

Arrays are indexed here and nowhere passed on: MLX places one of fewer than 8 elements in another address space. An
offset decides which keys are read, within k's size, and never where is written.
"""

from __future__ import annotations

LANES = 32
ROWS = 4

INPUTS = ("q", "k", "v", "q_offsets", "k_offsets", "sinks", "sizes", "factors")
OUTPUTS = ("out", "lse")

HEADER = """
inline long scree_within(long x, long low, long high) {
  return x < low ? low : (x > high ? high : x);
}
"""

SOURCE = """
constexpr int LANES = 32;
constexpr int QK = (D + LANES - 1) / LANES;
constexpr int VO = (D_V + LANES - 1) / LANES;

const int lane = int(thread_position_in_grid.x);
const long first = long(thread_position_in_grid.y) * ROWS;
const long head = long(thread_position_in_grid.z);
const long tokens = sizes[0], keys = sizes[1], batch = sizes[2];
const long heads = sizes[3], kv_heads = sizes[4];
const long left = sizes[5], right = sizes[6];
const float scale = factors[0], softcap = factors[1];
const long kv_head = head / (heads / kv_heads);

float query[ROWS][QK], sum[ROWS][VO];  // sum: of exp(s - top) * v
float top[ROWS], l[ROWS];
long low[ROWS], high[ROWS];  // the keys that a query sees
bool used[ROWS];
long begin = keys, end = 0;  // the keys that any of the queries sees

for (int r = 0; r < ROWS; ++r) {
  const long token = first + r;
  used[r] = token < tokens && token < long(q_offsets[batch]);
  low[r] = 0;
  high[r] = 0;
  if (used[r]) {
    long row = 0, beyond = batch;  // the last row that begins at the token or before it
    while (beyond - row > 1) {
      const long middle = (row + beyond) / 2;
      if (long(q_offsets[middle]) <= token) {
        row = middle;
      } else {
        beyond = middle;
      }
    }
    const long k_first = scree_within(long(k_offsets[row]), long(0), keys);
    const long k_last = scree_within(long(k_offsets[row + 1]), k_first, keys);
    const long m = k_last - k_first;
    const long place = token + m - long(q_offsets[row + 1]);  // i + m - n
    low[r] = k_first + scree_within(place - left, long(0), m);
    high[r] = k_first + scree_within(place + right + 1, long(0), m);
    if (low[r] < high[r]) {
      begin = low[r] < begin ? low[r] : begin;
      end = high[r] > end ? high[r] : end;
    }
  }
  top[r] = sinks[head];  // as if it were a key; where it is -inf, the first key scales the 1 to nothing
  l[r] = 1.0f;
  for (int i = 0; i < QK; ++i) {
    const int d = lane + i * LANES;
    query[r][i] = used[r] && d < D ? scale * float(q[(token * heads + head) * D + d]) : 0.0f;
  }
  for (int i = 0; i < VO; ++i) {
    sum[r][i] = 0.0f;
  }
}

for (long j = begin; j < end; ++j) {
  float key[QK], value[VO];
  for (int i = 0; i < QK; ++i) {
    const int d = lane + i * LANES;
    key[i] = d < D ? float(k[(j * kv_heads + kv_head) * D + d]) : 0.0f;
  }
  for (int i = 0; i < VO; ++i) {
    const int d = lane + i * LANES;
    value[i] = d < D_V ? float(v[(j * kv_heads + kv_head) * D_V + d]) : 0.0f;
  }
  for (int r = 0; r < ROWS; ++r) {
    if (j < low[r] || j >= high[r]) {  // the same in all lanes
      continue;
    }
    float part = 0.0f;
    for (int i = 0; i < QK; ++i) {
      part += query[r][i] * key[i];
    }
    float s = metal::simd_sum(part);
    if (softcap > 0.0f) {
      s = softcap * metal::precise::tanh(s / softcap);
    }
    if (s == -INFINITY) {
      continue;
    }
    const float higher = s > top[r] ? s : top[r];
    const float before = metal::precise::exp(top[r] - higher);
    const float p = metal::precise::exp(s - higher);
    top[r] = higher;
    l[r] = l[r] * before + p;
    for (int i = 0; i < VO; ++i) {
      sum[r][i] = sum[r][i] * before + p * value[i];
    }
  }
}

for (int r = 0; r < ROWS; ++r) {
  const long token = first + r;
  if (token >= tokens) {
    continue;
  }
  for (int i = 0; i < VO; ++i) {
    const int d = lane + i * LANES;
    if (d < D_V) {
      out[(token * heads + head) * D_V + d] = T(sum[r][i] / l[r]);
    }
  }
  if (lane == 0) {
    lse[token * heads + head] = used[r] ? metal::precise::log(l[r]) + top[r] : 0.0f;
  }
}
"""
