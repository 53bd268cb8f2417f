"""What a type checker tells users of the public functions; pyright reads it in `scripts/lint`, and nothing runs it."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

import scree
from scree import Array, kernels


def types(arr: Array, flag: bool) -> None:
    assert_type(scree.pack([arr.values]), Array)
    assert_type(arr[1:], Array)
    assert_type(arr[[0, 2]], Array)
    assert_type(arr[0], Any)
    assert_type(2 * arr + arr, Array)
    assert_type(-arr, Array)
    assert_type(arr == 2 * arr, Array)
    assert_type(arr != 1, Array)
    assert_type(arr.map(abs), Array)
    assert_type(kernels.varlen_attention(arr, arr, arr), Array)
    assert_type(kernels.varlen_attention(arr, arr, arr, return_lse=True), tuple[Array, Array])
    assert_type(kernels.varlen_attention(arr, arr, arr, return_lse=flag), tuple[Array, Array] | Array)
    kernels.varlen_reduce(arr, "average")  # pyright: ignore[reportArgumentType]
