"""The layer alone: BN, L2BN composed naively and L2BN by fused kernels, side by side on the maps of real networks.

A cell is one map (N, C, H, W) in one memory format, called from eager code or compiled, either training (forward
and backward) or evaluation. Dynamo is never reset and keeps its default limits: a layer that recompiles for each
kind of map shows it here. Each compiled layer is called by a function of its own, as it is in a compiled model.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from l2bn.backbones.mobilenetv2 import mobilenetv2
from l2bn.backbones.resnet import cifar_resnet
from l2bn.backbones.shufflenetv2 import shufflenetv2
from l2bn.backbones.vgg import vgg
from l2bn.benchmarks.measure import Action, copy_of, interleaved, machine, peak_memory, write_json
from l2bn.benchmarks.report import write_norm_report
from l2bn.norms.l2bn import L2BatchNorm2d
from l2bn.training.allocator import keep_freed_memory

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "naive": lambda channels: L2BatchNorm2d(channels, fused="off"),
    "fused": lambda channels: L2BatchNorm2d(channels, fused="on"),
}

# Least traffic of BN and of the fused layer, in maps: training reads x twice and writes y, then reads x and the
# gradient twice and writes dx. Evaluation of L2BN reads x twice and writes y (BN's reads it once).
TRAINING_PASSES, EVALUATION_PASSES = 8, 3


@dataclass(frozen=True)
class Map:
    network: str
    shape: tuple[int, int, int, int]


def imagenet_resnet50() -> nn.Module:
    from torchvision.models import resnet50  # here, for a slow import that only the benchmarks need

    model: nn.Module = resnet50(num_classes=10)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # constructor, image size, batch
    "ResNet-20": (lambda: cifar_resnet(10, 20), 32, 128),
    "VGG-16": (lambda: vgg(10, 16), 32, 128),
    "MobileNetV2": (lambda: mobilenetv2(10), 32, 128),
    "ShuffleNetV2": (lambda: shufflenetv2(10), 32, 128),
    "ResNet-50": (imagenet_resnet50, 224, 32),
}


def maps_of(network: str, most: int | None) -> list[Map]:
    """The distinct maps that the network's BN layers see, the largest first; `most` of them, evenly chosen."""
    build, size, batch = NETWORKS[network]
    seen: set[tuple[int, ...]] = set()
    model = build().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    shapes = sorted(seen, key=lambda shape: (-torch.Size(shape).numel(), shape))
    if most is not None and most < len(shapes):
        chosen = [round(i * (len(shapes) - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]
        shapes = [shapes[i] for i in chosen]
    return [Map(network, (batch, c, h, w)) for c, h, w in shapes]


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
    def step() -> None:
        with torch.no_grad():
            call(x)

    return step


CALLERS = ("eager", "compiled")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def cells(maps: list[Map], callers: list[str], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    for kind in maps:
        for layout, memory_format in LAYOUTS.items():
            x, g = (torch.randn(kind.shape, device=device).to(memory_format=memory_format) for _ in range(2))
            for caller in callers:
                for phase in ("training", "evaluation"):
                    actions, memory = {}, {}
                    for name, make in LAYERS.items():
                        layer = make(kind.shape[1]).to(device).train(phase == "training")
                        call = compiled_alone(layer) if caller == "compiled" else layer
                        action = training(call, x, g) if phase == "training" else evaluation(call, x)
                        action()
                        actions[name] = action
                        memory[name] = peak_memory(action, device)
                    times = interleaved({**actions, "copy": copy_of(x)}, device, seconds)
                    passes = TRAINING_PASSES if phase == "training" else EVALUATION_PASSES
                    traffic = passes * x.nbytes / times["fused"]
                    yield {
                        "network": kind.network,
                        "shape": list(kind.shape),
                        "layout": layout,
                        "caller": caller,
                        "phase": phase,
                        "seconds": times,
                        "peak_bytes": memory,
                        "copy_fraction": traffic / (2 * x.nbytes / times["copy"]),
                    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the result here, and its table and plot beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's own choice)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--callers", nargs="+", choices=CALLERS, default=list(CALLERS))
    parser.add_argument("--maps", type=int, help="at most so many maps of each network (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a cell (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as a run does
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    maps = list({m.shape: m for name in arguments.networks for m in maps_of(name, arguments.maps)}.values())
    measured = []
    for cell in cells(maps, arguments.callers, device, arguments.seconds):
        measured.append(cell)
        times = cell["seconds"]
        print(
            f"{cell['network']:13} {'x'.join(map(str, cell['shape'])):16} {cell['layout']:14} {cell['caller']:9}"
            f"{cell['phase']:11} BN {times['bn'] * 1e6:9.0f} us   naive {times['naive'] / times['bn']:5.2f}   "
            f"fused {times['fused'] / times['bn']:5.2f}   {cell['copy_fraction']:4.0%} of copy bandwidth",
            flush=True,
        )
    result = {"benchmark": "norm", "machine": machine(device), "cells": measured}
    if arguments.json:  # first, because it is what took the time
        write_json(arguments.json, result)
    print("\n" + write_norm_report(result, arguments.json))
