"""The fused kernels beside the plain composition, both measured against it in float64.

Errors are norm-wise: of a whole tensor, relative to its norm. The formulas are tried on many shapes as they stand,
without a compiler; then compiled for sizes left open, on many shapes; then compiled for fixed sizes.
"""

import contextlib
import functools
import itertools
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import uncompiled
from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, l2_normalize, swap_norm
from l2bn.benchmarks.measure import peak_memory
from l2bn.kernels import autograd, compiler
from l2bn.kernels.compiler import select_kernels

LAYERS = {2: L2BatchNorm1d, 3: L2BatchNorm1d, 4: L2BatchNorm2d, 5: L2BatchNorm3d}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def outcome(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output, gradients, running statistics, and then the output of evaluation."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad}
    if layer.weight is not None:
        result |= {"dw": layer.weight.grad, "db": layer.bias.grad}
    if layer.running_mean is not None:
        result |= {"mean": layer.running_mean.clone(), "var": layer.running_var.clone()}
    with torch.no_grad():
        result["evaluated"] = layer.eval()(x)
    return result


def sizes_of_terms(layer: nn.Module, x: Tensor, y: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Of the sums that may cancel to almost nothing: what counts for their error is the size of what they sum."""
    features = l2_normalize(x, layer.scale).square().mean().sqrt()
    sizes = {"mean": features * (1.0 if layer.momentum is None else layer.momentum), "db": g.norm()}
    if layer.weight is not None:
        weight, bias = (p.detach().view(-1, *[1] * (x.ndim - 2)) for p in (layer.weight, layer.bias))
        sizes["dw"] = (g * (y - bias) / weight).norm()
    return sizes


def assert_exact(x: Tensor, rounding: float = 1e-5, **options: object) -> None:
    """The fused layer is as near to float64 as the plain one, and like it in type, shape and memory format."""
    outcomes = {}
    for name, path in (("exact", "off"), ("plain", "off"), ("fused", "on")):
        torch.manual_seed(12345)  # not the input's: a gradient along x gives nothing
        layer = LAYERS[x.ndim](x.shape[1], fused=path, **options)
        if layer.weight is not None:
            nn.init.normal_(layer.weight, std=2)
            nn.init.normal_(layer.bias)
        g = torch.randn(x.shape)
        if name == "exact":
            outcomes[name] = outcome(layer.double(), x.double(), g)
            terms = sizes_of_terms(layer, x.double(), outcomes[name]["y"], g)
        else:
            outcomes[name] = outcome(layer, x, g)
    rounding = rounding if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    for key in outcomes["fused"]:
        exact, ours, plain = (outcomes[name][key] for name in ("exact", "fused", "plain"))
        assert ours.dtype == plain.dtype, key
        assert ours.shape == plain.shape, key
        assert ours.is_contiguous() == plain.is_contiguous(), key
        scale = (exact.norm() + terms.get(key, 0.0)).clamp_min(1e-30)
        error, bound = (ours.double() - exact).norm() / scale, (plain.double() - exact).norm() / scale
        assert error <= max(rounding, 2 * bound), f"{key} is off by {error:.1e}, the plain one by {bound:.1e}"


@contextlib.contextmanager
def for_any_size() -> Iterator[None]:
    """Kernels compiled once for sizes left open, as those of many positions and the fifth kinds of few are."""
    with mock.patch.object(compiler, "STATIC_KINDS", 0):
        yield


# With few values a sample or a channel the exact gradient is all but zero, because the norms take away what it acts
# on: no measure for an error.
SHAPES = st.lists(st.integers(1, 7), min_size=2, max_size=5).filter(
    lambda s: math.prod(s) // s[0] >= 4 and math.prod(s) // s[1] >= 8 and s[0] * s[1] > 1
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from(["unit", "rms"]),
        "momentum": st.sampled_from([None, 0.1, 1.0]),
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
        "eps": st.sampled_from([1e-3, 1e-5]),
    },
)


@settings(max_examples=300)
@given(
    shape=SHAPES,
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_formulas_are_exact(
    shape: list[int], options: dict[str, object], dtype: torch.dtype, channels_last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(shape) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    if channels_last and len(shape) in FORMATS:
        x = x.contiguous(memory_format=FORMATS[len(shape)])
    with mock.patch.object(autograd, "run_kernel", uncompiled):
        assert_exact(x, **options)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@example(shape=(4, 4, 4, 4), channels_last=False)  # the first compiles: equal sizes must not stay equal
@example(shape=(4, 4, 4, 4), channels_last=True)
@given(shape=st.tuples(*[st.integers(2, 19)] * 4), channels_last=st.booleans())
@pytest.mark.slow
def test_kernels_for_any_size_are_exact(shape: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    with for_any_size():
        assert_exact(x.contiguous(memory_format=torch.channels_last) if channels_last else x)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "options"),
    [
        ((6, 4, 5, 3), "contiguous", torch.float32, {}),
        ((6, 4, 5, 3), "channels_last", torch.float32, {"scale": "rms", "momentum": None}),
        ((1, 33, 7, 9), "channels_last", torch.bfloat16, {"affine": False}),
        ((37, 19, 1, 1), "contiguous", torch.float16, {"track_running_stats": False}),
    ],
)
def test_kernels_are_exact(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    assert_exact(x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x, **options)


# In units of the spread, the rounding of a value 1000 times as large: what a float32 input itself carries.
ROUNDING_FAR_FROM_ZERO = 1000 * 2**-24


def far_from_zero(layout: str, side: int) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(8, 4, side, side) + 1000 * torch.randn(4).sign().view(4, 1, 1)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


@pytest.mark.parametrize("options", [{"scale": "rms"}, {"eps": 1e-12}], ids=str)  # else eps hides the error
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [16, 4, 2])
def test_a_mean_a_thousand_times_the_spread(options: dict[str, object], layout: str, side: int) -> None:
    with mock.patch.object(autograd, "run_kernel", uncompiled):
        assert_exact(far_from_zero(layout, side), ROUNDING_FAR_FROM_ZERO, **options)


@pytest.mark.parametrize("side", [16, 4])
def test_a_mean_a_thousand_times_the_spread_compiled(side: int) -> None:
    assert_exact(far_from_zero("contiguous", side), ROUNDING_FAR_FROM_ZERO, scale="rms")


def test_large_values_in_float16() -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 4, 6, 6) * 1e4).half()
    with mock.patch.object(autograd, "run_kernel", uncompiled):
        assert_exact(x)
        assert_exact(x, scale="rms")


def test_second_derivatives_are_those_of_the_definition() -> None:
    layer = L2BatchNorm2d(4, fused="on", dtype=torch.float64)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # of a cycle that ends with the test
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", ["hooks", "a layer applied twice"])
def test_gradients_that_can_be_differentiated_count_each_path_once(case: str, create_graph: bool) -> None:
    """Hooks run once, and what reaches a layer through itself is not added again."""

    def gradients(fused: compiler.Fused) -> list[Tensor]:
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 4, 3, padding=1).double()
        layer = L2BatchNorm2d(4, fused=fused, track_running_stats=False).double()
        nn.init.normal_(layer.weight)
        h = conv(torch.randn(5, 4, 6, 6, dtype=torch.float64))
        if case == "hooks":
            layer.weight.register_hook(lambda g: 2 * g)
            h.retain_grad()
            y = layer(h)
        else:
            y = layer(conv(layer(h)))
        y.sin().sum().backward(create_graph=create_graph)
        found = [layer.weight.grad, layer.bias.grad, conv.weight.grad, *([h.grad] if case == "hooks" else [])]
        return [g.detach() for g in found if g is not None]

    with mock.patch.object(autograd, "run_kernel", uncompiled):
        found = gradients("on")
    for one, expected in zip(found, gradients("off"), strict=True):
        torch.testing.assert_close(one, expected)


def test_activations_in_place_and_views_are_allowed() -> None:
    """timm's activations work in place on the norm's output."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 6, 4, 5, 3)
    gradients = []
    for path in ("on", "off"):
        leaf = x.clone().requires_grad_()
        y = L2BatchNorm2d(4, fused=path)(leaf * 1)
        y[0].mul_(2)
        nn.functional.relu_(y).backward(g)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


BASE = torch.randn(6, 4, 5, 6, generator=torch.Generator().manual_seed(0))
STRIDED = {
    "every second": BASE[..., ::2],
    "transposed": BASE.transpose(2, 3)[:, :, ::2],
    "expanded": BASE[:, :1].expand(6, 4, 5, 6)[..., :3],
    "tokens": BASE.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(-1),
    "tokens, first": BASE.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(2),
    "channels_last, one column": BASE[..., :1].contiguous(memory_format=torch.channels_last),
    "channels_last, one row": BASE[:, :, :1].contiguous(memory_format=torch.channels_last),
    "channels_last, one position": BASE[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "one sample": BASE[:1],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STRIDED)
def test_inputs_of_any_strides(name: str, training: bool) -> None:
    """The definition gets them contiguous: torch's batch norm, on a CPU, has other gradients for tokens."""
    found = []
    for path in ("on", "off"):
        x = STRIDED[name] if path == "on" else STRIDED[name].contiguous()
        x = x.detach().requires_grad_(training)
        layer = L2BatchNorm2d(x.shape[1], fused=path).train(training)
        with mock.patch.object(autograd, "run_kernel", uncompiled), torch.set_grad_enabled(training):
            y = layer(x)
            found.append([y])
            if training:
                found[-1] += torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape).square())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    x = torch.randn(6, 3, 5, 3) * 300
    outputs = []
    for path in ("on", "off"):
        layer = L2BatchNorm2d(4, fused=path)
        with torch.autocast("cpu", dtype=dtype), mock.patch.object(autograd, "run_kernel", uncompiled):
            y = layer(conv(x))
        assert y.dtype == dtype
        assert layer.running_var.dtype == torch.float32
        y.float().square().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), L2BatchNorm2d(4, fused="on", momentum=0.0), nn.ReLU())
    gradients = []
    for use in (True, False):
        x = torch.linspace(-1, 1, 6 * 3 * 15).view(6, 3, 5, 3).sin().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inside_a_compiled_model_of_open_sizes(layout: str) -> None:
    """Few positions and many, batches that can be halved and those that cannot."""
    torch.compiler.reset()
    layers = [L2BatchNorm2d(8, fused=path) for path in ("on", "off")]
    compiled = torch.compile(layers[0], fullgraph=True, dynamic=True)
    for n, side in ((16, 3), (7, 3), (6, 6), (9, 5)):
        torch.manual_seed(0)
        x, g = torch.randn(2, n, 8, side, side)
        if layout == "channels_last":
            x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        gradients = []
        for layer in (compiled, layers[1]):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(g)
            gradients += [y, leaf.grad]
        torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inside_a_compiled_model(layout: str) -> None:
    """One graph, no break, both modes, and the formulas' results."""
    torch.compiler.reset()
    torch.manual_seed(0)
    results = []
    x = torch.randn(6, 3, 9, 7, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    for path in ("on", "off"):
        torch.manual_seed(1)
        norms = [L2BatchNorm2d(8, fused=path), L2BatchNorm2d(4, fused=path, momentum=None, affine=False)]
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 4, 1), norms[1])
        model.to(memory_format=LAYOUTS[layout])
        model.double()
        run = torch.compile(model, fullgraph=True) if path == "on" else model
        y = run(x)
        y.sin().sum().backward()
        with torch.no_grad():
            evaluated = model.eval() and run(x)
        results.append([y, evaluated, *(p.grad for p in model.parameters()), *model.buffers()])
    assert results[0][0].stride() == results[1][0].stride()
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("compiled", "side", "layout"),
    [(False, 6, "channels_last"), *itertools.product([True], [3, 6], ["contiguous", "channels_last"])],
)
def test_an_activation_in_place_may_follow(compiled: bool, side: int, layout: str) -> None:
    """As in MobileNetV2 and most networks of libraries: what the layer gives is nobody else's memory."""
    torch.compiler.reset()  # of one code torch compiles eight kinds, other tests' included
    torch.manual_seed(0)
    x = torch.randn(6, 8, side, side).to(memory_format=LAYOUTS[layout])
    results = []
    for inplace in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(L2BatchNorm2d(8, fused="on"), nn.ReLU6(inplace), nn.Conv2d(8, 4, 1))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sin().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [3, 6])
