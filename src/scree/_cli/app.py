"""The entry point, which imports no more than the standard library until typer and rich are known to be there."""

from __future__ import annotations

import sys

_NEEDED = ("rich", "typer")
_INTERRUPTED = 130  # what shells say of Ctrl-C


def main() -> None:
    """Run the command line, or say in one sentence what it lacks."""
    try:
        from ._commands import app
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        sys.exit(f'scree: the command line needs {package}, which is not installed: pip install "scree[cli]"')
    except KeyboardInterrupt:  # while that loads; after it, typer sees to it
        sys.exit(_INTERRUPTED)
    app(prog_name="scree")
