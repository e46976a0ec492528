"""Training throughput of this project's trainer, the plain loop of most CIFAR repositories, and timm's loader.

All paths of a network take turns in one process, an epoch of the same images each. For this project's trainer, the
seconds of data, forward, backward and optimizer, the peak memory, and the share of the machine's rate of matrix
products are measured, too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2bn.backbones.cost import count_multiply_adds
from l2bn.benchmarks import together
from l2bn.benchmarks.measure import (
    Action,
    forget_compiled,
    interleaved,
    machine,
    peak_memory,
    synchronise,
    undisturbed,
    with_earlier_rows,
    write_json,
)
from l2bn.benchmarks.paths import epochs_of, ours, plain, timm
from l2bn.benchmarks.train_report import write_train_report
from l2bn.benchmarks.workload import NETWORKS, NORMS, Workload, add_workload_arguments, make_workload
from l2bn.data.loader import Batch
from l2bn.training.allocator import free_as_usual, keep_freed_memory
from l2bn.training.compilation import should_compile
from l2bn.training.loop import Trainer

STEPS = {32: 10, 224: 6}  # of an epoch, by image size
LONG_RUN = 39_000  # updates: CIFAR, 200 epochs of 256 images
PHASES = ("data", "forward", "backward", "optimizer")

Row = dict[str, Any]


class Stopwatch:
    """Seconds of each phase; on CUDA the device finishes one before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            synchronise(self.device)
            start = time.perf_counter()
            result = call(*arguments, **options)
            synchronise(self.device)
            self.seconds[phase] += time.perf_counter() - start
            return result

        return measured


