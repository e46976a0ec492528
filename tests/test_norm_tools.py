"""The layer under the tools that know batch norm: the tests behind "Which tools work" in src/l2bn/norms/README.md.

Compared is with the layer's own call. Where a tool would take the layer for batch norm alone, it must refuse.
"""

import copy
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import timm.layers
import timm.utils
import torch
import torch.utils.mkldnn
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    fuse_modules,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    quantize_dynamic,
)
from torch.ao.quantization import convert as quantized
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from l2bn import L2BatchNorm1d, L2BatchNorm2d, swap_norm
from l2bn.norms import l2bn, l2bn_detached, l2bn_mean_norm, l2bn_position
from l2bn.norms.stepped import NotBatchNormError
from l2bn.norms.sync import convert_sync

README = Path(__file__).parents[1] / "src/l2bn/norms/README.md"
ROWS = {
    "`torch.fx`, feature extractors of torchvision and timm": [
        "test_fx_sees_one_node",
        "test_feature_extractors_give_features",
    ],
    "`torch.jit.trace`, `torch.jit.script`": ["test_jit_trace", "test_jit_script_is_refused"],
    "`torch.compile`": ["test_compiled_with_open_sizes_there_is_one_graph"],
    "`torch.export`; by its graph, pt2e quantization": ["test_an_exported_graph_shows_the_l2_step"],
    "ONNX": ["test_onnxruntime_agrees"],
    "`torch.ao.quantization`": ["test_quantization_leaves_the_layer_in_float"],
    "`torch.func`, `make_fx`, batched and higher derivatives": ["test_transforms_see_operators"],
    "per-sample gradients by `vmap` of `grad`, and so Opacus": [
        "test_per_sample_gradients_in_training_are_refused"
    ],
    "`AveragedModel` (SWA), `update_bn`; DDP, FSDP2; FLOP counters": [
        "test_update_bn_estimates_the_running_statistics",
        "test_norm_sync.test_data_parallel_training_averages_the_ranks_gradients",
        "test_flops_are_counted_as_with_batch_norm",
    ],
    "EMA that averages buffers: `ModelEmaV2`, `ModelEmaV3` of timm, `AveragedModel(use_buffers=True)`": [
        "test_ema_leaves_buffers_out"
    ],
    "`SyncBatchNorm.convert_sync_batchnorm` of PyTorch, `convert_sync_batchnorm` of timm": [
        "test_synchronising_conversions_are_refused"
    ],
    "`fuse_conv_bn_eval`, `to_mkldnn`; timm's `freeze`, `convert_splitbn_model`, `reparameterize_model`": [
        "test_conversions_to_batch_norm_alone_are_refused"
    ],
    "hooks, pruning, `spectral_norm`; parametrizations": [
        "test_swap.test_what_hangs_on_a_layer_is_carried_over",
        "test_parametrizations_come_after_the_swap",
    ],
}
CONTROLS = (l2bn_detached, l2bn_position, l2bn_mean_norm)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def network(fused: str = "off", norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A small network with L2BN; its running statistics are those of one batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    swap_norm(model, functools.partial(l2bn.convert, fused="off", momentum=1.0))
    model(images(8))
    model[1].momentum, model[1].fused = 0.1, fused
    return model.eval()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))


