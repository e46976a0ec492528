"""Whole training steps (forward, backward, SGD) of networks with BN, with L2BN composed plainly and fused."""

import argparse
from itertools import product
from typing import Any

import torch
from torch import nn

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
    ratio,
    table,
)
from l2bn.benchmarks.norm import LAYOUTS
from l2bn.benchmarks.workload import CLASSES, NETWORKS, build
from l2bn.training.acceleration import GraphedModule


def training_step(network: str, norm: str, caller: str, layout: str, batch: int) -> Action:
    memory_format: Any = LAYOUTS[layout]
    model = build(network, norm).to(DEVICE).to(memory_format=memory_format)
    run: Any = model
    if caller == "compiled":
        run = torch.compile(model, fullgraph=True)
    elif caller == "graphs":
        run = GraphedModule(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = NETWORKS[network].size
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=memory_format)
    target = torch.randint(CLASSES, (batch,), device=DEVICE)

    def step() -> None:
        loss = nn.functional.cross_entropy(run(x), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


EXPLANATION = """
Forward, backward and SGD, with L2BN plain (the l2 step and batch norm by PyTorch's operators) and fused (compiled
kernels); ratios to the same network with BN, measured in turn in one process. Memory: most bytes held at once
within the step.
"""

GRAPHS = " graphs: replayed as by `compute.compile=graphs`, with memory that is held between steps, too."


def make_page(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        time = f"{row['seconds']['bn'] * 1e3:.{1 if row['seconds']['bn'] < 0.01 else 0}f} ms"
        names = (row["network"], row["layout"], row["caller"], str(row["batch"]))
        times = [f"{ratio(row, norm):.2f}" for norm in ("naive", "fused")]
        memory = [
            f"{ratio(row, norm, 'peak_bytes'):.3f}" if row["peak_bytes"] else "–" for norm in ("naive", "fused")
        ]
        rows.append((*names, time, *times, *memory))
    numbers = ("batch", "BN", "plain", "fused", "memory, plain", "memory, fused")
    return page(
        "A whole training step: time and memory against batch norm's",
        result,
        EXPLANATION + (GRAPHS if any(row["caller"] == "graphs" for row in result["rows"]) else ""),
        table(("network", "format", "called", *numbers), rows, names=3),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, seconds=20, default=["ResNet-20", "MobileNetV2", "ResNet-50"])
    add_batch(parser)
    add_callers(parser)


def run(arguments: argparse.Namespace) -> Result:
    rows: list[Row] = []
    for network, layout, caller in product(arguments.networks, LAYOUTS, arguments.callers):
        torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
        batch = arguments.batch or NETWORKS[network].batch
        steps = {norm: training_step(network, norm, caller, layout, batch) for norm in ("bn", "naive", "fused")}
        for step in steps.values():
            step()  # compiles, and makes the optimizer's state, which is no part of a step's own memory
        row: Row = {"network": network, "batch": batch, "layout": layout, "caller": caller}
        row["peak_bytes"] = {norm: peak_memory(step) for norm, step in steps.items() if caller != "graphs"}
        row["seconds"] = interleaved(steps, arguments.seconds, fewest=5)
        rows.append(row)
        print(network, layout, caller, f"{ratio(row, 'fused'):.2f} of BN's time", flush=True)
    return {"rows": rows}