def test_a_compiled_layer_in_evaluation_passes_gradients_on(side: int) -> None:
    """As where the norms are frozen and the rest is tuned."""
    torch.compiler.reset()
    torch.manual_seed(0)
    x = torch.randn(6, 8, side, side, dtype=torch.float64)
    results = []
    for compiled in (True, False):
        layer = L2BatchNorm2d(8, fused="on").double().eval()
        leaf = x.clone().requires_grad_()
        y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(leaf)
        y.sin().sum().backward()
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [3, 6])
def test_an_activation_that_cuts_off_stores_no_map_more(side: int, layout: str) -> None:
    """What ReLU6 needs of y in backward, a compiled model computes anew from x, as it does behind batch norm.

    Inductor stores it otherwise, a truth value each, on a CPU in three times the time of everything else.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    torch.compiler.reset()
    saved: dict[str, int] = {}
    for name, norm in (("l2bn", L2BatchNorm2d(8, fused="on")), ("bn", nn.BatchNorm2d(8))):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU6(), nn.Conv2d(8, 4, 1))

        def keep(graph: Any, _: Any, name: str = name) -> Any:
            outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
            values = [node.meta["val"] for node in outputs if node is not None]
            maps = sum(value.numel() == 6 * 8 * side**2 for value in values if isinstance(value, Tensor))
            saved.setdefault(name, maps)  # forward comes first
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        memory_format = LAYOUTS[layout]
        model.to(memory_format=memory_format)
        x = torch.randn(6, 3, side, side).to(memory_format=memory_format)
        torch.compile(model, fullgraph=True, backend=backend)(x).sum().backward()
    assert saved["l2bn"] == saved["bn"], saved


@pytest.mark.parametrize(
    ("side", "layout"),
    [
        (16, "contiguous"),
        (4, "channels_last"),
        pytest.param(4, "contiguous", marks=pytest.mark.slow),
        pytest.param(16, "channels_last", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_holds_as_many_maps_as_with_batch_norm(side: int, layout: str) -> None:
    """The gradient of a layer's input is written where that was, and no map is copied into another layout."""
    torch.compiler.reset()
    memory_format = LAYOUTS[layout]
    held: dict[type, int] = {}
    for norm in (nn.BatchNorm2d, functools.partial(L2BatchNorm2d, fused="on")):
        blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.ReLU()) for _ in range(2)]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)).to(memory_format=memory_format)
        x = torch.randn(64, 16, side, side).to(memory_format=memory_format)
        run = torch.compile(model, fullgraph=True)

        def step(run: Any = run, x: Tensor = x) -> None:
            run(x).square().sum().backward()

        step()
        held[type(blocks[0][1])] = peak_memory(step, torch.device("cpu"))
    of_map = x.numel() * x.element_size()
    assert held[L2BatchNorm2d] - held[nn.BatchNorm2d] < of_map / 2, held


