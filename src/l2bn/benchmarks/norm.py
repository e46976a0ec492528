"""The layer alone: BN, L2BN composed naively and L2BN by fused kernels, side by side on the maps of real networks.

A cell is one map (N, C, H, W) in one memory format, called from eager code or compiled, either training (forward
and backward) or evaluation. Dynamo is never reset and keeps its default limits: a layer that recompiles for each
kind of map shows it here. Each compiled layer is called by a function of its own, as it is in a compiled model.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import geometric_mean
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from l2bn.benchmarks.measure import Action, add_common_arguments, count, interleaved, peak_memory, set_up
from l2bn.benchmarks.report import Result, Row, hardware, page, prose, ratio, report, table
from l2bn.benchmarks.workload import NETWORKS, bn_inputs
from l2bn.norms.l2bn import L2BatchNorm2d
from l2bn.training.compute import keep_freed_memory
from l2bn.training.environment import describe_environment

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "naive": lambda channels: L2BatchNorm2d(channels, fused="off"),
    "fused": lambda channels: L2BatchNorm2d(channels, fused="on"),
}

# Least traffic of BN and of the fused layer, in maps: training reads x twice and writes y, then reads x and the
# gradient twice and writes dx. Evaluation of L2BN reads x twice and writes y (BN's reads it once).
PASSES = {"training": 8, "evaluation": 3}

CALLERS = ("eager", "compiled")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maps_of(network: str, most: int | None) -> list[tuple[int, int, int, int]]:
    """The distinct maps that the network's BN layers see, the largest first; `most` of them, evenly chosen."""
    shapes = sorted(set(bn_inputs(network)), key=lambda shape: (-math.prod(shape), shape))
    if most is not None and most < len(shapes):
        chosen = [round(i * (len(shapes) - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]
        shapes = [shapes[i] for i in chosen]
    return [(NETWORKS[network].batch, *shape) for shape in shapes]


def compiled_alone(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer as part of a compiled model, whose layers are traced once each, at the sizes that they have there.

    Its code object, and so Dynamo's count of recompilations, is its own. Left to itself, Dynamo would take a size
    that differs from the last cell's for a dynamic one.
    """

    def call(x: Tensor) -> Tensor:
        return layer(x)

    own: Any = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled: Callable[[Tensor], Tensor] = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled


def training(call: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Action:
    x = x.detach().requires_grad_()

    def step() -> None:
        x.grad = None
        torch.autograd.backward(call(x), g)

    return step


def evaluation(call: Callable[[Tensor], Tensor], x: Tensor) -> Action:
    return torch.no_grad()(lambda: call(x))


def measure_map(shape: tuple[int, ...], callers: list[str], device: torch.device, seconds: float) -> Iterator[Row]:
    """A cell for each format, caller and phase."""
    for layout, memory_format in LAYOUTS.items():
        x, g = (torch.randn(shape, device=device).to(memory_format=memory_format) for _ in range(2))
        for caller, phase in product(callers, PASSES):
            actions: dict[str, Action] = {}
            memory = {}
            for name, make in LAYERS.items():
                layer = make(shape[1]).to(device).train(phase == "training")
                call = compiled_alone(layer) if caller == "compiled" else layer
                actions[name] = training(call, x, g) if phase == "training" else evaluation(call, x)
                actions[name]()
                memory[name] = peak_memory(actions[name], device)
            actions["copy"] = partial(torch.empty_like(x).copy_, x)  # reads and writes each byte once
            times = interleaved(actions, device, seconds)
            yield {
                "shape": list(shape),
                "layout": layout,
                "caller": caller,
                "phase": phase,
                "seconds": times,
                "peak_bytes": memory,
                "copy_fraction": PASSES[phase] / 2 * times["copy"] / times["fused"],
            }


EXPLANATION = """
Ratios to `nn.BatchNorm2d` called the same way, measured in turn in one process: geometric mean over the maps, and
the worst. Memory: most bytes held at once, same ratio. Copy: traffic of the least passes over the map, as a share
of the bandwidth of a copy of that map; median.
"""


def norm_table(result: Result) -> str:
    means, worst = [], []
    for caller, phase, layout in product(("compiled", "eager"), PASSES, (*LAYOUTS, "both")):
        cells = [c for c in result["cells"] if (c["caller"], c["phase"]) == (caller, phase)]
        cells = [c for c in cells if layout in (c["layout"], "both")]
        if not cells:
            continue
        naive, fused = ([ratio(c, norm) for c in cells] for norm in ("naive", "fused"))
        copy = sorted(c["copy_fraction"] for c in cells)[len(cells) // 2]
        ratios = f"{geometric_mean(naive):.2f}", f"{geometric_mean(fused):.2f}", f"{max(fused):.2f}"
        means.append((caller, phase, layout, str(len(cells)), *ratios, memory_ratio(cells), f"{copy:.0%}"))
    training = [c for c in result["cells"] if c["phase"] == "training"]
    for cell in sorted(training, key=lambda c: -ratio(c, "fused"))[:6]:
        name = f"{'×'.join(map(str, cell['shape']))} {cell['layout']}"
        times = [f"{cell['seconds'][norm] * 1e3:.3g} ms" for norm in ("bn", "fused")]
        worst.append((cell["caller"], name, cell["network"], *times, f"{ratio(cell, 'fused'):.2f}"))
    names = ("called", "phase", "format", ">maps", ">naive", ">fused", ">fused, worst", ">memory", ">copy")
    return page(
        "The layer alone: time against batch norm's",
        f"{hardware(result)}.",
        prose(EXPLANATION),
        table(names, means),
        "The worst cells of training:",
        table(("called", "map", "network", ">BN", ">fused", ">ratio"), worst),
    )


def memory_ratio(cells: list[Row]) -> str:
    """Geometric mean over the cells in which the profiler saw memory taken by both layers; "–" if it saw none."""
    seen = [c for c in cells if c["peak_bytes"]["fused"] > 0 and c["peak_bytes"]["bn"] > 0]
    return f"{geometric_mean(ratio(c, 'fused', 'peak_bytes') for c in seen):.3f}" if seen else "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    networks = ["ResNet-20", "VGG-16", "MobileNetV2", "ShuffleNetV2", "ResNet-50"]
    add_common_arguments(parser, networks)
    parser.add_argument("--callers", nargs="+", choices=CALLERS, default=list(CALLERS))
    parser.add_argument("--maps", type=count, help="at most so many maps of each network (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a cell (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as a run does
    device = set_up(arguments)
    torch.manual_seed(0)
    networks = {shape: name for name in arguments.networks for shape in maps_of(name, arguments.maps)}
    measured: list[Row] = []
    for shape, network in networks.items():
        for cell in measure_map(shape, arguments.callers, device, arguments.seconds):
            measured.append({"network": network, **cell})
            times = cell["seconds"]
            print(
                f"{network:13} {'x'.join(map(str, shape)):16} {cell['layout']:14} {cell['caller']:9}"
                f"{cell['phase']:11} BN {times['bn'] * 1e6:9.0f} us   naive {times['naive'] / times['bn']:5.2f}   "
                f"fused {times['fused'] / times['bn']:5.2f}   {cell['copy_fraction']:4.0%} of copy bandwidth",
                flush=True,
            )
    result = {"benchmark": "norm", "machine": describe_environment(device), "cells": measured}
    report(result, arguments.json, norm_table)
