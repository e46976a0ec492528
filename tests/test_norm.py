"""The layer against the paper's definition in float64, and where batch normalization stands, as it behaves.

The formula here is written anew, from the definition: neither `torch.nn.functional.normalize` nor `batch_norm`.
"""

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import uncompiled
from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d, l2_normalize
from l2bn.kernels import autograd
from l2bn.norms import l2bn_detached, l2bn_mean_norm, l2bn_position
from l2bn.norms.advice import updates_needed, warn_if_few_updates

LAYERS = [
    (L2BatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (L2BatchNorm1d, nn.BatchNorm1d, (6, 5, 7)),
    (L2BatchNorm2d, nn.BatchNorm2d, (6, 5, 4, 3)),
    (L2BatchNorm3d, nn.BatchNorm3d, (6, 5, 4, 3, 2)),
]
SCALES = ["unit", "rms"]


def normalized(x: Tensor, scale: str) -> Tensor:
    """Each sample over its l2 norm, in float64."""
    rows = x.double().reshape(len(x), -1)
    norms = (rows * rows).sum(1).sqrt()
    a = math.sqrt(rows.shape[1]) if scale == "rms" else 1.0
    return (rows * (a / norms)[:, None]).reshape(x.shape)


def definition(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Output, batch mean and biased batch variance of z that training must give, in float64."""
    z = normalized(x, layer.scale)
    axes = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = z.mean(axes)
    variance = ((z - mean.view(shape)) ** 2).mean(axes)
    y = (z - mean.view(shape)) / (variance + layer.epsilon).sqrt().view(shape)
    if layer.weight is not None:
        y = y * layer.weight.double().view(shape) + layer.bias.double().view(shape)
    return y, mean, variance


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("cls", "_bn", "shape"), LAYERS)
def test_training_and_evaluation_follow_the_definition(
    cls: type[nn.Module], _bn: type[nn.Module], shape: tuple[int, ...], scale: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 1
    layer = cls(5, scale=scale, fused="off")
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    y, mean, variance = definition(x, layer)
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-4, atol=1e-5)
    count = x.numel() / 5
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-7)
    expected = 0.9 + 0.1 * variance * count / (count - 1)
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=1e-7)
    assert layer.num_batches_tracked == 1

    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    wide = [1, -1] + [1] * (x.ndim - 2)
    centred = normalized(x, scale) - layer.running_mean.double().view(wide)
    expected = centred / (layer.running_var.double() + layer.epsilon).sqrt().view(wide)
    expected = expected * layer.weight.double().view(wide) + layer.bias.double().view(wide)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), f"evaluation moved {key}"


@pytest.mark.parametrize("scale", SCALES)
def test_every_sample_gets_the_same_norm(scale: str) -> None:
    x = torch.randn(4, 3, 5, 7) * torch.tensor([1e-3, 1.0, 50.0, 1e4]).view(4, 1, 1, 1)
    norms = l2_normalize(x, scale).flatten(1).norm(dim=1)
    expected = math.sqrt(3 * 5 * 7) if scale == "rms" else 1.0
    torch.testing.assert_close(norms, torch.full((4,), expected))
    halves = l2_normalize(torch.full((2, 3, 5, 7), 6e4, dtype=torch.float16), scale)
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.float().flatten(1).norm(dim=1), torch.full((2,), expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("ours", "stock", "_shape"), LAYERS)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_dicts_are_those_of_batch_norm(
    ours: type[nn.Module], stock: type[nn.Module], _shape: tuple[int, ...], options: dict[str, bool]
) -> None:
    layer, bn = ours(5, **options), stock(5, **options)
    assert {k: (v.shape, v.dtype) for k, v in layer.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in bn.state_dict().items()
    }
    layer.load_state_dict(bn.state_dict())
    bn.load_state_dict(layer.state_dict())
    assert isinstance(layer, stock), "code that looks for batch norm layers must find it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 4, 6, 6) * 300).to(dtype)  # sums of squares overflow float16
    layer = L2BatchNorm2d(4, fused="off")
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    expected, mean, _ = definition(x, layer)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("scale", "dtype", "fused"),
    [
        *itertools.product(["unit"], [torch.float32, torch.float16], ["off", "on"]),
        ("rms", torch.float16, "off"),
    ],
)
def test_zero_samples_are_finite(scale: str, dtype: torch.dtype, fused: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).to(dtype)
    x[1] = 0
    x.requires_grad_()
    layer = L2BatchNorm2d(3, scale=scale, fused=fused)
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[1].eq(0).all()
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize(("options", "samples"), [({"bias": False}, 6), ({"affine": False}, 6), ({}, 0)])
def test_a_missing_bias_is_zero_and_a_batch_may_be_empty(
    options: dict[str, bool], samples: int, fused: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(samples, 5, 4, 3)
    layer, plain, bn = L2BatchNorm2d(5, fused=fused, **options), L2BatchNorm2d(5, fused="off"), nn.BatchNorm2d(5)
    y = layer(x)
    assert y.shape == bn(x).shape
    torch.testing.assert_close(y, plain(x))
    for name, value in bn.named_buffers():
        assert layer.get_buffer(name).isfinite().all() == value.isfinite().all()


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_sample_that_is_not_finite_is_not_hidden(bad: float, fused: str) -> None:
    """3e38 is finite, and its square is not."""
    x = torch.randn(4, 3, 5, 5)
    x[2, 1, 0, 0] = bad
    assert l2_normalize(x)[2].isnan().all()
    layer = L2BatchNorm2d(3, fused=fused)
    with torch.no_grad():  # as the kernels of evaluation need it
        y = layer.eval()(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all(), "in evaluation, the other samples stand apart"
    assert layer.train()(x).isnan().all()


@pytest.mark.parametrize(
    ("ours", "stock", "shape"),
    [
        (L2BatchNorm1d, nn.BatchNorm1d, (4,)),
        (L2BatchNorm1d, nn.BatchNorm1d, (1, 5)),
        (L2BatchNorm1d, nn.BatchNorm1d, (2, 5, 3, 3)),
        (L2BatchNorm2d, nn.BatchNorm2d, (4, 5)),
        (L2BatchNorm2d, nn.BatchNorm2d, (1, 5, 1, 1)),
        (L2BatchNorm2d, nn.BatchNorm2d, (4, 6, 3, 3)),
        (L2BatchNorm3d, nn.BatchNorm3d, (4, 5, 3, 3)),
    ],
)
@pytest.mark.parametrize("fused", ["off", "on"])
def test_shapes_that_batch_norm_refuses_are_refused_alike(
    ours: type[nn.Module], stock: type[nn.Module], shape: tuple[int, ...], fused: str
) -> None:
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as refused:
        stock(5)(x)
    with pytest.raises(refused.type) as ours_refused:
        ours(5, fused=fused)(x)
    assert str(ours_refused.value) == str(refused.value)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_function(scale: str, training: bool) -> None:
    torch.manual_seed(0)
    layer = L2BatchNorm2d(3, scale=scale, fused="off", dtype=torch.float64, momentum=0.0).train(training)
    x = torch.randn(3, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_second_derivatives_are_finite_wherever_the_first_are(scale: str, dtype: torch.dtype) -> None:
    """At all-zero samples, and at samples too small to be divided by their norm."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 2, dtype=dtype)
    x[1] = 0
    x[2] *= 1e-9
    x[3] *= 1e-14
    x.requires_grad_()
    layer = L2BatchNorm2d(3, scale=scale, fused="off", dtype=dtype)
    derivative = layer(x).sin().sum()
    for _ in range(2):  # torch has no third derivative of batch norm
        (dx,) = torch.autograd.grad(derivative, x, create_graph=True)
        assert dx[[0, 1, 4]].isfinite().all()
        assert dx[1].eq(0).all(), "an all-zero sample passes no gradient"
        derivative = dx[[0, 1, 4]].square().sum()


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize(
    ("change", "training"),
    [
        ({"eps": 0.0}, True),
        ({"eps": -1.0}, True),
        *itertools.product(
            [
                {"weight": nn.Parameter(torch.ones(1))},
                {"bias": nn.Parameter(torch.ones(1))},
                {"running_mean": torch.zeros(1), "running_var": torch.ones(1)},
                {"running_var": None},
            ],
            [True, False],
        ),
    ],
)
def test_states_that_batch_norm_refuses_are_refused_alike(
    change: dict[str, Any], training: bool, fused: str
) -> None:
    x = torch.randn(2, 4, 6, 6)
    bn, layer = nn.BatchNorm2d(4), L2BatchNorm2d(4, fused=fused)
    control = l2bn_detached.convert(nn.BatchNorm2d(4))
    for each in (bn, layer, control):
        for name, value in change.items():
            setattr(each.train(training), name, value)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as refused:
        bn(x)
    for each in (layer, control):
        with torch.no_grad(), pytest.raises(refused.type):
            each(x)
    assert layer.num_batches_tracked == 0, "a refused call counts as no update"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_that_batch_norm_refuses_are_refused(
    given: torch.dtype, own: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "run_kernel", uncompiled)
    x = torch.randn(4, 3, 2, 2).to(given)
    bn = nn.BatchNorm2d(3).to(own).train(training)
    layers = [L2BatchNorm2d(3, fused=fused).to(own).train(training) for fused in ("off", "on")]
    with torch.no_grad():
        try:
            expected = bn(x).dtype
        except RuntimeError:
            for layer in layers:
                with pytest.raises(RuntimeError, match="mixed dtype: running_mean is"):
                    layer(x)
        else:
            assert [layer(x).dtype for layer in layers] == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_input_that_is_not_of_floating_point_is_refused(dtype: torch.dtype) -> None:
    """Batch norm refuses it too; the result in x's own type would be cut down to whole numbers."""
    x = torch.ones(4, 3, 8, 8).to(dtype)
    for layer in (L2BatchNorm2d(3), L2BatchNorm2d(3, fused="off"), l2bn_position.convert(nn.BatchNorm2d(3))):
        with pytest.raises(NotImplementedError, match='"batch_norm" not implemented for'):
            layer(x)
    with pytest.raises(TypeError, match="l2_normalize takes floating-point values, not"):
        l2_normalize(x)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="scale is 'l2'; it may be unit or rms"):
        L2BatchNorm2d(3, scale="l2")
    with pytest.raises(ValueError, match="fused is 'yes'; it may be auto, on, off"):
        L2BatchNorm2d(3, fused="yes")


def test_running_variance_lags_until_two_hundred_updates(caplog: pytest.LogCaptureFixture) -> None:
    """BN starts it at 1, where unit features of 16x32x32 values have 1/16384: evaluation shrinks its output."""
    torch.manual_seed(0)
    layer = L2BatchNorm2d(16, fused="off")
    x = torch.randn(8, 16, 32, 32)
    variance, eps = 1 / (16 * 32 * 32), 1e-5
    for update in range(1, 201):
        trained = layer.train()(x).std().item()
        if update in (6, 56, 112, 200):
            start = 0.9**update  # its share in the running variance
            expected = math.sqrt(variance / (start + (1 - start) * variance + eps))
            assert layer.eval()(x).std().item() == pytest.approx(expected, rel=1e-3), update
    assert trained == pytest.approx(math.sqrt(variance / (variance + eps)), rel=1e-3)
    assert trained == pytest.approx(expected, rel=1e-3), "the start is forgotten"

    model = nn.Sequential(layer, L2BatchNorm2d(16))
    with caplog.at_level(logging.WARNING):
        assert not warn_if_few_updates(model, 200)
        assert caplog.records == []
        assert warn_if_few_updates(model, 199)
    assert len(caplog.records) == 1
    assert "199 updates" in caplog.text
    assert not warn_if_few_updates(nn.Sequential(nn.BatchNorm2d(3), L2BatchNorm2d(3, scale="rms")), 1)
    for control in (l2bn_detached, l2bn_position, l2bn_mean_norm):
        assert warn_if_few_updates(control.convert(nn.BatchNorm2d(3)), 199)
        assert not warn_if_few_updates(control.convert(nn.BatchNorm2d(3), scale="rms"), 1)


def test_updates_needed_follow_the_momentum() -> None:
    assert updates_needed(0.1) == 200
    assert updates_needed(0.01) == pytest.approx(2097, abs=1), "about ten times as many"
    assert updates_needed(None) == 1
    assert updates_needed(1.0) == 1
    assert updates_needed(0.0) == math.inf