def test_every_row_of_the_readme_has_its_test() -> None:
    section = README.read_text().partition("**Which tools work**")[2].partition("\n\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)[1:]
    assert rows == list(ROWS)
    sys.path.insert(0, str(Path(__file__).parent))
    for test in itertools.chain(*ROWS.values()):
        module, _, name = test.rpartition(".")
        found = __import__(module) if module else sys.modules[__name__]
        assert callable(getattr(found, name)), test


# ---- Graphs -------------------------------------------------------------------------------------------------


class ByName(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
def test_fx_sees_one_node(norm: Callable[..., nn.Module]) -> None:
    """The node is the layer itself, so that a traced model still trains and evaluates."""
    model = network(norm=norm)
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes][2] == ("call_module", "1")
    torch.testing.assert_close(traced(images()), model(images()))
    before = model[1].running_mean.clone()
    traced.train()(images())
    assert not torch.equal(model[1].running_mean, before)
    for control in CONTROLS:
        of_control = ByName(control.convert(nn.BatchNorm2d(3))).eval()
        torch.testing.assert_close(torch.fx.symbolic_trace(of_control)(images()), of_control(images()))


@pytest.mark.parametrize("convert", [l2bn.convert, l2bn_detached.convert, lambda bn: bn])
def test_hooks_run_when_a_graph_runs_and_not_when_it_is_traced(convert: Callable[..., nn.Module]) -> None:
    """As with torch's own layers: hooks belong to the node, and may do what a proxy can't."""
    model = nn.Sequential(convert(nn.BatchNorm2d(3)))
    if convert is not l2bn.convert:
        convert_sync(model)
    (layer,) = model.eval()
    seen: list[float] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].sum())))
    layer.register_forward_hook(lambda _, args, y: 2 * y)
    prune.l1_unstructured(layer, "weight", amount=1)
    x = images()
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert len(seen) == 1
    torch.testing.assert_close(traced(x), expected)
    assert len(seen) == 2


def test_feature_extractors_give_features() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    swap_norm(model, "l2bn")
    x = torch.randn(2, 3, 32, 32)
    features: dict[str, Tensor] = {}
    handle = model.layer1.register_forward_hook(lambda _, inputs, output: features.update(f=output))
    model(x)
    handle.remove()
    torch.testing.assert_close(create_feature_extractor(model, {"layer1": "f"})(x)["f"], features["f"])
    net = timm.create_model("resnet18", num_classes=3).eval()
    swap_norm(net, "l2bn")
    assert timm.models.create_feature_extractor(net, {"layer1": "f"})(x)["f"].shape == (2, 64, 8, 8)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated:FutureWarning")
@pytest.mark.parametrize("scale", ["unit", "rms"])
def test_jit_trace(scale: str) -> None:
    model = network("auto")
    model[1].scale = scale
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(7)), model(images(7)))
    x = torch.randn(5, 3, 9, 6)
    for control in CONTROLS:
        options = {"scale": scale} if "scale" in inspect.signature(control.convert).parameters else {}
        layer = control.convert(nn.BatchNorm2d(3), **options).eval()
        torch.testing.assert_close(torch.jit.trace(layer, images())(x), layer(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")
def test_jit_script_is_refused() -> None:
    joint = nn.Sequential(nn.BatchNorm2d(4))
    convert_sync(joint)
    for model in (network(), nn.Sequential(network()), *stepped_networks(), joint):
        with pytest.raises(TypeError, match=r"BatchNorm\w+ can't be scripted: use torch\.jit\.trace"):
            torch.jit.script(model)


def test_only_looking_at_attributes_is_no_error() -> None:
    layer = network()[1]
    assert not hasattr(layer, "qconfig")
    assert not hasattr(layer, "eps")
    assert "epsilon" in dict(inspect.getmembers(layer))
    layer.eps = 1e-3
    assert layer.epsilon == 1e-3


def test_an_exported_graph_shows_the_l2_step() -> None:
    """So that a pass which folds a batch norm into the convolution before it finds no such pair."""
    model = network("auto")
    program = torch.export.export(model, (images(),))
    (norm,) = [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert "conv" not in str(norm.args[0].target)
    torch.testing.assert_close(program.module()(images()), model.requires_grad_(True)(images()))


@pytest.mark.slow
def test_compiled_with_open_sizes_there_is_one_graph() -> None:
    """Whatever the batch size is divisible by, for few positions and for many."""
    for cls, tail in ((L2BatchNorm1d, ()), (L2BatchNorm2d, (4, 4)), (L2BatchNorm2d, (5, 5))):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(cls(8), dynamic=True, backend="aot_eager")
        for n in (32, 24, 20, 18, 17, 9):
            compiled(torch.randn(n, 8, *tail))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, (cls, tail)


# ---- Quantization -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # both of torch.ao itself
def test_quantization_leaves_the_layer_in_float() -> None:
    model = network("auto")
    expected = model(images())
    dynamic = quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert (dynamic(images()) - expected).abs().max() < 0.05 * expected.abs().max()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
    prepared(images())
    static = convert_fx(prepared)
    assert sum(isinstance(m, L2BatchNorm2d) for m in static.modules()) == 1
    assert (static(images()) - expected).abs().max() < 0.1 * expected.abs().max()
    eager = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 3), L2BatchNorm2d(4), DeQuantStub())
    eager.qconfig = get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = prepare(eager.eval())
    prepared(images())
    with pytest.raises(NotImplementedError, match="put a DeQuantStub before the layer"):
        quantized(prepared)(images())
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(model, [["0", "1"]])


# ---- Derivatives --------------------------------------------------------------------------------------------


def layers() -> tuple[nn.Module, nn.Module]:
    """A layer left to choose its kernels, and one that computes the definition, without running statistics."""
    auto = L2BatchNorm2d(4, track_running_stats=False).double()
    nn.init.normal_(auto.weight)
    plain = copy.deepcopy(auto)
    plain.fused = "off"
    return auto, plain


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    """By backward, so that a kernel's backward meets what surrounds the call."""
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf)
    return dx


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda t: layer(t).sum((0, 2, 3)), x, vectorize=True)


