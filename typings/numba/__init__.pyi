from collections.abc import Callable
from typing import Any

def njit(*, cache: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
