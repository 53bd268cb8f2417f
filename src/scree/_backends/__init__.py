"""Finding the framework of an array, without importing any that is not in use.

`FRAMEWORKS` is the only list of frameworks in scree: the resolver, the tests, the documentation and `scree doctor`
are derived from it. Each backend is one module of plain functions, described by `_protocol.Backend`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

from ._protocol import Backend, Dense

__all__ = ["FRAMEWORKS", "Backend", "Dense", "backend_of", "find_backend", "load", "on_load"]

# framework -> the module and the class whose instances are its arrays
FRAMEWORKS: dict[str, tuple[str, str]] = {
    "numpy": ("numpy", "ndarray"),
    "torch": ("torch", "Tensor"),
    "jax": ("jax", "Array"),
    "mlx": ("mlx.core", "array"),
    "cupy": ("cupy", "ndarray"),
}

# Plain dictionaries: torch.compile(fullgraph=True) traces through them, and not through functools.cache.
_LOADED: dict[str, Backend] = {}
_BY_TYPE: dict[type, Backend] = {}
_HOOKS: list[Callable[[Backend], None]] = []


def load(name: str) -> Backend:
    """Import the backend of the framework `name` (the framework itself must be installed).

    Parameters
    ----------
    name : str
        A key of `FRAMEWORKS`.

    Returns
    -------
    Backend
        The module `scree._backends.<name>`.

    Raises
    ------
    ImportError
        The framework cannot be imported.
    """
    if name == "torch" and _is_traced():
        from ._in_dynamo import backend

        return backend
    return bring(name)


def bring(name: str) -> Backend:
    """Do what `load` does, untraced."""
    found = _LOADED.get(name)
    if found is None:
        found = _LOADED[name] = cast(Backend, importlib.import_module(f"{__name__}.{name}"))
        for hook in _HOOKS:
            hook(found)
    return found


def _is_traced() -> bool:
    """Whether Dynamo traces this, which carries out an import statement, and refuses `import_module`."""
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and compiler.is_compiling()


def on_load(hook: Callable[[Backend], None]) -> None:
    """Call `hook` with every backend: those loaded already, now; the others, when they are."""
    _HOOKS.append(hook)
    for backend in _LOADED.values():
        hook(backend)


def find_backend(x: Any) -> Backend | None:
    """Return the backend whose framework `x` is an array of, or None. Never imports a framework."""
    found = _BY_TYPE.get(type(x))
    if found is not None:
        return found
    for name, (module_name, class_name) in FRAMEWORKS.items():
        module = sys.modules.get(module_name)
        kind = getattr(module, class_name, None)  # None also while the framework is still being imported
        if kind is not None and isinstance(x, kind):
            backend = load(name)
            _BY_TYPE[type(x)] = backend
            return backend
    return None


def backend_of(x: Any, name: str = "values") -> Backend:
    """Return the backend whose framework `x` is an array of.

    Raises
    ------
    TypeError
        `x` is no array of a framework in `FRAMEWORKS`; `name` says in the message which argument it was.
    """
    backend = find_backend(x)
    if backend is None:
        known = ", ".join(".".join(path) for path in FRAMEWORKS.values())
        raise TypeError(f"{name}: got {type(x).__module__}.{type(x).__qualname__}; needs an array of one of: {known}")
    return backend