def batched_backward(layer: nn.Module, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    y = layer(leaf).sum((0, 2, 3))
    return torch.autograd.grad(y, leaf, torch.eye(4, dtype=x.dtype), is_grads_batched=True)[0]


def vmapped_backward(layer: nn.Module, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    y = layer(leaf).sum((0, 2, 3))
    return vmap(lambda v: torch.autograd.grad(y, leaf, v, retain_graph=True)[0])(torch.eye(4, dtype=x.dtype))


def loss_gradient(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return grad(lambda x: layer(x).sin().sum())


def forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "make_fx": lambda layer, x: make_fx(layer)(torch.ones_like(x))(x),
    "make_fx of backward": lambda layer, x: make_fx(lambda t: gradient(layer, t))(torch.ones_like(x))(x),
    "jacobian": jacobian,
    "batched backward": batched_backward,
    "vmapped backward": vmapped_backward,
    "grad": lambda layer, x: loss_gradient(layer)(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x.cos(),))[1],
    "forward mode": forward_mode,
    "vmap": lambda layer, x: vmap(layer)(torch.stack([x, x.cos()])),
    "vmap of grad": lambda layer, x: vmap(loss_gradient(layer))(torch.stack([x, x.cos()])),
    "compiled vmap": lambda layer, x: compiled(vmap(layer))(torch.stack([x, x.cos()])),
    "compiled grad": lambda layer, x: compiled(loss_gradient(layer))(x),
    "compiled vmap of grad": lambda layer, x: compiled(vmap(loss_gradient(layer)))(torch.stack([x, x.cos()])),
}


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, for jvp
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_operators(name: str) -> None:
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    auto, plain = layers()
    torch.testing.assert_close(TRANSFORMS[name](auto, x), TRANSFORMS[name](plain, x))


def test_per_sample_gradients_in_training_are_refused() -> None:
    """As with batch norm, whose statistics mix the samples; in evaluation they are right."""
    model = network("auto")
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, images())
    for name, value in grad(loss)(parameters, images()[1]).items():
        torch.testing.assert_close(per_sample[name][1], value)
    for net in (model.train(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))):
        model, parameters = net, dict(net.named_parameters())
        with pytest.raises(RuntimeError, match="in-place"):
            vmap(grad(loss), (None, 0))(parameters, images())


# ---- Training -----------------------------------------------------------------------------------------------


def test_update_bn_estimates_the_running_statistics() -> None:
    model = network()
    average = AveragedModel(model)
    average.update_parameters(model)
    batches = [images(), 2 * images() + 1]
    update_bn(batches, average)
    expected = model.train()
    expected[1].reset_running_stats()
    expected[1].momentum = None
    for batch in batches:
        expected(batch)
    for name, buffer in expected[1].named_buffers():
        torch.testing.assert_close(dict(average.module[1].named_buffers())[name], buffer)
    assert average.module[1].momentum == 0.1, "update_bn sets it for the time of the estimate"


