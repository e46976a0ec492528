"""Whole training steps (forward, backward, SGD) of networks with BN, with L2BN composed naively and fused."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2bn.benchmarks.measure import (
    Action,
    forget_compiled,
    interleaved,
    machine,
    peak_memory,
    with_earlier_rows,
    write_json,
)
from l2bn.benchmarks.norm import CALLERS, LAYOUTS, NETWORKS
from l2bn.benchmarks.report import write_step_report
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import swap_norm
from l2bn.training.compute import keep_freed_memory

NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "bn": lambda bn: bn,
    "naive": lambda bn: convert(bn, fused="off"),
    "fused": lambda bn: convert(bn, fused="on"),
}


def training_step(
    network: str, norm: str, caller: str, layout: str, batch: int | None, device: torch.device
) -> Action:
    build, size, usual_batch = NETWORKS[network]
    torch.manual_seed(0)
    model = build().to(device)
    swap_norm(model, NORMS[norm])
    memory_format = LAYOUTS[layout]
    model.to(memory_format=memory_format)
    run: Any = torch.compile(model, fullgraph=True) if caller == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch or usual_batch, 3, size, size, device=device).to(memory_format=memory_format)
    target = torch.randint(10, (len(x),), device=device)

    def step() -> None:
        loss = nn.functional.cross_entropy(run(x), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the result here, and its table beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own choice)")
    networks = ["ResNet-20", "MobileNetV2", "ResNet-50"]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=networks)
    parser.add_argument("--callers", nargs="+", choices=CALLERS, default=list(CALLERS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch", type=int, help="images a step (default: 128 at 32x32, 32 at 224x224)")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a row (default: 20)")


def run(arguments: argparse.Namespace) -> None:
    """With --json, the networks measured before in the same setting keep their rows."""
    keep_freed_memory()  # as a run does
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    for network in arguments.networks:
        for layout in arguments.layouts:
            for caller in arguments.callers:
                forget_compiled()
                steps = {
                    norm: training_step(network, norm, caller, layout, arguments.batch, device) for norm in NORMS
                }
                for step in steps.values():
                    step()  # compiles, and makes the optimizer's state, which is no part of a step's own memory
                memory = {norm: peak_memory(step, device) for norm, step in steps.items()}
                times = interleaved(steps, device, arguments.seconds, fewest=5)
                rows.append(
                    {
                        "network": network,
                        "batch": arguments.batch or NETWORKS[network][2],
                        "layout": layout,
                        "caller": caller,
                        "seconds": times,
                        "peak_bytes": memory,
                    }
                )
                print(
                    f"{network:13} {layout:14} {caller:9} BN {times['bn'] * 1e3:7.1f} ms   naive "
                    f"{times['naive'] / times['bn']:5.2f}   fused {times['fused'] / times['bn']:5.2f}   "
                    f"memory {memory['naive'] / memory['bn']:5.3f} and {memory['fused'] / memory['bn']:5.3f}",
                    flush=True,
                )
    result: dict[str, Any] = {"benchmark": "step", "machine": machine(device), "rows": rows}
    if arguments.json:  # first, because it is what took the time
        result["rows"] = with_earlier_rows(arguments.json, result)
        write_json(arguments.json, result)
    print("\n" + write_step_report(result, arguments.json))
