"""The controls of L2BN: each differs from it in the one point that it names."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2bn import L2BatchNorm2d, l2_normalize
from l2bn.kernels.formulas import Scale
from l2bn.norms import group_norm, l2bn, l2bn_detached, l2bn_mean_norm, l2bn_position
from l2bn.norms.l2bn_detached import normalize_detached
from l2bn.norms.l2bn_mean_norm import DivideByMeanNorm
from l2bn.norms.l2bn_position import normalize_positions


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SCALES: tuple[Scale, ...] = ("unit", "rms")

Convert = Callable[[nn.Module], nn.Module]


def some_maps(seed: int = 0) -> Tensor:
    """(6, 4, 5, 3) of unequal norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, 5, 3, generator=generator, dtype=torch.float64)
    return x * torch.tensor([0.1, 0.5, 1, 2, 5, 20])[:, None, None, None]


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


# ---- Detached norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_detached_has_the_values_of_l2bn_and_its_gradient_before_the_projection(scale: Scale) -> None:
    """dx of L2BN is that of the control without its part along x: (I - x x^T / ||x||^2) (a / ||x||) g."""
    x, ours = some_maps().requires_grad_(), some_maps().requires_grad_()
    g = some_maps(1)
    z, control = l2_normalize(x, scale), normalize_detached(ours, scale)
    torch.testing.assert_close(control, z)
    (z * g).sum().backward()
    (control * g).sum().backward()
    a = math.sqrt(4 * 5 * 3) if scale == "rms" else 1
    unit = x.detach() / norms(x.detach())[:, None, None, None]
    factor = (a / norms(x.detach()))[:, None, None, None]
    torch.testing.assert_close(ours.grad, factor * g)
    along = (ours.grad * unit).sum((1, 2, 3), keepdim=True) * unit
    torch.testing.assert_close(x.grad, ours.grad - along)
    assert (norms(along) > 1e-3 * norms(ours.grad)).all(), "there is such a part to take out"


# ---- Per position -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_per_position_each_position_is_as_long_and_each_sample_as_in_l2bn(scale: Scale) -> None:
    x = some_maps()
    z = normalize_positions(x, scale)
    along_channels = z.norm(dim=1)
    torch.testing.assert_close(along_channels, along_channels.mean().expand_as(along_channels))
    torch.testing.assert_close(norms(z), norms(l2_normalize(x, scale)))
    torch.testing.assert_close(nn.functional.cosine_similarity(z, x), torch.ones_like(along_channels))
    torch.testing.assert_close(normalize_positions(x[:, :, 0, 0], scale), l2_normalize(x[:, :, 0, 0], scale))


@pytest.mark.parametrize("step", [normalize_detached, normalize_positions])
def test_zeros_and_what_is_not_finite_are_as_in_l2bn(step: Callable[[Tensor], Tensor]) -> None:
    x = some_maps()
    x[1] = 0
    x[2, 0, 0, 0] = math.inf
    x.requires_grad_()
    z = step(x)
    assert (z[1] == 0).all()
    assert z[2, :, 0, 0].isnan().all()
    assert z[[0, 3, 4, 5]].isfinite().all()
    z[[0, 1, 3, 4, 5]].sum().backward()
    assert x.grad is not None
    assert x.grad[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("step", [normalize_detached, normalize_positions, DivideByMeanNorm(0.1)])
def test_a_scale_that_there_is_not_is_named(step: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="scale is 'max'; it may be unit or rms"):
        step(some_maps(), "max")


# ---- Running mean of norms ----------------------------------------------------------------------------------


def test_the_mean_norm_leaves_norms_as_unequal_as_they_were_at_the_scale_of_l2bn() -> None:
    x = some_maps()
    step = DivideByMeanNorm(0.1).double()
    z = step(x)
    torch.testing.assert_close(norms(z), norms(x) / norms(x).mean())
    rms = DivideByMeanNorm(0.1).double()(x, "rms")
    torch.testing.assert_close(norms(rms).mean(), torch.tensor(math.sqrt(60), dtype=torch.float64))


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_the_mean_norm_is_cumulative_first_and_then_by_momentum(momentum: float | None) -> None:
    step = DivideByMeanNorm(momentum).double()
    expected = 0.0
    for batch in range(1, 31):
        x = some_maps(batch)
        step(x)
        factor = max(1 / batch, momentum or 0)
        expected += factor * (float(norms(x).mean()) - expected)
        assert float(step.running_norm) == pytest.approx(expected)
    before = step.running_norm.clone()
    step.eval()(some_maps(99))
    assert torch.equal(step.running_norm, before)
    assert step.num_batches_tracked == 30


def test_update_bn_estimates_the_mean_norm_anew() -> None:
    model = nn.Sequential(l2bn_mean_norm.convert(nn.BatchNorm2d(4)))
    for _ in range(20):
        model(100 * some_maps().float())
    update_bn([some_maps().float()], model)
    assert float(model[0].step.running_norm) == pytest.approx(float(norms(some_maps()).mean()), rel=1e-5)


def test_the_mean_norm_of_a_model_in_evaluation_stays() -> None:
    layer = l2bn_mean_norm.convert(nn.BatchNorm2d(3).eval())
    layer(torch.randn(4, 3, 2, 2))
    assert layer.step.running_norm == 1


def test_a_batch_without_samples_leaves_the_mean_norm() -> None:
    step = DivideByMeanNorm(0.1)
    step(torch.empty(0, 3, 2, 2))
    assert step.running_norm == 1
    assert step.num_batches_tracked == 0


def test_the_mean_norm_is_batch_norm_with_another_weight_of_eps() -> None:
    """BN(x / r) with eps is BN(x) with eps r^2: all that the scale does."""
    x = some_maps()
    layer = l2bn_mean_norm.convert(nn.BatchNorm2d(4, eps=1e-3, dtype=torch.float64))
    other = nn.BatchNorm2d(4, eps=1e-3 * float(norms(x).mean()) ** 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x))