Compilations = list[tuple[object, tuple[int, ...], str]]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    """Function, shape of the features and kind of sizes of each kernel that was built; none is compiled."""
    built: Compilations = []

    def build(function: Any, tensors: Any, constants: Any, sizes: str, *_: object) -> Any:
        built.append((function, tuple(tensors[0].shape), sizes))
        return compiler._with_absent(function, tensors, constants)

    monkeypatch.setattr(compiler, "_compile", build)
    monkeypatch.setattr(compiler, "_kernels", compiler.Kernels())
    return built


def test_many_kinds_of_map_all_have_kernels(compilations: Compilations) -> None:
    """No limit to the channel counts; all maps of many positions share a kernel."""
    with torch.no_grad():
        for channels in range(2, 42):
            layer = L2BatchNorm2d(channels, affine=False, fused="on")
            for _ in range(2):
                assert layer(torch.ones(3, channels, 2, 2)).isfinite().all()
        assert [sizes for *_, sizes in compilations] == ["fake"] * 40
        compilations.clear()
        for size in range(17, 30):
            layer(torch.ones(size, 41, size, 1))
        assert [sizes for *_, sizes in compilations] == ["symbolic"]
        compilations.clear()
        with mock.patch.object(compiler, "MOST_CALLS", 10):
            for size in range(17, 100):
                layer(torch.ones(2, 41, size, 1))
        assert compilations == []
        assert len(compiler._kernels.calls) <= 10, "sizes without end take memory without end"


