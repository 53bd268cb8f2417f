from collections.abc import Callable
from typing import Any

def njit(
    *, cache: bool = False, fastmath: bool | set[str] = False, nogil: bool = False, parallel: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...

prange = range
