"""Models of transformers with and without padding: ``python benchmarks/run.py huggingface [--device cuda]``.

A row is ``{op, work, impl, ms, low, high, rounds, tokens, places, batches, peak, err, leaks}``: the time of all batches
from the host to what the model returns, the tokens that are real, the places that the model computes on, the bytes above
those that were held before, the relative error, and whether it is too large for rounding. What every contender returns is compared first:
with the padded eager model on the CPU, with the padded model in float32 on a GPU, where the error may be twice that of the
padded model in the same dtype. On the CPU the collators follow, by themselves.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_cuda
import huggingface_collator
import huggingface_ways
import measure
import numpy as np
import torch
import transformers
from huggingface_table import BASE
from huggingface_ways import Rows, Way

from scree.demo import corpus, huggingface, pretrained

PACKAGES = ("scree", "numpy", "torch", "transformers")
GOAL = 0.9
_LIMIT = 1e-4  # of float32
_CHECKED = 500  # tokens


class Work(NamedTuple):
    """A model and the sequences that it runs.

    Attributes
    ----------
    name : str
    model : torch.nn.Module
    rows : list of list of int
    places : int
        Of a batch, at most.
    ops : tuple of str
        "forward", "training step" or both; a step is forward and backward, through all batches.
    """

    name: str
    model: Any
    rows: Rows
    places: int
    ops: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this part of the benchmarks."""
    options = parser.add_argument_group("huggingface")
    options.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    options.add_argument("--quick", action="store_true", help="tiny models; nothing is saved")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="a folder for a copy of the results")


def main(arguments: argparse.Namespace, show: Callable[[dict[str, Any]], str]) -> bool:
    """Measure everything, show the table, and save it; say whether it was saved."""
    warnings.filterwarnings("ignore")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.busy:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.busy else time.perf_counter
    measured = facts(device) | {"clock": clock.__name__, "rows": []}
    if arguments.remark:
        measured["remark"] = arguments.remark
    for row in rows(device, arguments.seconds, arguments.quick, clock):
        print(f"{row.get('ms', row.get('left_out')):>14}  {row['op']} | {row['work']} | {row['impl']}", flush=True)
        measured["rows"].append(row)
    print(show(measured), flush=True)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / "huggingface.json"
        path.write_text(json.dumps(measured, indent=1) + "\n")
    if arguments.quick:
        return False
    name = arguments.results if device == "cpu" else bench_cuda.slug(measured["device"])
    print(f"saved to {measure.save(name, 'huggingface', measured)}")
    return True


def facts(device: str) -> dict[str, Any]:
    """What this is measured on, and with."""
    if device == "cpu":
        return measure.machine(PACKAGES) | {"goal": GOAL, "threads": torch.get_num_threads()}
    found = bench_cuda.device()
    found["versions"]["transformers"] = transformers.__version__
    return found | {"goal": GOAL}


