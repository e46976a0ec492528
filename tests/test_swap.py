"""Norms put into models: what is changed, what is kept, what is refused."""

import copy
import functools
import importlib
import itertools
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrizations, prune, spectral_norm
from torchvision.models.feature_extraction import create_feature_extractor

from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, swap_norm
from l2bn.backbones.mobilenetv2 import mobilenetv2
from l2bn.backbones.resnet import cifar_resnet
from l2bn.backbones.shufflenetv2 import shufflenetv2
from l2bn.backbones.vgg import vgg
from l2bn.norms import l2bn_but_last
from l2bn.norms.l2bn import convert
from l2bn.norms.swap import norm_layers

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


@pytest.mark.parametrize("path", NORMS, ids=lambda path: path.stem)
def test_every_norm_keeps_parameters_and_learns(path: Path) -> None:
    """The battery for each YAML of configs/norm: swap, same tensors and names, 20 steps lower the loss.

    A norm whose state dict cannot be BN's says so by `BN_SHAPED = False` in its module.
    """
    config = OmegaConf.load(path)
    norm = instantiate(config, **({"fused": "off"} if "fused" in config else {}))

    model = small()
    before, parameters = dict(model.state_dict(keep_vars=True)), dict(model.named_parameters())
    random_state = torch.get_rng_state()
    assert swap_norm(model, norm) == 3
    assert torch.equal(torch.get_rng_state(), random_state), "the swap drew random numbers"
    after = model.state_dict(keep_vars=True)
    assert (list(after) == list(before)) is getattr(sys.modules[norm.func.__module__], "BN_SHAPED", True)
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


@pytest.mark.parametrize("path", NORMS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("option", "value"), [("eps", 0.0), ("eps", -1.0), ("momentum", 7.0)])
def test_every_norm_refuses_what_batch_norm_cannot_compute_with(path: Path, option: str, value: float) -> None:
    config = OmegaConf.load(path)
    if option not in config:
        pytest.skip(f"it has no {option}")
    with pytest.raises(ValueError, match=option):
        swap_norm(small(), instantiate(config, **{option: value}))


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
        module = importlib.import_module(f"l2bn.norms.{name}")
        swap_norm(model, functools.partial(module.convert, eps=1e-7, momentum=0.5))
        assert "eps=1e-07, momentum=0.5" in repr(model[1])


def test_all_but_the_last_layer_are_l2bn() -> None:
    """The swap decides which is the last; a call that can't know it is refused."""
    norm = functools.partial(l2bn_but_last.convert, fused="off", eps=1e-4)
    for given in ("l2bn_but_last", norm):
        model = small()
        last = model[3][3]
        assert swap_norm(model, given) == 3
        assert [type(m) for m in (model[1], model[3][0])] == [L2BatchNorm2d, L2BatchNorm2d]
        assert model[3][3] is last
    assert last.eps == 1e-4
    with pytest.raises(ValueError, match="needs to know whether a layer is the network's last"):
        swap_norm(small(), lambda bn: l2bn_but_last.convert(bn))
    with pytest.raises(ValueError, match="last can't be set"):
        swap_norm(small(), functools.partial(norm, last=True))


@pytest.mark.parametrize("backbone", [cifar_resnet, vgg, shufflenetv2, mobilenetv2])
def test_the_layer_that_stays_batch_norm_is_the_last_to_run(backbone: Callable[[int], nn.Module]) -> None:
    """Though the swap goes by the order of construction."""
    model = backbone(10)
    swap_norm(model, functools.partial(l2bn_but_last.convert, fused="off"))
    kinds: list[type] = []
    for name in norm_layers(model):
        model.get_submodule(name).register_forward_hook(lambda layer, *_: kinds.append(type(layer)))
    model(torch.randn(2, 3, 32, 32))
    assert kinds == [L2BatchNorm2d] * (len(norm_layers(model)) - 1) + [nn.BatchNorm2d]


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
    with pytest.raises(TypeError, match=r"no norm can stand for .*Odd"):
        swap_norm(model, "l2bn")
    assert type(model[0]) is nn.BatchNorm2d, "a refused swap changed the model"
    for layer, reason in [
        (nn.SyncBatchNorm(3), "after the swap, by l2bn.norms.sync.convert_sync"),
        (nn.LazyBatchNorm2d(), "run the model once"),
        (L2BatchNorm2d(3), "already: swap the norm of a model once"),
    ]:
        with pytest.raises(TypeError, match=reason):
            swap_norm(nn.Sequential(layer), "l2bn")


