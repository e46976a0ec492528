"""The layer alone: BN, L2BN composed plainly and L2BN by fused kernels, side by side on the maps of real networks.

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

from l2bn.benchmarks.measure import (
    CALLERS,
    DEVICE,
    Action,
    Result,
    Row,
    add_common_arguments,
    count,
    interleaved,
    page,
    peak_memory,
    ratio,
    table,
)
from l2bn.benchmarks.workload import NETWORKS, NORMS, build

# Least traffic of BN and of the fused layer, in maps: training reads x twice and writes y, then reads x and the
# gradient twice and writes dx. Evaluation of L2BN reads x twice and writes y (BN's reads it once).
PASSES = {"training": 8, "evaluation": 3}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maps_of(network: str) -> list[tuple[int, ...]]:
    """The distinct maps (N, C, H, W) that the network's BN layers see, the largest first."""
    seen: set[tuple[int, ...]] = set()
    _, size, batch = NETWORKS[network]
    model = build(network).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.add((batch, *inputs[0].shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return sorted(seen, key=lambda shape: (-math.prod(shape), shape))


def spread(maps: list[tuple[int, ...]], wanted: int) -> list[tuple[int, ...]]:
    """So many of the maps, at even distances and with both ends; all, if there are not more."""
    if wanted >= len(maps):
        return maps
    return [maps[round(place * (len(maps) - 1) / max(wanted - 1, 1))] for place in range(wanted)]


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
        torch.autograd.backward(call(x), g)
        x.grad = None  # freed here, so that `peak_memory` starts without it

    return step


def evaluation(call: Callable[[Tensor], Tensor], x: Tensor) -> Action:
    return torch.no_grad()(lambda: call(x))


def measure_map(shape: tuple[int, ...], seconds: float) -> Iterator[Row]:
    """A cell for each format, caller and phase."""
    for layout, memory_format in LAYOUTS.items():
        x, g = (torch.randn(shape, device=DEVICE).to(memory_format=memory_format) for _ in range(2))
        for caller, phase in product(CALLERS, PASSES):
            actions: dict[str, Action] = {}
            memory = {}
            for name in ("bn", "naive", "fused"):
                layer = NORMS[name](nn.BatchNorm2d(shape[1])).to(DEVICE).train(phase == "training")
                call = compiled_alone(layer) if caller == "compiled" else layer
                actions[name] = training(call, x, g) if phase == "training" else evaluation(call, x)
                actions[name]()
                memory[name] = peak_memory(actions[name])
            actions["copy"] = partial(torch.empty_like(x).copy_, x)  # reads and writes each byte once
            times = interleaved(actions, seconds)
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
L2BN plain (the l2 step and batch norm by PyTorch's operators) and fused (compiled kernels). Ratios to
`nn.BatchNorm2d` called the same way, measured in turn in one process: geometric mean over the maps, and the worst.
Memory: most bytes held at once, same ratio. Copy: the bandwidth reached, counting the fewest passes over the map
that are needed, relative to that of a copy of the map; median.
"""


def make_page(result: Result) -> str:
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
    names = ("called", "phase", "format", "maps", "plain", "fused", "fused, worst", "memory", "copy")
    return page(
        "The layer alone: time against batch norm's",
        result,
        EXPLANATION,
        table(names, means, names=3),
        "The slowest maps in training:",
        table(("called", "map", "network", "BN", "fused", "ratio"), worst, names=3),
    )


def memory_ratio(cells: list[Row]) -> str:
    """Geometric mean over the cells in which the profiler saw memory taken by both layers; "–" if it saw none."""
    seen = [c for c in cells if c["peak_bytes"]["fused"] > 0 and c["peak_bytes"]["bn"] > 0]
    return f"{geometric_mean(ratio(c, 'fused', 'peak_bytes') for c in seen):.3f}" if seen else "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, ["ResNet-20", "VGG-16", "MobileNetV2", "ShuffleNetV2", "ResNet-50"], seconds=1)
    parser.add_argument(
        "--maps", type=count, default=3, help="of each network, from the largest to the smallest (default: 3)"
    )


def run(arguments: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    networks = {shape: name for name in arguments.networks for shape in spread(maps_of(name), arguments.maps)}
    cells: list[Row] = []
    for shape, network in networks.items():
        for cell in measure_map(shape, arguments.seconds):
            cells.append({"network": network, **cell})
            place = (network, shape, cell["layout"], cell["caller"], cell["phase"])
            print(*place, f"{ratio(cell, 'fused'):.2f} of BN's time", flush=True)
    return {"cells": cells}
