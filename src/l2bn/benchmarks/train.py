"""Training throughput of this project's trainer, the plain loop of most CIFAR repositories, and timm's loader.

All paths of a network take turns in one process, an epoch of the same images each. For this project's trainer, the
seconds of data, forward, backward and optimizer, the peak memory, and the share of the machine's rate of matrix
products are measured, too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from l2bn.backbones.cost import count_multiply_adds
from l2bn.benchmarks import together
from l2bn.benchmarks.measure import (
    Action,
    add_common_arguments,
    count,
    device_of,
    interleaved,
    peak_memory,
    synchronise,
    undisturbed,
)
from l2bn.benchmarks.paths import compute, epochs_of, ours, plain, timm
from l2bn.benchmarks.report import Result, Row, hardware, page, prose, report, table
from l2bn.benchmarks.workload import NETWORKS, NORMS, Workload, build, make_workload
from l2bn.data.loader import Batch
from l2bn.data.splits import Images
from l2bn.errors import UserError
from l2bn.training.compute import free_as_usual, keep_freed_memory, should_compile
from l2bn.training.environment import describe_environment
from l2bn.training.loop import Trainer

STEPS = {32: 10, 224: 6}  # of an epoch, by image size
LONG_RUN = 39_000  # updates: CIFAR, 200 epochs of 256 images
COMPILERS = {"eager": False, "compiled": True, "graphs": "graphs"}
# Options without a meaning beside --together have no default in the parser, so that it is known which are given.
DEFAULTS: dict[str, Any] = {"callers": ["eager", "compiled"], "seconds": 60.0}
PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of each phase; on CUDA the device finishes one before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronise(self.device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return measured

    def timed_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        taken = self.timed("data", lambda: next(batches, None))
        while (batch := taken()) is not None:
            yield batch


def phases_of(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Seconds of each phase and of the whole step ("step"), the mean over an epoch."""
    watch = Stopwatch(device)
    fabric, optimizer, epoch = trainer.fabric, trainer.optimizer, trainer.train.epoch
    with (
        patch.object(trainer.train, "epoch", lambda *arguments: watch.timed_batches(epoch(*arguments))),
        patch.object(Trainer, "forward", staticmethod(watch.timed("forward", trainer.forward))),
        patch.object(fabric, "backward", watch.timed("backward", fabric.backward)),
        patch.object(optimizer, "step", watch.timed("optimizer", optimizer.step)),
    ):
        watch.timed("step", epochs_of(trainer))()
    return {phase: seconds / len(trainer.train) for phase, seconds in watch.seconds.items()}


def memory_of_a_step(trainer: Trainer, device: torch.device) -> int:
    """Peak bytes of tensors in the first step of an epoch."""
    epoch = trainer.train.epoch
    with patch.object(trainer.train, "epoch", lambda *arguments: islice(epoch(*arguments), 1)):
        return peak_memory(epochs_of(trainer), device)


def flops_of(network: str) -> int:
    """Floating-point operations of convolutions and matrix products in a training step of one image.

    Two for a multiply-add. Backward counts twice, since each product has two gradients (torch's counter takes a
    depthwise convolution's backward for that of a full one).
    """
    return 3 * 2 * count_multiply_adds(build(network), NETWORKS[network].size)


def matrix_product_rates(device: torch.device, seconds: float = 3.0) -> dict[str, float]:
    """FLOP/s of a large matrix product, by the library for matrices and by that for convolutions (as a 1x1 one)."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    pixels = a.view(n // 256, 16, 16, n).movedim(-1, 1)  # (n / 256, n, 16, 16), channels_last
    kernel = b.view(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times = interleaved(
            {"matmul": lambda: torch.mm(a, b), "convolution": lambda: torch.conv2d(pixels, kernel)}, device, seconds
        )
    return {name: 2 * n**3 / value for name, value in times.items()}


def measure(workload: Workload, arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """Time all paths in turn; a row for each."""
    torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
    actions: dict[tuple[str, str, str], Action] = {}
    trainers: dict[tuple[str, str, str], Trainer] = {}
    for norm in arguments.norms:
        for caller in arguments.callers:
            key = "ours", norm, caller
            actions[key], trainers[key] = ours(
                workload, norm, device, compile=COMPILERS[caller], threads=arguments.threads
            )
            compile_now(trainers[key])
    actions["plain", "bn", "eager"] = by_itself(plain(workload, device))
    actions["timm", "bn", "eager"] = by_itself(timm(workload, device))
    with undisturbed():
        for action in actions.values():
            action()
    model, in_memory = build(workload.network), isinstance(workload.splits.train, Images)
    if compute(device, compile="auto").replays_graphs(model, device, in_memory):
        auto = "graphs"
    else:
        auto = "compiled" if should_compile("auto", model, device, LONG_RUN) else "eager"
    seconds = interleaved(actions, device, arguments.seconds, fewest=arguments.rounds, warm_up=0)
    rows: list[Row] = []
    for (path, norm, caller), taken in seconds.items():
        row: Row = {"path": path, "norm": norm, "caller": caller, "network": workload.network}
        row |= {"batch": workload.batch, "size": workload.size, "images": workload.source}
        row["images_per_second"] = workload.images / taken
        if path == "ours":
            trainer = trainers[path, norm, caller]
            row["auto"] = caller == auto
            with undisturbed():
                if caller != "graphs":  # whose memory is held between steps, too
                    row["peak_bytes"] = memory_of_a_step(trainer, device)
                row["seconds"] = min((phases_of(trainer, device) for _ in range(3)), key=itemgetter("step"))
        rows.append(row)
    return rows


def by_itself(action: Action) -> Action:
    """The action in a process that returns freed memory to the system, which is glibc's default."""

    def run() -> None:
        free_as_usual()
        action()
        keep_freed_memory()

    return run


