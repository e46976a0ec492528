"""Training throughput of this project's trainer, the plain loop of most CIFAR repositories, and timm's loader.

All paths of a network take turns in one process, an epoch of the same images each. For this project's trainer, the
seconds of data, forward, backward and optimizer, the peak memory, and the share of the machine's rate of matrix
products are measured, too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import torch

from l2bn.backbones.cost import count_multiply_adds
from l2bn.benchmarks.measure import (
    DEVICE,
    Action,
    Result,
    Row,
    add_batch,
    add_callers,
    add_common_arguments,
    interleaved,
    page,
    peak_memory,
    synchronise,
    table,
)
from l2bn.benchmarks.workload import NETWORKS, Workload, build, compute, epochs_of, make_workload, ours, plain, timm
from l2bn.data.loader import Batch
from l2bn.data.splits import Images
from l2bn.training.acceleration import computes_bfloat16, should_compile, uses_cuda_graphs
from l2bn.training.compute import free_as_usual, keep_freed_memory
from l2bn.training.loop import Trainer

NORMS = ("bn", "l2bn")
PRECISIONS = ("32-true", *(["bf16-mixed"] if DEVICE.type == "cuda" or computes_bfloat16() else []))
# Of an epoch, by image size. The other loops wait for their workers at the start of each: about a hundredth of ten
# steps on a CPU, a tenth on a GPU.
STEPS = {32: 50 if DEVICE.type == "cuda" else 10, 224: 6}
LONG_RUN = 39_000  # updates: CIFAR, 200 epochs of 256 images
COMPILE: dict[str, Any] = {"eager": False, "compiled": True, "graphs": "graphs"}
PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of each phase; on CUDA the device finishes one before the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            synchronise()
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronise()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return measured

    def timed_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        taken = self.timed("data", lambda: next(batches, None))
        while (batch := taken()) is not None:
            yield batch


def phases_of(trainer: Trainer) -> dict[str, float]:
    """Seconds of each phase and of the whole step ("step"), the mean over an epoch."""
    watch = Stopwatch()
    fabric, optimizer, epoch = trainer.fabric, trainer.optimizer, trainer.train.epoch
    with (
        patch.object(trainer.train, "epoch", lambda *arguments: watch.timed_batches(epoch(*arguments))),
        patch.object(Trainer, "forward", staticmethod(watch.timed("forward", trainer.forward))),
        patch.object(fabric, "backward", watch.timed("backward", fabric.backward)),
        patch.object(optimizer, "step", watch.timed("optimizer", optimizer.step)),
    ):
        watch.timed("step", epochs_of(trainer))()
    return {phase: seconds / len(trainer.train) for phase, seconds in watch.seconds.items()}


def memory_of_a_step(trainer: Trainer) -> int:
    """Peak bytes of tensors in the first step of an epoch."""
    epoch = trainer.train.epoch
    with patch.object(trainer.train, "epoch", lambda *arguments: islice(epoch(*arguments), 1)):
        return peak_memory(epochs_of(trainer))


def flops_of(network: str) -> int:
    """Floating-point operations of convolutions and matrix products in a training step of one image.

    Two for a multiply-add. Backward counts twice, since each product has two gradients (torch's counter takes a
    depthwise convolution's backward for that of a full one).
    """
    return 3 * 2 * count_multiply_adds(build(network), NETWORKS[network].size)


def matrix_product_rates() -> dict[str, float]:
    """FLOP/s of a large matrix product, by the library for matrices and by that for convolutions (as a 1x1 one)."""
    n = 1024 if DEVICE.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=DEVICE), torch.randn(n, n, device=DEVICE)
    pixels = a.view(n // 256, 16, 16, n).movedim(-1, 1)  # (n / 256, n, 16, 16), channels_last
    kernel = b.view(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
    products = {"matmul": lambda: torch.mm(a, b), "convolution": lambda: torch.conv2d(pixels, kernel)}
    with torch.no_grad():
        times = interleaved(products, seconds=3)
    return {name: 2 * n**3 / taken for name, taken in times.items()}


def automatic(workload: Workload, precision: str) -> str:
    """The way in which `compute.compile=auto` calls a network in a long run on this device."""
    model, in_memory = build(workload.network), isinstance(workload.splits.train, Images)
    if uses_cuda_graphs(compute(compile="auto", precision=precision), model, DEVICE, in_memory):
        return "graphs"
    return "compiled" if should_compile("auto", model, DEVICE, LONG_RUN) else "eager"


def measure(workload: Workload, callers: list[str], seconds: float) -> list[Row]:
    """Time all paths in turn; a row for each."""
    torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
    actions: dict[tuple[str, ...], Action] = {}
    trainers: dict[tuple[str, ...], Trainer] = {}
    for precision, norm, caller in product(PRECISIONS, NORMS, callers):
        key: tuple[str, ...] = ("ours", norm, caller, precision)
        actions[key], trainers[key] = ours(workload, norm, compile=COMPILE[caller], precision=precision)
    actions["plain", "bn", "eager", "32-true"] = by_itself(plain(workload))
    actions["timm", "bn", "eager", "32-true"] = by_itself(timm(workload))
    times = interleaved(actions, seconds, fewest=5, warm_up=1)
    flops = flops_of(workload.network)
    rows: list[Row] = []
    for key, taken in times.items():
        path, norm, caller, precision = key
        row: Row = {"path": path, "norm": norm, "caller": caller, "precision": precision}
        row |= {"network": workload.network, "batch": workload.batch, "size": workload.size}
        row |= {"images_per_second": workload.images / taken, "flops_per_image": flops}
        if key in trainers:
            row["auto"] = caller == automatic(workload, precision)
            if caller != "graphs":  # whose memory is held between steps, too
                row["peak_bytes"] = memory_of_a_step(trainers[key])
            row["seconds"] = min((phases_of(trainers[key]) for _ in range(3)), key=itemgetter("step"))
        rows.append(row)
    return rows


def by_itself(action: Action) -> Action:
    """The action in a process that returns freed memory to the system, which is glibc's default."""

    def run() -> None:
        free_as_usual()
        action()
        keep_freed_memory()

    return run


NAMES = {"plain": "plain loop", "timm": "timm's loader"}

EXPLANATION = """
Whole training steps, including data, in float32 where no other type is named. All paths of a network take turns in
one process, on the same images of noise. Plain loop: PIL transforms, a DataLoader with 2 workers, eager,
contiguous, loss and accuracy read at every step. timm's loader: `create_loader`, 2 workers (random resized crops),
in the same loop with timm's SGD. Both free memory as glibc does by default, ours keeps it. ×: images/s relative to
the plain loop's, which has BN. The phases of a step are in milliseconds; waiting: the share of data in the step.
Memory: peak bytes in a step above those held before it. Arithmetic: rate of convolutions and matrix products, as a
share of the machine's rate of large matrix products in float32 ({rate} GFLOP/s, the better of two libraries). *:
the choice of `compute.compile=auto` for a run of 39,000 updates.
"""


def name_of(row: Row) -> str:
    if row["path"] in NAMES:
        return NAMES[row["path"]]
    half = ", bfloat16" if row.get("precision") == "bf16-mixed" else ""
    return f"ours, {row['norm'].upper()}, {row['caller']}{half}{'*' * row['auto']}"


def speed_up(row: Row, rows: list[Row]) -> float:
    """Images/s relative to the plain loop's on the same network."""
    (plain,) = (r for r in rows if r["network"] == row["network"] and r["path"] == "plain")
    return float(row["images_per_second"] / plain["images_per_second"])


def make_page(result: Result) -> str:
    rows = result["rows"]
    best = max(result["matrix_products"].values())
    lines = []
    for row in rows:
        speed = row["images_per_second"]
        phases = ["–"] * (len(PHASES) + 2)
        if "seconds" in row:
            seconds = row["seconds"]
            phases = [f"{1e3 * seconds[phase]:.3g}" for phase in PHASES]
            phases.append(f"{seconds['data'] / seconds['step']:.1%}")
            phases.append(f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else "–")
        workload = f"{row['network']}, {row['batch']} × {row['size']}²"
        speeds = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}", f"{speed_up(row, rows):.2f}"
        arithmetic = f"{speed * row['flops_per_image'] / best:.0%}"
        lines.append((workload, name_of(row), *speeds, *phases, arithmetic))
    columns = ("network", "path", "images/s", "×", *PHASES, "waiting", "memory", "arithmetic")
    text = EXPLANATION.format(rate=f"{best / 1e9:,.0f}")
    return page("Training: images/s", result, text, table(columns, lines, names=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, seconds=60)
    add_batch(parser)
    add_callers(parser)


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for network in arguments.networks:
        workload = make_workload(network, STEPS[NETWORKS[network].size], arguments.batch)
        for row in measure(workload, arguments.callers, arguments.seconds):
            rows.append(row)
            names = (row[key] for key in ("path", "norm", "caller", "precision"))
            print(network, *names, f"{row['images_per_second']:.1f} images/s", flush=True)
    return {"rows": rows, "matrix_products": matrix_product_rates()}
