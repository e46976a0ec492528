"""L2BN in the models of timm and torchvision: everything but the norm stays what it was.

The layers run as the plain composition here, which needs no compilation; test_fused.py compares it with the
kernels.
"""

import copy
import functools
import re
from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn import L2BatchNorm2d, swap_norm
from l2bn.norms import advice, l2bn

TIMM = """
    cspdarknet53 cspresnet50 densenet121 dla46_c dpn48b efficientnet_b0 efficientvit_b0 ese_vovnet19b_dw
    fastvit_t8 fbnetc_100 gernet_s ghostnet_050 hardcorenas_a hgnet_tiny hrnet_w18_small lcnet_050 mixnet_s
    mnasnet_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs
    regnetx_002 regnety_002 repghostnet_050 repvgg_a0 res2net50_14w_8s resnest14d resnet18 resnetv2_50 rexnet_100
    selecsls42 seresnet18 skresnet18 starnet_s1 tf_efficientnet_b0 tinynet_e
"""
TORCHVISION = """
    densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5 mnasnet1_0 mobilenet_v2 mobilenet_v3_large
    mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet34 resnext50_32x4d shufflenet_v2_x0_5
    shufflenet_v2_x1_0 vgg11_bn
"""
# Layers of torch and of timm, networks that merge their branches, one with an eps of its own; `make test-all` takes
# the others.
EVERY_DAY = "densenet121 efficientnet_b0 fastvit_t8 googlenet mobileone_s0 repvgg_a0 resnet18"
MODELS = [
    pytest.param(library, name, marks=() if name in EVERY_DAY.split() else pytest.mark.slow)
    for library, names in (("timm", TIMM), ("torchvision", TORCHVISION))
    for name in names.split()
]


def build(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(name, num_classes=5)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=5, **options)


def plain(bn: _BatchNorm) -> nn.Module:
    return l2bn.convert(bn, fused="off")


def kinds(model: nn.Module) -> Counter[type]:
    """Of the modules that are no batch norm: activations and all."""
    return Counter(type(m) for m in model.modules() if not isinstance(m, _BatchNorm))


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_swap_changes_the_norm_and_nothing_else(library: str, name: str) -> None:
    stock = build(library, name)
    random_state = torch.get_rng_state()
    model = copy.deepcopy(stock)
    parameters = dict(model.named_parameters())
    before = {n: (m.eps, m.momentum) for n, m in model.named_modules() if isinstance(m, _BatchNorm)}

    assert swap_norm(model, plain) == len(before) > 0
    assert torch.equal(torch.get_rng_state(), random_state), "the swap drew random numbers"
    after = {n: (m.epsilon, m.momentum) for n, m in model.named_modules() if isinstance(m, l2bn._L2BatchNorm)}
    assert after == before
    assert kinds(model) == kinds(stock)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.named_parameters())[-1][0] == list(parameters)[-1]

    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("library", "name", "said"),
    [
        ("torchvision", "googlenet", "norm layers: 57 have the network's eps of 0.001, .* give the norm eps=1e-5"),
        ("torchvision", "mobilenet_v3_small", "norm layers: 34 have the network's eps of 0.001"),
        ("timm", "dpn48b", "norm layers: 54 have the network's eps of 0.001"),
        ("torchvision", "mnasnet0_5", "norm layers: 52 have a momentum of 0.0003, .* about 70,230 updates"),
        ("torchvision", "resnet18", ""),
    ],
)
def test_options_that_do_not_suit_unit_features_are_a_warning(
    library: str, name: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once a swap, and not at scale "rms", for another norm, or for options that were given."""
    model = build(library, name)
    for options in ({"scale": "rms"}, {"eps": 1e-2, "momentum": 0.1}):
        swap_norm(copy.deepcopy(model), functools.partial(l2bn.convert, **options))
    for norm in ("bn", "group_norm"):
        swap_norm(copy.deepcopy(model), norm)
    assert caplog.messages == []
    for norm in ("l2bn", "l2bn_detached"):
        caplog.clear()
        swap_norm(swapped := copy.deepcopy(model), norm)
        assert len(caplog.messages) == bool(said)
        assert re.search(said, caplog.text)
        assert advice.warn_if_few_updates(swapped, 100) is ("momentum" not in said), "the trainer says it again"


def test_models_without_batch_norm_say_so() -> None:
    with pytest.raises(ValueError, match="ResNetV2 has no batch norm layer to replace: it has 49 GroupNormAct"):
        swap_norm(timm.create_model("resnetv2_50x1_bit", num_classes=5), "l2bn")


def test_the_layer_as_timms_norm_layer() -> None:
    model = timm.create_model("resnet18", num_classes=5, norm_layer=L2BatchNorm2d)
    assert sum(isinstance(layer, L2BatchNorm2d) for layer in model.modules()) == 20
    for layer in model.modules():
        if isinstance(layer, L2BatchNorm2d):
            layer.fused = "off"
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