# ---- Group norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "groups"), [(16, 1), (64, 4), (24, 2), (58, 29), (7, 1), (17, 17), (512, 32)])
def test_groups_divide_the_channels(width: int, groups: int) -> None:
    bn = nn.BatchNorm2d(width)
    nn.init.normal_(bn.weight)
    x = torch.randn(3, width, 4, 4)
    layer = group_norm.convert(bn)
    assert layer.num_groups == groups
    torch.testing.assert_close(layer(x), nn.functional.group_norm(x, groups, bn.weight, bn.bias, bn.eps))
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        group_norm.convert(bn, channels=0)


def test_groups_of_one_value_are_refused() -> None:
    """Of vectors they would put out their bias and pass no gradient; on maps they are instance norm."""
    with pytest.raises(ValueError, match="17 features have no equal groups of 2 to 16"):
        group_norm.convert(nn.BatchNorm1d(17))


def test_the_mean_norm_lies_on_the_device_of_its_layer() -> None:
    bn = nn.BatchNorm2d(4, track_running_stats=False, device="meta")
    assert all(buffer.is_meta for buffer in l2bn_mean_norm.convert(bn).buffers())


# ---- All of them --------------------------------------------------------------------------------------------

CONTROLS = (l2bn_detached.convert, l2bn_position.convert, l2bn_mean_norm.convert, group_norm.convert)


@pytest.mark.parametrize("convert", CONTROLS, ids=lambda convert: convert.__module__.rpartition(".")[2])
def test_a_control_takes_the_place_of_any_batch_norm_layer(convert: Convert) -> None:
    for bn, shape in (
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 5)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 5, 3)),
        (nn.BatchNorm3d(4, track_running_stats=False), (6, 4, 5, 3, 2)),
    ):
        layer = convert(bn)
        assert [p is q for p, q in zip(layer.parameters(), bn.parameters(), strict=True)] == [True] * len(
            list(bn.parameters())
        )
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == x.shape
        assert (y.mean() - 0).abs() < 0.2
        copied, restored = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert torch.equal(copied.eval()(x), layer.eval()(x))
        assert torch.equal(restored.eval()(x), layer(x))


@pytest.mark.parametrize("convert", CONTROLS[:3], ids=lambda convert: convert.__module__.rpartition(".")[2])
def test_statistics_are_float32_in_half_precision(convert: Convert) -> None:
    x = (some_maps() * 300).half()  # sums of squares overflow float16
    layer = convert(nn.BatchNorm2d(4))
    y = layer(x)
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(y, convert(nn.BatchNorm2d(4))(x.float()).half(), rtol=2e-3, atol=2e-3)


class WithoutFloat64(TorchDispatchMode):
    """A device such as Apple's MPS, which refuses float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm", [l2bn, l2bn_detached, l2bn_position, l2bn_mean_norm])
def test_a_device_need_not_have_float64(norm: Any, scale: Scale) -> None:
    """To train, to evaluate, and to load."""
    layer, other = (norm.convert(nn.BatchNorm2d(4), scale=scale) for _ in range(2))
    layer.fused = "off"
    x = some_maps().float().requires_grad_()
    with WithoutFloat64():
        layer(x).sum().backward()
        layer.eval()(x)
        other.load_state_dict(layer.state_dict())


def test_a_fused_activation_still_acts() -> None:
    """timm's norm and activation in one layer, and a copy of it: the norm comes before, the activation after."""
    x = some_maps().float().requires_grad_()
    for convert in (functools.partial(l2bn.convert, fused="off"), *CONTROLS):
        acting = convert(timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU))
        for layer in (copy.deepcopy(acting), acting):
            y = layer(x)
            torch.testing.assert_close(y, nn.functional.silu(convert(nn.BatchNorm2d(4))(x)))
            y.sum().backward()  # through an activation that works in place


def test_a_control_differs_from_l2bn_in_values_where_it_should() -> None:
    x = some_maps().float()
    reference = L2BatchNorm2d(4, fused="off")(x)
    torch.testing.assert_close(l2bn_detached.convert(nn.BatchNorm2d(4))(x), reference)
    for convert in (l2bn_position.convert, l2bn_mean_norm.convert, group_norm.convert):
        assert (convert(nn.BatchNorm2d(4))(x) - reference).abs().max() > 0.1