def test_a_run_gets_the_kernels_of_a_process_of_its_own(compilations: Compilations) -> None:
    """Else its last bits would depend on the runs before it in the process."""
    layer = L2BatchNorm2d(4, fused="on")
    with torch.no_grad():
        for sizes in ((2, 3, 4, 5, 6), (6, 5)):
            select_kernels(nn.Sequential(layer), "cpu", 10**6)
            for size in sizes:
                layer(torch.ones(size, 4, 2, 2))
    static = [((size, 4, 2, 2), "fake") for size in (2, 3, 4, 5)]
    assert [(shape, sizes) for _, shape, sizes in compilations] == [
        *static,
        ((6, 4, 2, 2), "symbolic"),
        ((6, 4, 2, 2), "fake"),
    ]


def test_strided_weights_get_a_kernel_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5)
    for weight in (torch.randn(4), torch.randn(4, 2)[:, 0]):
        plain, fused = (L2BatchNorm2d(4, fused=path) for path in ("off", "on"))
        plain.weight = fused.weight = nn.Parameter(weight)
        torch.testing.assert_close(fused(x), plain(x))


def test_a_momentum_and_eps_that_change_each_step_compile_nothing_again(compilations: Compilations) -> None:
    """As where batch norm's statistics are estimated anew, or adapted at test time."""
    torch.manual_seed(0)
    layers = [L2BatchNorm2d(4, fused=path) for path in ("on", "off")]
    for step in range(1, 6):
        x, g = torch.randn(2, 6, 4, 5, 5)
        results = []
        for layer in layers:
            layer.momentum, layer.eps = 1 / step, 1e-3 / step
            leaf = x.clone().requires_grad_()
            y = layer.train()(leaf)
            y.backward(g)
            with torch.no_grad():
                results.append([y, leaf.grad, layer.running_mean, layer.running_var, layer.eval()(x)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    kernels = [autograd.forward_kernel, autograd.backward_kernel, autograd.evaluation_kernel]
    assert [function for function, *_ in compilations] == kernels


def test_a_later_failure_to_compile_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full or the compiler gone: the formulas go on uncompiled, in backward too, after one warning."""

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(compiler, "_compile", fail)
    monkeypatch.setattr(compiler, "_kernels", compiler.Kernels())
    monkeypatch.setattr("l2bn.norms.l2bn.compiler_works", lambda _: True)
    compiler._warn_once.cache_clear()
    x = torch.randn(6, 4, 5, 5)
    outcomes = [outcome(L2BatchNorm2d(4, fused=path), x, x.cos()) for path in ("auto", "off")]
    for key, value in outcomes[1].items():
        torch.testing.assert_close(outcomes[0][key], value, rtol=1e-4, atol=1e-5)
    nn.functional.relu_(L2BatchNorm2d(4)(x[:5].requires_grad_())).sum().backward()  # as in most networks
    assert [record.message for record in caplog.records] == [
        "a kernel of L2BN can't be compiled (No space left on device): its formulas are computed uncompiled, more "
        "slowly"
    ]
    with pytest.raises(OSError, match="No space left"):
        L2BatchNorm2d(4, fused="on")(x)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_long_compilation_is_told_once(
    level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where logging is not set up, which shows warnings alone; short compilations add up."""

    class Timer(SimpleNamespace):
        def __init__(self, seconds: float, call: Callable[[], None]) -> None:
            super().__init__(start=lambda: call() if seconds < 2 else None, cancel=lambda: None)

    monkeypatch.setattr(compiler, "threading", SimpleNamespace(Timer=Timer))
    # Each takes 2 s.
    monkeypatch.setattr(compiler, "time", SimpleNamespace(monotonic=itertools.count(0, 2).__next__))
    monkeypatch.setattr(compiler, "PATIENCE", 3)
    monkeypatch.setattr(compiler, "_compiled_for", 0.0)
    told = []
    with caplog.at_level(level, logger="l2bn.kernels.compiler"):
        for _ in range(4):
            with compiler._log_slow_compilation():
                pass
            told.append([(record.levelno, record.message.partition(":")[0]) for record in caplog.records])
    assert told == [[], *[[(level, "preparing L2BN's kernels")]] * 3]


def test_threads_that_meet_a_kind_at_once_compile_it_once() -> None:
    compiled = []

    def count(function: Callable[..., Tensor], *_: object) -> Callable[..., list[Tensor]]:
        compiled.append(function)
        time.sleep(0.2)
        return lambda *tensors: [function(*tensors)]

    x = torch.ones(2, 3)
    with (
        mock.patch.object(compiler, "_compile", count),
        mock.patch.object(compiler, "_kernels", compiler.Kernels()),
        ThreadPoolExecutor(4) as pool,
    ):
        results = list(pool.map(lambda _: compiler.run_kernel(torch.neg, (x,)), range(4)))
    assert compiled == [torch.neg]
    assert all(torch.equal(y, -x) for (y,) in results)


def test_selection_of_kernels(caplog: pytest.LogCaptureFixture) -> None:
    assert select_kernels(nn.Sequential(nn.BatchNorm2d(3)), "cpu", 10**6) == "stock"
    for updates, works, expected, reason in [
        (3, True, "plain", "3 updates do not repay"),
        (10**6, True, "fused", "fused kernels in 2 layers"),
        (10**6, False, "plain", ""),
    ]:
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4))
        swap_norm(model, "l2bn")
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, logger="l2bn.kernels.compiler"),
            mock.patch.object(compiler, "compiler_works", lambda _, works=works: works),
        ):
            assert select_kernels(model, "cpu", updates) == expected
        assert reason in caplog.text
        assert len(caplog.records) <= 1
        left = "auto" if expected == "fused" else "plain"  # "auto": a later failure to compile ends nothing
        assert all(f"kernels={left}" in repr(layer) for layer in model)
    decided = nn.Sequential(L2BatchNorm2d(3, fused="off"))
    assert select_kernels(decided, "cpu", 10**6) == "plain"
    wished = nn.Sequential(L2BatchNorm2d(3, fused="on"))
    assert select_kernels(wished, "cpu", 1) == "fused"
    assert select_kernels(wished, "mps", 1) == "plain", "there are none for it"


