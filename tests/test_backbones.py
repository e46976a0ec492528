"""Every backbone of configs/backbone/, and what makes each family the net of its paper."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from l2bn.backbones.cost import count_parameters
from l2bn.backbones.mobilenetv2 import mobilenetv2
from l2bn.backbones.resnet import CIFAR_DEPTHS, cifar_resnet, resnet_3x3_stem
from l2bn.backbones.shufflenetv2 import DownsamplingUnit, Unit, shufflenetv2
from l2bn.backbones.vgg import CONVOLUTIONS, vgg

CONFIGS = {path.stem: path for path in (Path(__file__).parents[1] / "configs" / "backbone").glob("*.yaml")}
PARAMETERS: dict[int, dict[str, int]] = yaml.safe_load(
    (Path(__file__).parent / "backbone_parameters.yaml").read_text()
)
COUNTED = [(name, classes) for classes, table in PARAMETERS.items() for name in table]


def seeded(seed: int, node: DictConfig, num_classes: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return instantiate(node, num_classes=num_classes)


# The first by its name of those that one function builds: a small one of each. test_grid.py has every config.
OF_EACH_FUNCTION = {OmegaConf.load(path)._target_: path for _, path in sorted(CONFIGS.items(), reverse=True)}


@pytest.mark.parametrize("path", OF_EACH_FUNCTION.values(), ids=OF_EACH_FUNCTION)
def test_same_seed_gives_the_same_weights_and_another_gives_others(path: Path) -> None:
    first, again, other = (seeded(seed, OmegaConf.load(path)) for seed in (0, 0, 1))
    found = again.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(("name", "num_classes"), COUNTED)
def test_parameter_count_is_the_published_one_and_stands_in_the_header(name: str, num_classes: int) -> None:
    expected = PARAMETERS[num_classes][name]
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONFIGS[name]), num_classes=num_classes)
    assert count_parameters(model) == expected
    assert f"{expected:,}" in CONFIGS[name].read_text()


@pytest.mark.parametrize("name", PARAMETERS[1000])
def test_torchvision_counts_the_same(name: str) -> None:
    weights = torchvision.models.get_model_weights(OmegaConf.load(CONFIGS[name]).name)
    assert weights.IMAGENET1K_V1.meta["num_params"] == PARAMETERS[1000][name]


# Against torchvision: the same state dict gives the same logits, once its ImageNet strides are taken out.


def small_resnet(name: str) -> nn.Module:
    net = torchvision.models.get_model(name, num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def small_shufflenet(name: str) -> nn.Module:
    net = torchvision.models.get_model(name, num_classes=10)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net


def small_vgg(name: str) -> nn.Module:
    net = torchvision.models.get_model(name, num_classes=10)
    net.avgpool = nn.Identity()
    net.classifier[0] = nn.Linear(512, 512)
    net.classifier[3] = nn.Linear(512, 512)
    net.classifier[6] = nn.Linear(512, 10)
    return net


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: resnet_3x3_stem(10, 18), lambda: small_resnet("resnet18")),
        (lambda: resnet_3x3_stem(10, 50), lambda: small_resnet("resnet50")),
        (lambda: shufflenetv2(10, 0.5), lambda: small_shufflenet("shufflenet_v2_x0_5")),
        (lambda: vgg(10, 11), lambda: small_vgg("vgg11_bn")),
    ],
    ids=["resnet18", "resnet50", "shufflenetv2", "vgg11"],
)
def test_agrees_with_torchvision(ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    ours_net, theirs_net = ours(), theirs()
    ours_net.load_state_dict(theirs_net.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for net in (ours_net, theirs_net):
        for dropout in (m for m in net.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        net.train()  # batch statistics: the norms stand in the same places
    torch.testing.assert_close(ours_net(images), theirs_net(images), rtol=1e-4, atol=1e-5)


# ResNet.


def cifar_resnet_parameters(depth: int, shortcut: str) -> int:
    """Ten classes, counted by hand: 9 weights a 3x3 filter, two parameters a normalised channel."""
    n = (depth - 2) // 6
    total = 27 * 16 + 32
    channels = 16
    for width in (16, 32, 64):
        total += 9 * channels * width + (2 * n - 1) * 9 * width * width + 2 * n * 2 * width
        if shortcut == "projection" and channels != width:
            total += channels * width + 2 * width
        channels = width
    return total + 64 * 10 + 10


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_cifar_resnet_has_its_depth_and_size(depth: int, shortcut: Any) -> None:
    with torch.device("meta"):
        net = cifar_resnet(10, depth, shortcut)
    filters = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(filters) + 1 == depth  # and the linear layer
    assert count_parameters(net) == cifar_resnet_parameters(depth, shortcut)


def paper_resnet(x: Tensor, weights: dict[str, Tensor], n: int) -> Tensor:
    """Section 4.2 of the paper with option A or B, written from its text."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        out = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var = out.mean((0, 2, 3), keepdim=True), out.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = weights[f"{bn}.weight"].view(1, -1, 1, 1), weights[f"{bn}.bias"].view(1, -1, 1, 1)
        return (out - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv_bn(x, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for b in range(n):
            block = f"layer{stage}.{b}"
            stride = 2 if stage > 1 and b == 0 else 1
            out = conv_bn(x, f"{block}.conv1", f"{block}.bn1", stride).clamp(min=0)
            out = conv_bn(out, f"{block}.conv2", f"{block}.bn2")
            if f"{block}.downsample.0.weight" in weights:
                x = conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            elif stride == 2:
                x = x[:, :, ::2, ::2]
                x = torch.cat([x, torch.zeros_like(x)], dim=1)
            x = (out + x).clamp(min=0)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_cifar_resnet_agrees_with_the_text_of_the_paper(shortcut: Any) -> None:
    torch.manual_seed(0)
    net = cifar_resnet(10, 32, shortcut).double()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(images), paper_resnet(images, net.state_dict(), n=5))


@pytest.mark.parametrize(
    ("build", "given", "accepted"),
    [
        (lambda: cifar_resnet(10, depth=21), "depth=21", "20, 32, 44, 56, 110"),
        (lambda: cifar_resnet(10, depth=18), "depth=18", "20, 32, 44, 56, 110"),
        (lambda: cifar_resnet(10, shortcut="option_a"), "option_a", "identity"),  # type: ignore[arg-type]
        (lambda: resnet_3x3_stem(10, depth=20), "depth=20", "18, 34, 50"),
        (lambda: vgg(10, depth=12), "depth=12", "11, 13, 16, 19"),
        (lambda: shufflenetv2(10, width=0.75), "width=0.75", "0.5, 1.0, 1.5, 2.0"),
        (lambda: mobilenetv2(10, width=0.0), "width=0.0", "above 0"),
    ],
)
def test_wrong_choice_names_the_right_ones(build: Callable[[], nn.Module], given: str, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"{given}.*{accepted}"):
        build()


# VGG.


@pytest.mark.parametrize("depth", CONVOLUTIONS)
def test_vgg_has_its_depth_and_biases(depth: int) -> None:
    with torch.device("meta"):
        net = vgg(10, depth)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert all(layer.bias is not None for layer in layers)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_vgg_takes_larger_images() -> None:
    assert vgg(10, 11).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


# ShuffleNetV2.


def test_a_shufflenetv2_unit_interleaves_what_passed_and_what_was_transformed() -> None:
    unit, x = Unit(8).eval(), torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        y = unit(x)
        assert y[:, 0::2].equal(x[:, :4])
        assert y[:, 1::2].equal(unit.branch2(x[:, 4:]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shufflenetv2_stays_in_its_memory_format(memory_format: torch.memory_format) -> None:
    net = shufflenetv2(10, 0.5).to(memory_format=memory_format)
    units = [layer for layer in net.modules() if isinstance(layer, (Unit, DownsamplingUnit))]
    outputs: list[Tensor] = []
    for unit in units:
        unit.register_forward_hook(lambda _, __, output: outputs.append(output))
    net(torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format))
    assert len(outputs) == len(units) == 16
    assert all(output.is_contiguous(memory_format=memory_format) for output in outputs)


# MobileNetV2.


def test_mobilenetv2_halves_the_map_three_times_and_late() -> None:
    features = mobilenetv2(10, 0.5).eval().get_submodule("features")
    x, sides = torch.zeros(1, 3, 32, 32), []
    for layer in features.children():
        x = layer(x)
        sides.append(x.shape[-1])
    assert sides == [32] * 4 + [16] * 3 + [8] * 7 + [4] * 5  # the stem, blocks and the last convolution


# Initial weights.


@pytest.mark.parametrize(
    "build",
    [lambda: cifar_resnet(10, 20), lambda: resnet_3x3_stem(10, 18), lambda: vgg(10, 11), lambda: mobilenetv2(10)],
)
def test_convolutions_start_from_he_fan_out(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    large = [m for m in build().modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000]
    assert large
    for conv in large:
        height, width = conv.kernel_size
        scale = conv.weight.std().item() * (height * width * conv.out_channels / 2) ** 0.5
        assert scale == pytest.approx(1, abs=0.05)
        assert conv.bias is None or conv.bias.eq(0).all()


@pytest.mark.parametrize("build", [lambda: vgg(10, 11), lambda: mobilenetv2(10)])
def test_linear_layers_of_vgg_and_mobilenet_start_narrow(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    for linear in (m for m in build().modules() if isinstance(m, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert linear.bias.eq(0).all()
