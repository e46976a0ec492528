"""Whole training steps (forward, backward, SGD) of networks with BN, with L2BN composed naively and fused."""

import argparse
from itertools import product
from typing import Any

import torch
from torch import nn

from l2bn.benchmarks.measure import Action, add_common_arguments, count, interleaved, peak_memory, set_up
from l2bn.benchmarks.norm import CALLERS as LAYER_CALLERS
from l2bn.benchmarks.norm import LAYOUTS
from l2bn.benchmarks.report import Result, hardware, page, prose, ratio, report, table
from l2bn.benchmarks.workload import NETWORKS, Norm, build
from l2bn.errors import UserError
from l2bn.norms.l2bn import convert
from l2bn.training.compute import keep_freed_memory
from l2bn.training.environment import describe_environment
from l2bn.training.graphs import Recorded

NORMS: dict[str, Norm] = {
    "bn": lambda bn: bn,
    "naive": lambda bn: convert(bn, fused="off"),
    "fused": lambda bn: convert(bn, fused="on"),
}

CALLERS = (*LAYER_CALLERS, "graphs")  # graphs: as compute.compile=graphs


def training_step(network: str, norm: str, caller: str, layout: str, batch: int, device: torch.device) -> Action:
    memory_format: Any = LAYOUTS[layout]
    model = build(network, NORMS[norm]).to(device).to(memory_format=memory_format)
    run: Any = model
    if caller == "compiled":
        run = torch.compile(model, fullgraph=True)
    elif caller == "graphs":
        run = Recorded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = NETWORKS[network].size
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=memory_format)
    target = torch.randint(10, (len(x),), device=device)

    def step() -> None:
        loss = nn.functional.cross_entropy(run(x), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


EXPLANATION = """
Forward, backward and SGD; ratios to the same network with BN, measured in turn in one process. Memory: most bytes
held at once within the step.{graphs}
"""


GRAPHS = " graphs: replayed as by `compute.compile=graphs`, with memory that is held between steps, too."


def step_table(result: Result) -> str:
    rows = [
        (
            *(
                row["network"],
                str(row["batch"]),
                row["layout"],
                row["caller"],
                f"{row['seconds']['bn'] * 1e3:.{1 if row['seconds']['bn'] < 0.01 else 0}f} ms",
            ),
            *(f"{ratio(row, norm):.2f}" for norm in ("naive", "fused")),
            *(f"{ratio(row, norm, 'peak_bytes'):.3f}" if row["peak_bytes"] else "–" for norm in ("naive", "fused")),
        )
        for row in result["rows"]
    ]
    columns = (
        "network",
        ">batch",
        "format",
        "called",
        ">BN",
        ">naive",
        ">fused",
        ">memory, naive",
        ">memory, fused",
    )
    title = "A whole training step: time and memory against batch norm's"
    graphs = GRAPHS if any(row["caller"] == "graphs" for row in result["rows"]) else ""
    return page(title, f"{hardware(result)}.", prose(EXPLANATION.format(graphs=graphs)), table(columns, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, NETWORKS, ["ResNet-20", "MobileNetV2", "ResNet-50"])
    parser.add_argument("--callers", nargs="+", choices=CALLERS, default=list(LAYER_CALLERS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=count, help="images a step (default: 128 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a row (default: 20)")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as a run does
    device = set_up(arguments)
    if "graphs" in arguments.callers and device.type != "cuda":
        raise UserError(
            f"--callers graphs records CUDA graphs, and --device is {device.type}: take eager or compiled"
        )
    rows = []
    for network, layout, caller in product(arguments.networks, arguments.layouts, arguments.callers):
        torch.compiler.reset()  # after eight compiled variants of a function it would fall back to eager
        batch = arguments.batch or NETWORKS[network].batch
        steps = {norm: training_step(network, norm, caller, layout, batch, device) for norm in NORMS}
        for step in steps.values():
            step()  # compiles, and makes the optimizer's state, which is no part of a step's own memory
        memory = {norm: peak_memory(step, device) for norm, step in steps.items() if caller != "graphs"}
        times = interleaved(steps, device, arguments.seconds, fewest=5)
        names = {"network": network, "batch": batch, "layout": layout, "caller": caller}
        rows.append({**names, "seconds": times, "peak_bytes": memory})
        print(
            f"{network:13} {layout:14} {caller:9} BN {times['bn'] * 1e3:7.1f} ms   naive "
            f"{times['naive'] / times['bn']:5.2f}   fused {times['fused'] / times['bn']:5.2f}   "
            + " and ".join(f"{memory[norm] / memory['bn']:5.3f}" for norm in ("naive", "fused") if memory)
            + (" of the memory" if memory else ""),
            flush=True,
        )
    result: Result = {"benchmark": "step", "machine": describe_environment(device), "rows": rows}
    report(result, arguments.json, step_table)