def compile_now(trainer: Trainer) -> None:
    """Take one step, in which everything is compiled."""
    images, labels = next(trainer.train.epoch(0))
    loss, _ = trainer.forward(images, labels, 0, 0)
    trainer.fabric.backward(loss)
    trainer.optimizer.zero_grad()


# ---- The page -------------------------------------------------------------------------------------------------

NAMES = {"plain": "plain loop", "timm": "timm's loader"}

EXPLANATION = """
Whole training steps including data; all paths of a network take turns in one process, on the same images. Plain
loop: PIL transforms, a DataLoader with 2 workers, eager, contiguous, loss and accuracy read at every step.
timm's loader: `create_loader`, 2 workers (random resized crops), in the same loop with timm's SGD. Both free
memory as glibc does by default, ours keeps it. ×: images/s relative to the plain loop's, which has BN. The phases
of a step are in milliseconds; waiting: the share of data in the step. Memory: peak bytes in a step above those
held before it. Arithmetic: rate of convolutions and matrix products, as a share of the machine's rate of large
matrix products ({rate} GFLOP/s, the better of two libraries). *: the choice of `compute.compile=auto` for a run of
39,000 updates.
"""


def speed_up(row: Row, rows: list[Row]) -> float:
    """Images/s relative to the plain loop's on the same network."""
    (plain,) = (r for r in rows if r["network"] == row["network"] and r["path"] == "plain")
    return float(row["images_per_second"] / plain["images_per_second"])


def train_table(result: Result) -> str:
    rows = result["rows"]
    best = max(result["matrix_products"].values())
    lines = []
    for row in rows:
        name = NAMES.get(row["path"]) or f"ours, {row['norm'].upper()}, {row['caller']}{'*' * row['auto']}"
        speed = row["images_per_second"]
        phases = ["–"] * (len(PHASES) + 2)
        if "seconds" in row:
            seconds = row["seconds"]
            phases = [f"{1e3 * seconds[phase]:.3g}" for phase in PHASES]
            phases += [
                f"{seconds['data'] / seconds['step']:.1%}",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else "–",
            ]
        lines.append(
            (
                *(f"{row['network']}, {row['batch']} × {row['size']}²", name),
                *(f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}", f"{speed_up(row, rows):.2f}"),
                *phases,
                f"{speed * row['flops_per_image'] / best:.0%}",
            )
        )
    numbers = ("images/s", "×", *PHASES, "waiting", "memory", "arithmetic")
    return page(
        "Training: images/s",
        f"{hardware(result)}, {result['precision']}.",
        prose(EXPLANATION.format(rate=f"{best / 1e9:,.0f}")),
        table(("network", "path", *(f">{name}" for name in numbers)), lines),
        f"Images: {', '.join(sorted({row['images'] for row in rows}))}.",
    )


# ---- The command ----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS)
    parser.add_argument("--root", type=Path, help="folder of real images (default: noise)")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--callers", nargs="+", choices=COMPILERS, help="(default: eager compiled)")
    parser.add_argument("--batch", type=count, help="images a step (default: 128 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, help="measuring time of a network (default: 60)")
    parser.add_argument("--rounds", type=count, default=5, help="fewest epochs of each path (default: 5)")
    parser.add_argument(
        "--together",
        type=count,
        nargs="+",
        metavar="RUNS",
        help="instead, images/s of so many runs side by side and of one alone, of the first norm",
    )


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError."""
    given = [name for name in DEFAULTS if getattr(arguments, name) is not None]
    if arguments.together:
        if given:
            raise UserError(
                "--together measures eager runs in float32 for --rounds epochs and has no "
                f"{', '.join(f'--{name}' for name in given)}: leave out one or the other"
            )
        together.run(arguments)
        return
    for name in DEFAULTS.keys() - given:
        setattr(arguments, name, DEFAULTS[name])
    device = device_of(arguments)
    try:
        for caller in arguments.callers:
            compute(device, compile=COMPILERS[caller], threads=arguments.threads)
    except ValueError as error:
        raise UserError(f"--callers or --threads: {error}") from error
    workloads = (
        make_workload(name, arguments.root, STEPS[NETWORKS[name].size], arguments.batch)
        for name in arguments.networks
    )
    result: Result = {"benchmark": "train", "precision": "32-true", "rows": []}
    for workload in workloads:
        for row in measure(workload, arguments, device):
            result["rows"].append({**row, "flops_per_image": flops_of(workload.network)})
            print(
                f"{row['network']:13} {row['path']:6} {row['norm']:5} {row['caller']:9}"
                f"{row['images_per_second']:9.1f} images/s",
                flush=True,
            )
    result["machine"] = describe_environment(device)
    result["matrix_products"] = matrix_product_rates(device)
    report(result, arguments.json, train_table)
