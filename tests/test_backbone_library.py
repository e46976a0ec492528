"""Models of torchvision and timm: names, no weights, and the stem for small images."""

import logging
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from l2bn.backbones.library import shrink_stem, small_convolution, timm_model, torchvision_model
from l2bn.backbones.resnet import resnet_3x3_stem
from l2bn.errors import UserError

BUILDERS = {"torchvision": torchvision_model, "timm": timm_model}


def build(library: str, name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[library](7, name, **options)


def convolution_outputs(model: nn.Module, size: int) -> list[int]:
    """Heights of the outputs of all convolutions, in the order of the forward pass."""
    heights: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _x, out: heights.append(out.shape[-1]))
    model.eval()(torch.zeros(1, 3, size, size))
    return heights


# Names.


@pytest.mark.parametrize(
    ("library", "wrong", "nearest"),
    [
        ("torchvision", "mobilenetv2", "mobilenet_v2"),
        ("torchvision", "resnet20", "resnet50"),
        ("timm", "regnety_04", "regnety_004"),
        ("timm", "resnet50.a1_in1k", "resnet50"),
    ],
)
def test_wrong_name_suggests_the_nearest(library: str, wrong: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"name={wrong}: no such model \(nearest: [^)]*\b{nearest}\b"):
        build(library, wrong)


@pytest.mark.parametrize("library", BUILDERS)
def test_a_name_like_no_other_still_says_how_to_list_them(library: str) -> None:
    with pytest.raises(UserError, match=rf"no name is near.*python -c 'import {library}"):
        build(library, "@@@@")


def test_detection_and_weights_are_not_offered() -> None:
    with pytest.raises(UserError, match="no such model"):
        build("torchvision", "fasterrcnn_resnet50_fpn")
    with pytest.raises(UserError, match="no such model"):
        build("timm", "hf_hub:timm/resnet18")


@pytest.mark.parametrize("library", BUILDERS)
def test_another_stem_is_refused(library: str) -> None:
    with pytest.raises(UserError, match=r"stem=tiny: choose imagenet or small"):
        build(library, "resnet18", stem="tiny")


def test_weights_are_fresh_and_the_librarys_own() -> None:
    ours = build("torchvision", "mobilenet_v2").state_dict()
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=7).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 75)])
def test_models_with_auxiliary_heads_return_logits_in_training(name: str, size: int) -> None:
    logits = build("torchvision", name).train()(torch.randn(2, 3, size, size))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 7)


# The stem for small images.


def test_small_stem_makes_torchvisions_resnet18_the_cifar_resnet18() -> None:
    library, ours = build("torchvision", "resnet18", stem="small"), resnet_3x3_stem(7, 18)
    ours.load_state_dict(library.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(library(images), ours(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("library", "name", "factor"),
    [
        ("torchvision", "densenet121", 4),  # 7x7 convolution and pool
        ("torchvision", "shufflenet_v2_x0_5", 4),  # 3x3 convolution and pool
        ("torchvision", "mobilenet_v2", 2),  # no pool
        ("torchvision", "efficientnet_b0", 2),
        ("timm", "regnety_004", 2),
        ("timm", "resnet26d", 4),  # three convolutions, then the pool
        ("timm", "resnetaa50", 4),  # average pool
        ("timm", "ese_vovnet19b_dw", 2),  # max pools between its stages, which stay
    ],
)
def test_small_stem_takes_the_stems_strides_out(library: str, name: str, factor: int) -> None:
    with torch.device("meta"):
        small = convolution_outputs(build(library, name, stem="small"), 64)
        large = convolution_outputs(build(library, name), 64 * factor)
    assert small[0] == 64
    assert small[-1] == large[-1]
    assert len(small) == len(large)


def test_small_stem_leaves_all_but_the_first_convolution_as_it_was() -> None:
    plain, small = (build("timm", "resnet18", stem=stem).state_dict() for stem in ("imagenet", "small"))
    assert plain.keys() == small.keys()
    assert [key for key in plain if not plain[key].equal(small[key])] == ["conv1.weight"]


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_small_convolution_keeps_the_middle_and_hes_variance(kernel: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 512, kernel, stride=2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    small = small_convolution(conv, "a model")
    assert small.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    middle = kernel // 2
    torch.testing.assert_close(small.weight[:, :, 1, 1], conv.weight[:, :, middle, middle] * kernel / 3)
    assert small.bias is not None
    assert small.bias.equal(conv.bias)
    assert small(torch.zeros(1, 3, 8, 8)).shape == (1, 512, 8, 8)


def test_small_stem_says_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="l2bn"):
        build("torchvision", "resnet18", stem="small")
    assert caplog.messages == [
        "resnet18, small stem: 7x7 stride 2 -> 3x3 stride 1",
        "resnet18, small stem: maxpool left out",
    ]


@pytest.mark.parametrize(
    ("library", "name", "reason"),
    [
        ("torchvision", "vgg11_bn", r"kernel \(3, 3\) and stride \(1, 1\)"),  # no stem to shrink
        ("torchvision", "vit_b_16", r"kernel \(16, 16\) and stride \(16, 16\)"),  # patches
        ("torchvision", "convnext_tiny", r"kernel \(4, 4\) and stride \(4, 4\)"),
        ("timm", "tf_efficientnet_b0", "Conv2dSame"),  # pads by its own rule
        ("timm", "resnetv2_50x1_bit", "StdConv2d"),  # standardizes its weights
        ("timm", "resnetblur18", "pool maxpool.0"),  # a blur has the pool's stride
        ("timm", "inception_v4", "pool features.3.maxpool"),  # beside a convolution, not after it
    ],
)
def test_small_stem_refuses_what_it_cannot_shrink(library: str, name: str, reason: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=rf"stem=small: .*{reason}"):
        build(library, name, stem="small")


def test_small_stem_refuses_a_model_without_convolutions() -> None:
    with pytest.raises(UserError, match="perceptron has no convolution"):
        shrink_stem(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "perceptron")