class _Replaced:
    """An object with some of its methods replaced."""

    def __init__(self, original: Any, **methods: Any) -> None:
        self.__dict__.update(methods, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __len__(self) -> int:
        return len(self._original)


class _TimedTrainer(Trainer):
    forward_timed: Callable[..., tuple[Tensor, Tensor]]

    def forward(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        return self.forward_timed(images, labels, epoch, step)


def split_of(trainer: Trainer, epochs: int, device: torch.device) -> dict[str, float]:
    """Seconds of each phase of a step and of the whole step, in the fastest of some epochs."""
    fastest: dict[str, float] = {"step": float("inf")}
    for _ in range(epochs):
        watch = Stopwatch(device)

        def epoch_of(*arguments: Any, watch: Stopwatch = watch) -> Iterator[Batch]:
            batches = trainer.train.epoch(*arguments)
            taken = watch.timed("data", lambda: next(batches, None))
            while (batch := taken()) is not None:
                yield batch

        timed = _TimedTrainer(
            **{
                **vars(trainer),
                "train": _Replaced(trainer.train, epoch=epoch_of),
                "fabric": _Replaced(trainer.fabric, backward=watch.timed("backward", trainer.fabric.backward)),
                "optimizer": _Replaced(trainer.optimizer, step=watch.timed("optimizer", trainer.optimizer.step)),
            }
        )
        object.__setattr__(timed, "forward_timed", watch.timed("forward", trainer.forward))
        action = epochs_of(timed)
        synchronise(device)
        start = time.perf_counter()
        action()
        synchronise(device)
        seconds = {**watch.seconds, "step": time.perf_counter() - start}
        if seconds["step"] < fastest["step"]:
            fastest = seconds
    return {phase: value / len(trainer.train) for phase, value in fastest.items()}


def one_step_of(trainer: Trainer) -> Action:
    """An action that takes the first step of an epoch."""
    first = _Replaced(trainer.train, epoch=lambda *arguments: islice(trainer.train.epoch(*arguments), 1))
    return epochs_of(Trainer(**{**vars(trainer), "train": first}))


def flops_of(workload: Workload) -> int:
    """Floating-point operations of convolutions and matrix products in a training step of one image.

    Two for a multiply-add. Backward counts twice, since each product has two gradients (torch's counter takes a
    depthwise convolution's backward for that of a full one).
    """
    return 3 * 2 * count_multiply_adds(workload.build("bn"), workload.size)


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
    forget_compiled()
    options = {"threads": arguments.threads, "precision": arguments.precision}
    actions: dict[str, Action] = {}
    trainers: dict[str, Trainer] = {}
    rows: list[Row] = []
    for norm in arguments.norms:
        for caller in arguments.callers:
            compiler = {"eager": False, "compiled": True, "graphs": "graphs"}[caller]
            name = f"ours, {norm}, {caller}"
            actions[name], trainers[name] = ours(workload, norm, device, compile=compiler, **options)
            compile_now(trainers[name])
            rows.append({"path": "ours", "norm": norm, "caller": caller, "name": name})
    for path, make in (("plain", plain), ("timm", timm)):
        actions[path] = by_itself(make(workload, "bn", device))
        rows.append({"path": path, "norm": "bn", "caller": "eager", "name": path})
    with undisturbed():
        for action in actions.values():
            action()
    auto = should_compile("auto", workload.build("bn"), device, LONG_RUN)
    seconds = interleaved(actions, device, arguments.seconds, fewest=arguments.rounds, warm_up=0)
    for row in rows:
        name = row.pop("name")
        row |= {
            "network": workload.network,
            "batch": workload.batch,
            "size": workload.size,
            "images": workload.source,
            "images_per_second": workload.images / seconds[name],
        }
        if name in trainers:
            row["auto"] = row["caller"] == ("compiled" if auto else "eager")
            with undisturbed():
                row["peak_bytes"] = peak_memory(one_step_of(trainers[name]), device)
                row["seconds"] = split_of(trainers[name], 3, device)
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


def write_trace(workload: Workload, path: Path, device: torch.device, **options: Any) -> None:
    """Write a trace of a few training steps, for Perfetto (ui.perfetto.dev)."""
    action, _ = ours(workload, "bn", device, **options)
    action()
    with torch.profiler.profile(record_shapes=True) as profile:  # of every kind of device that there is
        action()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser, list(NETWORKS))
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument(
        "--callers", nargs="+", choices=["eager", "compiled", "graphs"], default=["eager", "compiled"]
    )
    parser.add_argument("--precision", default="32-true", help="of this project's trainer (default: 32-true)")
    parser.add_argument("--batch", type=int, help="images a step (default: 128 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time of a network (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="fewest epochs of each path (default: 5)")
    parser.add_argument(
        "--together",
        type=int,
        nargs="+",
        metavar="RUNS",
        help="instead, images/s of so many runs side by side and of one alone, of the first norm",
    )
    parser.add_argument("--profile", type=Path, help="instead, write a trace of the first network's steps here")


def run(arguments: argparse.Namespace) -> None:
    """Raises UserError. With --json, the networks measured before in the same setting keep their rows."""
    if arguments.together:
        together.run(arguments)
        return
    device = torch.device(arguments.device)
    workloads = (
        make_workload(name, arguments.root, STEPS[NETWORKS[name][1]], arguments.batch)
        for name in arguments.networks
    )
    if arguments.profile:
        options = {"threads": arguments.threads, "precision": arguments.precision}
        write_trace(next(workloads), arguments.profile, device, **options)
        print(f"{arguments.profile}: open it at https://ui.perfetto.dev")
        return
    result: dict[str, Any] = {"benchmark": "train", "precision": arguments.precision, "rows": []}
    for workload in workloads:
        rows = measure(workload, arguments, device)
        flops = flops_of(workload)
        result["rows"] += [{**row, "flops_per_image": flops} for row in rows]
        for row in rows:
            print(
                f"{row['network']:13} {row['path']:6} {row['norm']:5} {row['caller']:9}"
                f"{row['images_per_second']:9.1f} images/s",
                flush=True,
            )
    result |= {"machine": machine(device), "matrix_products": matrix_product_rates(device)}
    if arguments.json:  # first, because it is what took the time
        result["rows"] = with_earlier_rows(arguments.json, result)
        write_json(arguments.json, result)
    print("\n" + write_train_report(result, arguments.json))
