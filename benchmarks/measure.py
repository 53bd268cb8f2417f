"""Keeping what was measured together with what it was measured on. The timing itself is scree.bench's."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import scree
from scree.bench import interleaved, processor

__all__ = ["RESULTS", "interleaved", "machine", "save"]

RESULTS = Path(__file__).parent / "results"


def machine(packages: tuple[str, ...]) -> dict[str, Any]:
    """Say what this is measured on: device, system, versions of what is installed, and the commit of the checkout.

    Where the checkout is a copy without its history, SCREE_COMMIT names its commit.
    """
    known = os.environ.get("SCREE_COMMIT")
    return {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}, CPython {platform.python_version()}",
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": known or _git("rev-parse", "HEAD"),
        "changed": known is None and bool(_git("status", "--porcelain", "--", "src")),
    }


def _version(package: str) -> str | None:
    if package == "scree":
        return scree.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def save(name: str, part: str, measured: dict[str, Any]) -> Path:
    """Write one part of `results/<name>.json`, keeping the other parts."""
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = measured
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(parts, indent=1) + "\n")
    return path
