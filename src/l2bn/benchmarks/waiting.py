"""Spinning of threads that wait for each other: images/s of a run alone on a CPU, and beside a busy process.

GNU OpenMP's threads spin before they sleep. On a busy core that is time which the thread that they wait for lacks.
"""

import argparse
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from statistics import median
from unittest import mock

from l2bn.benchmarks.measure import (
    DEVICE,
    Action,
    Result,
    Row,
    add_common_arguments,
    count,
    page,
    seconds_of,
    table,
)
from l2bn.benchmarks.workload import NETWORKS, make_workload, ours
from l2bn.errors import UserError
from l2bn.training import SPINS, SPINS_OF_A_RUN

STEPS = 5  # of a turn
COUNTS = {"300000": "libgomp's default", SPINS_OF_A_RUN: "of a run", "0": "none"}
LOADS = "alone", "busy"

_turn: Action


def _prepare(network: str, batch: int) -> None:
    global _turn
    _turn, _ = ours(make_workload(network, STEPS, batch), "l2bn")
    _turn()


def _take_turn() -> float:
    return seconds_of(_turn)


@contextmanager
def _competitor() -> Iterator[None]:
    """A process that computes on one core until this one has ended."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(network: str, batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median seconds of a step, by load and count of spins, of processes that take turns."""
    times: dict[str, dict[str, list[float]]] = {load: {spins: [] for spins in COUNTS} for load in LOADS}
    order = random.Random(0)
    with ExitStack() as stack:
        processes = {}
        for spins in COUNTS:  # libgomp reads it when it is loaded, so each needs a process
            with mock.patch.dict(os.environ, {SPINS: spins}):
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (network, batch))
                processes[spins] = stack.enter_context(pool)
                pool.submit(_take_turn).result()
        for load in LOADS:
            with _competitor() if load == "busy" else nullcontext():
                end = time.perf_counter() + seconds
                while time.perf_counter() < end or not times[load]["0"]:
                    for spins in order.sample(list(COUNTS), len(COUNTS)):
                        times[load][spins].append(processes[spins].submit(_take_turn).result())
    return {load: {spins: median(found) / STEPS for spins, found in times[load].items()} for load in LOADS}


EXPLANATION = """
Training steps with all cores, of one process for each count of spins; the processes take turns. Alone: nothing else
runs. Busy: beside a process that computes all the time on one core. ×: time of a step, busy against alone.
"""


def make_page(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        for spins, meaning in COUNTS.items():
            alone, busy = (row["seconds"][load][spins] for load in LOADS)
            names = row["network"], f"{int(spins):,}, {meaning}", str(row["batch"])
            rows.append((*names, *(f"{row['batch'] / t:,.0f}" for t in (alone, busy)), f"{busy / alone:.1f}"))
    columns = ("network", "spins", "batch", "images/s, alone", "images/s, busy", "×")
    return page("How long waiting threads spin: images/s", result, EXPLANATION, table(columns, rows, names=2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, seconds=30, default=["ResNet-20", "ShuffleNetV2"])
    parser.add_argument("--batches", type=count, nargs="+", default=[128, 8], help="images a step (default: 128 8)")


def run(arguments: argparse.Namespace) -> Result:
    """Raises UserError on a GPU, and where torch's threads are not those of GNU OpenMP."""
    if DEVICE.type != "cpu":
        raise UserError("this benchmark measures a CPU; hide the GPU with CUDA_VISIBLE_DEVICES=")
    if sys.platform != "linux":
        raise UserError(
            "this benchmark measures how the threads of GNU OpenMP wait, which torch has on Linux alone"
        )
    rows: list[Row] = []
    for network in arguments.networks:
        for batch in arguments.batches:
            seconds = measure(network, batch, arguments.seconds)
            rows.append({"network": network, "batch": batch, "seconds": seconds})
            print(network, batch, seconds, flush=True)
    return {"rows": rows}