def test_ema_leaves_buffers_out() -> None:
    """At a decay of 0.9999, by which an averaged running variance stays near its initial 1."""
    layer = L2BatchNorm2d(8, fused="off")
    averages: list[Any] = []
    for averaged in (False, True):
        averages.append(timm.utils.ModelEmaV3(layer, exclude_buffers=not averaged))
        ema = get_ema_multi_avg_fn(0.9999)
        averages.append(AveragedModel(layer, multi_avg_fn=ema, use_buffers=averaged))
        averages[-1].update = averages[-1].update_parameters
    features = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        layer.train()(features)
        for average in averages:
            average.update(layer)
    expected = float(layer.eval()(features).detach().std())
    found = [float(average.eval()(features).detach().std()) for average in averages]
    assert found[:2] == pytest.approx([expected] * 2)
    assert max(found[2:]) < expected / 10


def test_ema_of_features_of_root_mean_square_1_may_average_buffers() -> None:
    layer = L2BatchNorm2d(8, scale="rms", fused="off")
    average = timm.utils.ModelEmaV3(layer)
    features = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        layer.train()(features)
        average.update(layer)
    expected = float(layer.eval()(features).detach().std())
    assert float(average.eval()(features).detach().std()) == pytest.approx(expected, rel=0.05)


def test_flops_are_counted_as_with_batch_norm() -> None:
    counts = []
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    for model in (network("auto").train(), stock):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_parametrizations_come_after_the_swap() -> None:
    model = network().train()
    parametrizations.weight_norm(model[1])
    model(images()).sum().backward()
    assert model[1].parametrizations.weight.original1.grad is not None
    assert isinstance(model[1], L2BatchNorm2d)


# ---- Conversions that take the layer for batch norm alone ------------------------------------------------------

CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse_conv_bn_eval": lambda model: fuse_conv_bn_eval(model[0], model[1]),
    "to_mkldnn": torch.utils.mkldnn.to_mkldnn,
    "freeze": lambda model: timm.utils.freeze(model, ["1"]),
    "split": timm.layers.convert_splitbn_model,
}
SYNCHRONISING: dict[str, Callable[[nn.Module], Any]] = {
    "PyTorch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
}


def stepped_networks() -> list[nn.Sequential]:
    """With L2BN, L2BN and an activation, and each control."""
    norms = [control.convert(nn.BatchNorm2d(4)) for control in CONTROLS]
    norms += [l2bn.convert(nn.BatchNorm2d(4)), l2bn.convert(timm.layers.BatchNormAct2d(4))]
    return [nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval() for norm in norms]


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")  # mkldnn's own
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_to_batch_norm_alone_are_refused(name: str) -> None:
    for model in stepped_networks():
        with pytest.raises(NotBatchNormError, match="would drop the step before it"):
            CONVERSIONS[name](model)
    if name == "fuse_conv_bn_eval":
        net = timm.create_model("repghostnet_050", num_classes=3)
        swap_norm(net, "l2bn")
        with pytest.raises(NotBatchNormError, match="would drop the step before it"):
            timm.utils.reparameterize_model(net.eval())


@pytest.mark.parametrize("name", SYNCHRONISING)
def test_synchronising_conversions_are_refused(name: str) -> None:
    for model in stepped_networks():
        with pytest.raises(TypeError, match=r"use l2bn\.norms\.sync\.convert_sync"):
            SYNCHRONISING[name](model)


# ---- ONNX: onnxruntime agrees -------------------------------------------------------------------------------

SIZE = 64


@pytest.fixture(params=["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(request.param, weights=None, num_classes=10)
    swap_norm(model, "l2bn")
    for layer in model.modules():  # running statistics as after training, or the output is all but zero
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.fused = "off"
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.fused = "auto"
    return model.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter itself
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnxruntime_agrees(exported: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 3, SIZE, SIZE)
    path = tmp_path / "model.onnx"
    torch.onnx.export(exported, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = exported.requires_grad_(True)(x).detach()
    assert expected.std() > 0.1, "an output of zeros would agree with anything"
    assert (torch.from_numpy(output) - expected).abs().max() < 1e-4
