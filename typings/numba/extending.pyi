from collections.abc import Callable
from typing import Any

def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