def rows(device: str, seconds: float, quick: bool, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Measure everything; give one row a contender."""
    for work in works(device, quick):
        for op in work.ops:
            yield from _measure(work, op, seconds, device, clock)
    if device == "cpu":
        yield from huggingface_collator.rows(min(seconds, 2.0), clock)


def works(device: str, quick: bool) -> Iterator[Work]:
    """The models; made one after the other."""
    both = ("forward", "training step")
    if device == "cuda":
        name = "Llama of width 2,048, 8 layers, bf16"
        size = dict(width=2048, layers=8, heads=16, kv_heads=4, hidden=5632, vocabulary=16384)  # noqa: C408
        places, lengths = 32768, _log_normal(6.2, 0.9, 16, 4096, total=65536)
        if quick:
            places, lengths = 4096, _log_normal(4.5, 0.9, 8, 1024, total=8192)
        yield Work(name, _llama(device, torch.bfloat16, **size), _tokens(lengths, 16384), places, both)
        return
    yield Work(*_minilm(8 if quick else 24), 2048, ("forward",))
    width, layers, total = (64, 1, 300) if quick else (512, 4, 1000)
    size = dict(width=width, layers=layers, heads=8, kv_heads=4, hidden=width * 11 // 4, vocabulary=4096)  # noqa: C408
    lengths = _log_normal(4.0, 1.0, 4, 512, total)
    yield Work(
        f"Llama of width {width}, {layers} layers",
        _llama(device, torch.float32, **size),
        _tokens(lengths, 4096),
        1024,
        both,
    )


def _minilm(n: int) -> tuple[str, Any, Rows]:
    docs = corpus.spread(corpus.read().docstrings, n)
    return f"MiniLM, {n} docstrings", huggingface.load(), [
        ids.tolist() for ids in pretrained.tokenize([doc.text for doc in docs])
    ]  # fmt: skip


def _llama(
    device: str, dtype: torch.dtype, *, width: int, layers: int, heads: int, kv_heads: int, hidden: int, vocabulary: int
) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _log_normal(mean: float, sigma: float, least: int, most: int, total: int) -> list[int]:
    """Lengths that are drawn until they have `total` tokens."""
    random, lengths = np.random.default_rng(0), list[int]()
    while sum(lengths) < total:
        lengths.append(int(np.clip(random.lognormal(mean, sigma), least, most)))
    return lengths


def _tokens(lengths: Sequence[int], vocabulary: int) -> Rows:
    random = np.random.default_rng(1)
    return [random.integers(0, vocabulary, n).tolist() for n in lengths]


def _measure(work: Work, op: str, seconds: float, device: str, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    lengths = [len(row) for row in work.rows]
    found: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Callable[[], Any]] = {}
    ways = huggingface_ways.ways(device)
    errors = _errors(work, op, ways, device)
    for name, way in ways.items():
        row: dict[str, Any] = {"op": op, "work": work.name, "impl": name}
        run = _runner(work, way, op, device)
        batches = list(way.batches(lengths, work.places))
        places = [sum(lengths[i] for i in b) if way.packed else max(lengths[i] for i in b) * len(b) for b in batches]
        row |= {"tokens": sum(lengths), "places": sum(places), "batches": len(batches)}
        row |= {"err": errors[name], "leaks": errors[name] > _limit(errors, device)}
        try:
            row["peak"] = _peak(run, device)
            contenders[name] = run
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
        found[name] = row
    timed = measure.interleaved(contenders, seconds * len(contenders), least=3, clock=clock)
    for name, times in timed.items():
        found[name] |= times
    work.model.zero_grad()
    yield from found.values()


class _Batch(NamedTuple):
    """A batch on the host, and the numbers of its sequences."""

    members: list[int]
    held: dict[str, Any]


def _collate(work: Work, way: Way, training: bool) -> list[_Batch]:
    batches = way.batches([len(row) for row in work.rows], work.places)
    return [_Batch(members, way.collate([work.rows[i] for i in members], training)) for members in batches]


def _inputs(work: Work, way: Way, batch: _Batch, device: str) -> dict[str, Any]:
    inputs = way.place(batch.held, work.model, device)
    return inputs | {"use_cache": False} if hasattr(work.model.config, "use_cache") else inputs


def _attend(model: Any, way: Way) -> None:
    if model.config._attn_implementation != way.implementation:
        model.set_attn_implementation(way.implementation)


def _runner(work: Work, way: Way, op: str, device: str) -> Callable[[], Any]:
    """What is timed: all batches, from the host to what the model returns."""
    training = op == "training step"
    batches = _collate(work, way, training)

    def timed() -> None:
        (_step if training else _forward)(work, way, batches, device)
        if device == "cuda":
            torch.cuda.synchronize()

    return timed


def _forward(
    work: Work, way: Way, batches: list[_Batch], device: str, keep: Callable[[Any, list[int]], None] | None = None
) -> None:
    _attend(work.model, way)
    with torch.no_grad():
        for batch in batches:
            outputs = work.model(**_inputs(work, way, batch, device))
            if keep is not None:
                keep(outputs, batch.members)


def _step(work: Work, way: Way, batches: list[_Batch], device: str) -> torch.Tensor:
    """The gradients of the mean loss over all batches; gives that loss."""
    _attend(work.model, way)
    work.model.zero_grad(set_to_none=True)
    counts = [len(row) - 1 for row in work.rows]
    losses = []
    for batch in batches:
        loss = work.model(**_inputs(work, way, batch, device)).loss
        share = loss * (sum(counts[i] for i in batch.members) / sum(counts))
        share.backward()
        losses.append(share.detach())
    return torch.stack(losses).sum()


def _errors(work: Work, op: str, ways: dict[str, Way], device: str) -> dict[str, float]:
    """The relative error of every contender, on a few rows; ours have to be right."""
    enough = int(np.searchsorted(np.cumsum([len(row) for row in work.rows]), _CHECKED)) + 3
    work = work._replace(rows=work.rows[:enough])
    result = _gradients if op == "training step" else _outputs
    exact = work if device == "cpu" else work._replace(model=copy.deepcopy(work.model).float())
    want = result(exact, ways["padded eager" if device == "cpu" else BASE], device)
    del exact
    errors = {name: _distance(result(work, way, device), want) for name, way in ways.items()}
    work.model.zero_grad()
    limit = _limit(errors, device)
    for name, error in errors.items():
        if name.startswith("scree") and not error <= limit:
            raise SystemExit(f"{name}, {op}, {work.name}: relative error {error:.1e}; at most {limit:.1e} is rounding")
    return errors


def _limit(errors: dict[str, float], device: str) -> float:
    """The largest error that is rounding."""
    return _LIMIT if device == "cpu" else 2 * errors[BASE]


def _outputs(work: Work, way: Way, device: str) -> torch.Tensor:
    """The outputs of all tokens in the order of the rows."""
    by_row: dict[int, torch.Tensor] = {}

    def keep(outputs: Any, members: list[int]) -> None:
        values = (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().cpu()
        lengths = [len(work.rows[i]) for i in members]
        cut = values[0].split(lengths) if way.packed else [v[:n] for v, n in zip(values, lengths, strict=True)]
        by_row.update(zip(members, cut, strict=True))

    _forward(work, way, _collate(work, way, False), device, keep)
    return torch.cat([by_row[i] for i in range(len(work.rows))])


def _gradients(work: Work, way: Way, device: str) -> torch.Tensor:
    loss = _step(work, way, _collate(work, way, True), device)
    layer = work.model.model.layers[0]
    parts = [layer.self_attn.k_proj.weight.grad, layer.mlp.up_proj.weight.grad]
    scaled = [(part.float() / part.float().norm()).flatten().cpu() for part in parts if part is not None]
    return torch.cat([loss[None].float().cpu(), *scaled])


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def _peak(run: Callable[[], Any], device: str) -> int | None:
    """The most bytes that a run holds beyond what was held before it; None where nobody tells."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0
