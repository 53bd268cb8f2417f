"""The kernels on a CUDA device, all peers beside ours in one run: ``python benchmarks/run.py cuda``.

A row is ``{op, work, impl, ms, low, high, tflops or tbs, host_us, err}``: the median and the quartiles of the time on the
device, the rate, the time in which Python issues one call, and the relative error against float32 or wider. A contender
that is not installed, fails or is wrong has a row with ``left_out`` instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_attention
import cuda_memory
import measure
import torch
from cuda_timing import Case, Clock, rows

PEERS = ("flash-attn-4", "quack-kernels", "liger-kernel", "nvidia-cutlass-dsl")
PACKAGES = ("torch", "triton", "scree", *PEERS)
PARTS = {"attention": cuda_attention.cases, "memory": cuda_memory.cases}
ATTENTION = "attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this part of the benchmarks."""
    options = parser.add_argument_group("cuda")
    options.add_argument("--quick", action="store_true", help="fewer workloads and rounds; nothing is saved")
    options.add_argument("--only", choices=PARTS, help="one half; the other half's saved rows are kept if they fit")
    options.add_argument("--check-only", action="store_true", help="compare every contender's results, time nothing")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="a folder for a copy of the results")
    options.add_argument("--minutes", type=float, default=7.0, help="no op is begun after these")


def main(arguments: argparse.Namespace, show: Any) -> None:
    """Measure everything, save after each op, and show the table."""
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    measured = device() | {"rows": []}
    name = slug(measured["device"])
    say(f"{measured['device']}, driver {measured['driver']}, {measured['versions']}")
    clock = None if arguments.check_only else Clock(rounds=5 if arguments.quick else 11, group_ms=8.0)
    if clock is not None:
        measured["ceilings"] = ceilings(clock)
        say(f"copy {measured['ceilings']['copy_tbs']} TB/s, matmul {measured['ceilings']['matmul_tflops']} TFLOP/s")
    until = time.monotonic() + 60 * arguments.minutes
    for case in cases(arguments.only, arguments.quick):
        if time.monotonic() > until:
            measured["rows"].append({"op": case.op, "work": case.work, "impl": "all", "left_out": "the time was up"})
            continue
        say(f"{case.op} | {case.work}")
        for row in rows(case, clock, say):
            measured["rows"].append(row)
            say("  " + line(row))
        gc.collect()
        torch.cuda.empty_cache()
        if clock is not None and not arguments.quick:
            save(name, measured, arguments.only, arguments.output)
    if arguments.check_only:
        wrong = [row for row in measured["rows"] if row["impl"].startswith("scree") and "left_out" in row]
        say(f"{len(measured['rows'])} contenders, {len(wrong)} of ours wrong")
        sys.exit(bool(wrong))
    print(show(measured))


def cases(only: str | None, quick: bool) -> Iterator[Case]:
    """The cases of both halves, or of one."""
    for part, make in PARTS.items():
        if only in (None, part):
            yield from make(quick)


def say(text: str) -> None:
    """Print at once: a run that is cut off leaves what it has found."""
    print(text, flush=True)


def line(row: dict[str, Any]) -> str:
    """One row for the eye."""
    if "left_out" in row:
        return f"{row['impl']:38} left out: {row['left_out']}"
    if "ms" not in row:
        return f"{row['impl']:38} err {row['err']:.1e}"
    rate = f"{row['tflops']:7.0f} TFLOP/s" if "tflops" in row else f"{row['tbs']:7.2f} TB/s   "
    host = f"host {row['host_us']:7.1f} us"
    if "host_us_tensors" in row:
        host += f" ({row['host_us_tensors']:.1f} us)"
    return f"{row['impl']:38} {row['ms']:9.4f} ms  {rate}  {host}  err {row['err']:.1e}"


def ceilings(clock: Clock) -> dict[str, float]:
    """What this device does in this run at most: bytes copied, read and written, and a product of matrices."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    times = clock.measure({"copy": [lambda: target.copy_(source)], "matmul": [lambda: a @ b]})
    return {
        "copy_tbs": round(2.0 * 4 * 2**28 / (times["copy"]["ms"] * 1e9), 3),
        "matmul_tflops": round(2.0 * 8192**3 / (times["matmul"]["ms"] * 1e9), 1),
    }


def device() -> dict[str, Any]:
    """What this is measured on, the device in the place of the processor."""
    return measure.machine(PACKAGES) | {"device": torch.cuda.get_device_name(), "driver": _driver()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def slug(device: str) -> str:
    """The name of the file of a device: "NVIDIA H100 80GB HBM3" is nvidia-h100."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())[:2])


def save(name: str, measured: dict[str, Any], only: str | None, output: Path | None) -> None:
    """Write the part "cuda"; with one half only, beside the other half if that is of the same commit and device."""
    path = measure.RESULTS / f"{name}.json"
    kept: list[dict[str, Any]] = []
    if only is not None and path.exists():
        before = json.loads(path.read_text()).get("cuda", {})
        if all(before.get(key) == measured[key] for key in ("commit", "device", "driver", "versions")):
            kept = [row for row in before["rows"] if row["op"].startswith(ATTENTION) != (only == "attention")]
    both = sorted([*kept, *measured["rows"]], key=lambda row: not row["op"].startswith(ATTENTION))
    written = measure.save(name, "cuda", measured | {"rows": both})
    if output is not None:
        shutil.copy(written, output / written.name)
