"""Norms put into models: what is changed, what is kept, what is refused."""

import copy
import importlib
import logging
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, swap_norm
from l2bn.norms.l2bn import convert

NORMS = sorted(path for path in (Path(__file__).parents[1] / "configs" / "norm").glob("*.yaml"))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.03),
        nn.ReLU(),
        nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)),
    )
    nn.init.zeros_(model[3][3].weight)
    return model


def test_every_norm_config_is_covered() -> None:
    assert {"bn", "l2bn", "l2bn_rms"} <= {path.stem for path in NORMS}


@pytest.mark.parametrize("path", NORMS, ids=lambda path: path.stem)
def test_every_norm_keeps_parameters_and_learns(path: Path) -> None:
    """The battery for each YAML of configs/norm: swap, same tensors and names, 20 steps lower the loss.

    A norm whose state dict cannot be BN's says so by `BN_SHAPED = False` in its module.
    """
    config = yaml.safe_load(path.read_text())
    module, _, function = config.pop("_target_").rpartition(".")
    assert config.pop("_partial_") is True
    norm = getattr(importlib.import_module(module), function)
    options = config | ({"fused": "off"} if "fused" in config else {})

    model = small()
    before, parameters = dict(model.state_dict(keep_vars=True)), dict(model.named_parameters())
    random_state = torch.get_rng_state()
    assert swap_norm(model, lambda bn: norm(bn, **options)) == 3
    assert torch.equal(torch.get_rng_state(), random_state), "the swap drew random numbers"
    after = model.state_dict(keep_vars=True)
    assert (list(after) == list(before)) is getattr(importlib.import_module(module), "BN_SHAPED", True)
    for key in before.keys() & after.keys():
        assert after[key] is before[key], f"{key} is another tensor"
    assert list(dict(model.named_parameters())) == list(parameters)

    x, target = torch.randn(32, 3, 5, 5), torch.randint(6, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_layers_keep_what_the_backbone_set() -> None:
    model = small().eval()
    model[3][0].train()
    assert swap_norm(model, "l2bn") == 3
    first, second, third = model[1], model[3][0], model[3][3]
    assert type(first) is L2BatchNorm2d
    assert type(third) is L2BatchNorm1d
    assert (first.epsilon, first.momentum) == (1e-3, 0.03)
    assert third.weight.eq(0).all()
    assert second.weight is None
    assert (first.training, second.training) == (False, True)
    assert type(convert(nn.BatchNorm3d(2))) is L2BatchNorm3d


def test_options_replace_eps_and_momentum() -> None:
    for name, model in {"bn": small(), "l2bn": small()}.items():
        module = __import__(f"l2bn.norms.{name}", fromlist=["convert"])
        swap_norm(model, lambda bn, module=module: module.convert(bn, eps=1e-7, momentum=0.5))
        assert (model[1].eps, model[1].momentum) == (1e-7, 0.5)


def test_batch_norm_is_the_identity(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    layers = list(model.modules())
    with caplog.at_level(logging.INFO):
        assert swap_norm(model, "bn") == 3
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert "3 batch norm layers" in caplog.text


def test_a_shared_layer_stays_shared() -> None:
    bn = nn.BatchNorm2d(3)
    model = nn.Sequential(bn, nn.ReLU(), bn)
    assert swap_norm(model, "l2bn") == 1
    assert model[0] is model[2]


def test_copies_and_pickles() -> None:
    model = small()
    swap_norm(model, lambda bn: convert(bn, fused="off"))
    x = torch.randn(8, 3, 5, 5)
    copied, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model(x)
    assert torch.equal(copied(x), expected)
    assert torch.equal(restored(x), expected)


def test_what_cannot_be_swapped_is_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match=r"no norm is called 'l3bn'; there are bn, .*l2bn, "):
        swap_norm(small(), "l3bn")
    with pytest.raises(ValueError, match="no norm is called 'swap'"):
        swap_norm(small(), "swap")
    with pytest.raises(ValueError, match="no batch norm layer to replace: it has 2 GroupNorm"):
        swap_norm(nn.Sequential(nn.GroupNorm(1, 2), nn.GroupNorm(1, 2)), "l2bn")
    with pytest.raises(ValueError, match="itself a BatchNorm2d"):
        swap_norm(nn.BatchNorm2d(3), "l2bn")

    class Odd(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * 2

    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    with pytest.raises(TypeError, match=r"L2BN cannot stand for .*Odd"):
        swap_norm(model, "l2bn")
    assert type(model[0]) is nn.BatchNorm2d, "a refused swap changed the model"
    for layer, reason in [
        (nn.SyncBatchNorm(3), "after the swap, by l2bn.norms.sync.convert_sync"),
        (nn.LazyBatchNorm2d(), "run the model once"),
        (L2BatchNorm2d(3), "L2BN already"),
    ]:
        with pytest.raises(TypeError, match=reason):
            swap_norm(nn.Sequential(layer), "l2bn")


def test_the_stock_synchronised_conversion_is_refused() -> None:
    """It would turn the layer into plain BN, and a training run would not notice."""
    model = small()
    swap_norm(model, "l2bn")
    with pytest.raises(TypeError, match=r"l2bn\.norms\.sync\.convert_sync"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    timm_layers = pytest.importorskip("timm.layers")
    with pytest.raises(TypeError, match=r"l2bn\.norms\.sync\.convert_sync"):
        timm_layers.convert_sync_batchnorm(model)