def traced(name: str) -> nn.Module:
    return torch.fx.symbolic_trace(timm.create_model(name, num_classes=5))


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        lambda: traced("skresnet18"),  # half of its layers are nodes, which call F.batch_norm
        lambda: traced("lcnet_050"),  # all of them
        lambda: nn.Sequential(nn.BatchNorm2d(3), traced("lcnet_050")),
        lambda: create_feature_extractor(timm.create_model("skresnet18"), {"layer1": "f"}),
        lambda: torch.export.export(small().eval(), (torch.randn(2, 3, 5, 5),)).module(),
        lambda: torch.jit.script(small()),
        lambda: torch.jit.trace(small().eval(), torch.randn(2, 3, 5, 5)),
    ],
)
def test_batch_norm_in_a_graph_is_refused(make: Callable[[], nn.Module]) -> None:
    """The swap would pass by it, and report the layers that remain."""
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"in its graph.*: swap the norm of the untraced model, then trace it"):
        swap_norm(model, "l2bn")
    assert dict(model.named_modules()) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        lambda: fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()),
        lambda: torch.jit.freeze(torch.jit.script(small().eval())),
    ],
    ids=["folded", "frozen"],
)
def test_a_graph_that_may_have_had_batch_norm_says_what_to_do(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"no batch norm layer.*swap the norm of the untraced model"):
        swap_norm(make(), "l2bn")


def test_layers_that_a_graph_calls_are_swapped() -> None:
    """torch's own layers stay modules in a graph; weight standardization calls F.batch_norm, and is none."""
    model = torch.fx.symbolic_trace(torchvision.models.resnet18())
    assert swap_norm(model, "l2bn") == 20
    standardized = nn.Sequential(timm.layers.StdConv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert swap_norm(torch.fx.symbolic_trace(standardized), "l2bn") == 1


NORM_NAMES = [path.stem for path in NORMS if path.stem not in ("bn", "l2bn_rms")]  # l2bn_rms is an option of l2bn


@pytest.mark.parametrize("name", NORM_NAMES)
def test_what_hangs_on_a_layer_is_carried_over(name: str) -> None:
    """Hooks and their handles, buffers and their persistence, attributes, weights that a hook computes."""
    log: list[str] = []
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    bn = model[0]
    bn.register_forward_pre_hook(lambda *_: log.append("before"))
    handle = bn.register_forward_hook(lambda *_: log.append("after"))
    bn.register_full_backward_hook(lambda *_: log.append("backward"))
    bn.register_buffer("mask", torch.ones(3), persistent=False)
    bn.note = "a user's own"
    prune.l1_unstructured(bn, "weight", amount=1)
    spectral_norm(model[1], "weight", dim=0)
    keys = set(model.state_dict())
    swap_norm(model, name)
    layer = model[0]
    assert layer is not bn
    assert keys >= {key for key in model.state_dict() if "step" not in key}
    assert "0.mask" not in model.state_dict()
    assert layer.mask is bn.mask
    assert layer.note == "a user's own"
    for module in model:
        if hasattr(module, "fused"):
            module.fused = "off"
    model(torch.randn(4, 3, 6, 6, requires_grad=True)).sum().backward()
    assert log == ["before", "after", "backward"]
    assert layer.weight_orig.grad is not None
    handle.remove()
    model(torch.randn(4, 3, 6, 6))
    assert log == ["before", "after", "backward", "before"]


class AnyRank(nn.BatchNorm2d):
    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - BN's own name
        pass


def patched() -> nn.Module:
    bn = nn.BatchNorm2d(3)
    bn.forward = lambda input: input * 7  # noqa: A006 - BN's own name
    return bn


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.BatchNorm2d(3))


def compiled() -> nn.Module:
    bn = nn.BatchNorm2d(3)
    bn.compile()
    return bn


def with_loading_hook() -> nn.Module:
    bn = nn.BatchNorm2d(3)
    bn.register_load_state_dict_pre_hook(lambda *_: None)
    return bn


@pytest.mark.parametrize("name", NORM_NAMES)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AnyRank(3), "its class has _check_input_dim of its own"),
        (patched, "its forward was replaced"),
        (parametrized, "parametrized; swap the norm first"),
        (compiled, "compiled by itself"),
        (with_loading_hook, "load_state_dict pre-hook"),
    ],
)
def test_behaviour_that_would_be_lost_is_refused(name: str, make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), make(), nn.BatchNorm2d(3))
    before = list(model)
    with pytest.raises(TypeError, match=reason):
        swap_norm(model, name)
    assert all(a is b for a, b in zip(model, before, strict=True)), "a refused swap changed the model"


