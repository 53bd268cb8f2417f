"""A stand-in for `mx.fast.metal_kernel` where there is no Metal: the kernel's body, compiled as C++, on the CPU.

It makes the signature that MLX makes. Each thread of a simdgroup is a fiber; those of one run in turn, from one
`simd_sum` to the next. Arrays check every index, and outputs that each element is written once.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

COMPILER = shutil.which("c++") or shutil.which("g++")

_TYPES = {"float32": "float", "bfloat16": "bfloat16_t", "int32": "int32_t", "int64": "int64_t"}

_SHIM = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

struct uint3 { unsigned x, y, z; };

struct bfloat16_t {  // rounds to the nearest, ties to even
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

static long outside = 0;  // indices beyond an array

template <typename E>
struct Input {
  const E* data;
  long size;
  E operator[](long i) const {
    if (i < 0 || i >= size) { ++outside; return E(0); }
    return data[i];
  }
};

template <typename E>
struct Output {
  E* data;
  long size;
  int* written;
  E& operator[](long i) const {
    static E nowhere;
    if (i < 0 || i >= size) { ++outside; return nowhere; }
    ++written[i];
    return data[i];
  }
};

constexpr int WIDTH = 32;
struct Lane { ucontext_t context; std::vector<char> stack; bool over; int calls; };
static Lane lanes[WIDTH];
static ucontext_t scheduler;
static int current = 0;
static float slots[2][WIDTH];

namespace metal {
inline float simd_sum(float x) {
  const int turn = lanes[current].calls++ % 2;
  slots[turn][current] = x;
  swapcontext(&lanes[current].context, &scheduler);
  float parts[WIDTH];
  std::memcpy(parts, slots[turn], sizeof(parts));
  for (int width = WIDTH / 2; width > 0; width /= 2) {  // as a tree, which is how lanes add
    for (int i = 0; i < width; ++i) { parts[i] += parts[i + width]; }
  }
  return parts[0];
}
namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
}
}
"""

_MAIN = r"""
static uint3 at;
static void (*body)(uint3);
static void enter() {
  uint3 mine = at;
  mine.x = current;
  body(mine);
  lanes[current].over = true;
}

// Returns how many indices were outside, or -1 where lanes disagree on whether there is a sum to take part in.
static long run_all(unsigned height, unsigned depth) {
  outside = 0;
  for (unsigned z = 0; z < depth; ++z) for (unsigned y = 0; y < height; ++y) {
    at = {0, y, z};
    for (current = 0; current < WIDTH; ++current) {
      Lane& lane = lanes[current];
      lane.stack.resize(1 << 16);
      lane.over = false;
      lane.calls = 0;
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.data();
      lane.context.uc_stack.ss_size = lane.stack.size();
      lane.context.uc_link = &scheduler;
      makecontext(&lane.context, enter, 0);
    }
    for (int over = 0; over == 0;) {
      for (current = 0; current < WIDTH; ++current) {
        swapcontext(&scheduler, &lanes[current].context);
        over += lanes[current].over;
      }
      if (over != 0 && over != WIDTH) { return -1; }
    }
  }
  return outside;
}
"""


def _text(header, source, inputs, outputs, template):
    """Return C++ with the body as a function of a position in the grid, and `run(given, lengths, written, height, depth)`."""
    parameters, values = [], []
    for name, value in template:
        kind = "int" if isinstance(value, int) else "typename"
        parameters.append(f"{kind} {name}")
        values.append(str(value) if kind == "int" else value)
    arrays = [("Input", *i) for i in inputs] + [("Output", *o) for o in outputs]
    declared = "\n".join(f"static {kind}<{element}> {name};" for kind, name, element in arrays)
    begun = []
    for i, (kind, name, element) in enumerate(arrays):
        counts = "" if kind == "Input" else f", (int*)written[{i - len(inputs)}]"
        begun.append(f"  {name} = {{({element}*)given[{i}], lengths[{i}]{counts}}};")
    filled = "\n".join(begun)
    return f"""{_SHIM}{_MAIN}
{header}
{declared}
template <{", ".join(parameters)}>
void kernel(uint3 thread_position_in_grid) {{
{source}
}}
extern "C" long run(void** given, long* lengths, void** written, unsigned height, unsigned depth) {{
{filled}
  body = kernel<{", ".join(values)}>;
  return run_all(height, depth);
}}
"""


@functools.cache
def _compiled(text):
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(text)
        command = [COMPILER, "-std=c++14", "-O1", "-ffp-contract=off", "-shared", "-fPIC", source, "-o", library]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library)).run


def metal_kernel(name, input_names, output_names, source, header=""):
    """Stand in for `mx.fast.metal_kernel`, for kernels that know their place by `thread_position_in_grid` alone."""
    import ml_dtypes
    import mlx.core as mx

    def host(x):
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(x)

    def short(dtype):
        return str(dtype).rpartition(".")[2]

    def call(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert grid[0] == 32
        assert threadgroup == (32, 1, 1)
        given = [np.ascontiguousarray(host(x)) for x in inputs]
        kinds = [np.dtype(ml_dtypes.bfloat16 if short(d) == "bfloat16" else short(d)) for d in output_dtypes]
        made = [np.full(shape, np.nan, kind) for shape, kind in zip(output_shapes, kinds, strict=True)]
        written = [np.zeros(shape, np.int32) for shape in output_shapes]
        text = _text(
            header,
            source,
            [(n, _TYPES[short(x.dtype)]) for n, x in zip(input_names, inputs, strict=True)],
            [(n, _TYPES[short(d)]) for n, d in zip(output_names, output_dtypes, strict=True)],
            [(n, v if isinstance(v, int) else _TYPES[short(v)]) for n, v in template],
        )
        every = [*given, *made]
        pointers = (ctypes.c_void_p * len(every))(*(x.ctypes.data for x in every))
        counts = (ctypes.c_void_p * len(made))(*(x.ctypes.data for x in written))
        sizes = (ctypes.c_long * len(every))(*(x.size for x in every))
        outside = _compiled(text)(pointers, sizes, counts, *grid[1:])
        assert outside == 0, f"{name}: {outside} indices outside of an array (-1: lanes that do not agree)"
        for of, count in zip(output_names, written, strict=True):
            assert (count == 1).all(), f"{name}: {of} is not written once throughout"
        return [
            mx.array(x.view(np.uint16)).view(mx.bfloat16) if x.dtype == ml_dtypes.bfloat16 else mx.array(x)
            for x in made
        ]

    return call