def test_without_a_compiler_the_plain_composition_serves() -> None:
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout)
import torch
from torch import nn
from l2bn import L2BatchNorm2d
from l2bn.kernels.compiler import select_kernels
layer = L2BatchNorm2d(3)
x = torch.randn(4, 3, 5, 5)
assert torch.equal(layer(x), L2BatchNorm2d(3, fused="off")(x))
assert select_kernels(nn.Sequential(layer), "cpu", 10**6) == "plain"
assert "kernels=plain" in repr(layer)
"""
    environment = {"CXX": "/nowhere/c++", "PATH": "", "HOME": "/"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no compiler works for cpu") == 1, result.stdout


@pytest.mark.parametrize(("name", "value"), [("scale", "RMS"), ("fused", False), ("fused", "plain")])
def test_an_attribute_set_to_an_unknown_value_is_refused(name: str, value: object) -> None:
    layer = L2BatchNorm2d(3, fused="on")
    setattr(layer, name, value)
    with mock.patch.object(autograd, "run_kernel", uncompiled), pytest.raises(ValueError, match=f"{name} is "):
        layer(torch.randn(2, 3, 4, 4))


def test_repr_shows_scale_and_kernels() -> None:
    assert "scale=rms, kernels=auto" in repr(L2BatchNorm2d(3, scale="rms"))
    assert "scale=unit, kernels=fused" in repr(L2BatchNorm2d(3, fused="on"))
    assert "scale=unit, kernels=plain" in repr(L2BatchNorm2d(3, fused="off"))