@pytest.mark.parametrize("norm", [path.stem for path in NORMS if path.stem not in ("bn", "group_norm")])
def test_no_norm_becomes_batch_norm_again(norm: str) -> None:
    """Both arms of a comparison would be of that norm."""
    model = small()
    swap_norm(model, {"l2bn_rms": "l2bn"}.get(norm, norm))
    with pytest.raises(TypeError, match="build the model anew"):
        swap_norm(model, "bn")


class Reached(nn.Module):
    """Reaches its layer by another reference than the registered module, as older code does."""

    def __init__(self, hold: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(3)
        self.held = hold(self.bn0)


@pytest.mark.parametrize(
    "hold",
    [
        lambda bn: [bn],
        lambda bn: (bn,),
        lambda bn: {"first": [bn]},
        lambda bn: [nn.Identity(), {"a": bn}],
        lambda bn: functools.partial(nn.functional.relu, bn),
        lambda bn: bn.forward,
        lambda bn: lambda x: bn(x).relu(),
        lambda bn: lambda x, bn=bn: bn(x),
        lambda bn: [functools.partial(lambda x: bn(x), None)],
    ],
)
def test_a_layer_that_a_swap_would_not_reach_is_refused(hold: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Reached(hold))
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=r"1\.held refers to a batch norm layer beside the registered modules"):
        swap_norm(model, "l2bn")
    assert dict(model.named_modules()) == before
    assert swap_norm(model, "bn") == 2  # nothing is replaced
    circle: list[object] = [nn.Identity(), {"a": 1}, lambda x: circle]
    circle.append(circle)
    assert swap_norm(Reached(lambda _: circle), "l2bn") == 1


def test_running_statistics_of_another_layer_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    swap_norm(copy.deepcopy(model), "l2bn")
    model(torch.randn(4, 3))
    swap_norm(copy.deepcopy(model), "group_norm")
    swap_norm(copy.deepcopy(model), "bn")
    assert "estimated by other layers" not in caplog.text
    swap_norm(copy.deepcopy(model), "l2bn")
    assert "estimated by other layers" in caplog.text
    caplog.clear()
    model[1].num_batches_tracked.zero_()  # as of weights that were saved without it
    swap_norm(model, "l2bn")
    assert "estimated by other layers" in caplog.text


def test_weights_of_batch_norm_are_loaded_with_the_same_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def network(norm: str) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        swap_norm(model, norm)
        return model

    fresh, bn, l2bn = network("bn"), network("bn"), network("l2bn")
    for trained in (bn, l2bn):
        trained(torch.randn(4, 3))
    for source in (fresh, l2bn, bn, bn):
        caplog.clear()
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        model = network("l2bn")
        model.load_state_dict(torch.load(tmp_path / "weights.pt"))
        warned = [text for text in caplog.messages if "estimated by other layers" in text]
        assert len(warned) == (source is bn)
        assert model[1].running_var.equal(source[1].running_var)
    network("bn").load_state_dict(l2bn.state_dict())


SCALES = {"unit": convert, "rms": functools.partial(convert, scale="rms"), "bn": lambda bn: bn}


@pytest.mark.parametrize(("saved", "loaded"), [*itertools.product(SCALES, ["unit", "rms"])])
@pytest.mark.parametrize("batches", [1, 100])
def test_statistics_of_another_layer_are_told_by_their_values(
    saved: str, loaded: str, batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain dictionary, as that of timm's loader, has no metadata; of few batches the start may still stand."""
    layer, other = (nn.Sequential(SCALES[name](nn.BatchNorm2d(16))) for name in (saved, loaded))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(batches):
            layer(3 * torch.randn(8, 16, 5, 5) + 1)
    caplog.clear()
    other.load_state_dict(dict(layer.state_dict()))
    warned = any("estimated by other layers" in text for text in caplog.messages)
    assert not warned or saved != loaded
    assert warned or saved == loaded or batches == 1


def test_a_class_of_batch_norm_is_no_norm() -> None:
    for norm in (L2BatchNorm1d, functools.partial(L2BatchNorm1d, scale="rms")):
        with pytest.raises(TypeError, match="L2BatchNorm1d is the class of a layer: give the name of a norm"):
            swap_norm(nn.Sequential(nn.BatchNorm1d(3)), norm)
    assert swap_norm(nn.Sequential(nn.BatchNorm1d(3)), nn.Identity) == 1  # a class may take the layer
