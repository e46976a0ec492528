"""How long threads that wait for each other spin: images/s of a run alone on a CPU, and beside a busy process.

GNU OpenMP's threads spin before they sleep. On a busy core that is time which the thread that they wait for lacks.
"""

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch

from l2bn.benchmarks.measure import Action, add_common_arguments
from l2bn.benchmarks.paths import ours
from l2bn.benchmarks.report import Result, hardware, page, prose, report, table
from l2bn.benchmarks.workload import NETWORKS, make_workload
from l2bn.training import SPINS, SPINS_OF_A_RUN
from l2bn.training.environment import describe_environment

STEPS = 5  # of a turn
COUNTS = {"300000": "libgomp's default", SPINS_OF_A_RUN: "of a run", "0": "none"}
LOADS = "alone", "busy"

_turn: Action


def _prepare(network: str, batch: int | None) -> None:
    global _turn
    _turn, _ = ours(make_workload(network, None, STEPS, batch), "l2bn", torch.device("cpu"))
    _turn()


def _take_turn() -> float:
    start = time.perf_counter()
    _turn()
    return time.perf_counter() - start


def _compute_without_end() -> None:
    while True:
        sum(range(100_000))


@contextmanager
def _competitor(load: str) -> Iterator[None]:
    """Under the load "busy", a process that computes on one core."""
    process = multiprocessing.get_context("spawn").Process(target=_compute_without_end, daemon=True)
    if load == "busy":
        process.start()
        time.sleep(5)  # it loads modules first
    try:
        yield
    finally:
        if load == "busy":
            process.kill()


def measure(network: str, batch: int | None, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median seconds of a step, by load and count of spins, of processes that take turns."""
    times: dict[str, dict[str, list[float]]] = {load: {count: [] for count in COUNTS} for load in LOADS}
    order = random.Random(0)
    with ExitStack() as stack:
        processes = {}
        for count in COUNTS:  # libgomp reads it when it is loaded, so each needs a process
            with mock.patch.dict(os.environ, {SPINS: count}):
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (network, batch))
                processes[count] = stack.enter_context(pool)
                pool.submit(_take_turn).result()
        for load in LOADS:
            with _competitor(load):
                end = time.perf_counter() + seconds
                while time.perf_counter() < end or not times[load]["0"]:
                    for count in order.sample(list(COUNTS), len(COUNTS)):
                        times[load][count].append(processes[count].submit(_take_turn).result())
    return {load: {count: median(found) / STEPS for count, found in times[load].items()} for load in LOADS}


EXPLANATION = """
Training steps with all cores, of one process for each count of spins; the processes take turns. Alone: nothing else
runs. Busy: beside a process that computes all the time on one core. ×: time of a step, busy against alone.
"""


def waiting_table(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        for count, meaning in COUNTS.items():
            alone, busy = (row["seconds"][load][count] for load in LOADS)
            names = row["network"], str(row["batch"]), f"{int(count):,}, {meaning}"
            rows.append((*names, *(f"{row['batch'] / t:,.0f}" for t in (alone, busy)), f"{busy / alone:.1f}"))
    columns = ("network", ">batch", "spins", ">images/s, alone", ">images/s, busy", ">×")
    title = "How long waiting threads spin: images/s"
    return page(title, f"{hardware(result)}.", prose(EXPLANATION), table(columns, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, ["ResNet-20", "ShuffleNetV2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 8], help="images a step (default: 128 8)")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of a load (default: 30)")


def run(arguments: argparse.Namespace) -> None:
    rows: list[Any] = []
    for network in arguments.networks:
        for batch in arguments.batches:
            seconds = measure(network, batch, arguments.seconds)
            rows.append({"network": network, "batch": batch, "seconds": seconds})
            print(f"{network:13} {batch:4} {seconds}", flush=True)
    machine = describe_environment(torch.device("cpu"))
    report({"benchmark": "waiting", "machine": machine, "rows": rows}, arguments.json, waiting_table)
