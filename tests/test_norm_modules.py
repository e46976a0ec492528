"""PyTorch's own module inputs for BatchNorm1d, 2d and 3d, through the layers of L2BN.

The module that holds them is private to PyTorch. The kernels' formulas run uncompiled here.
"""

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from conftest import require
from l2bn import L2BatchNorm1d, L2BatchNorm2d, L2BatchNorm3d
from l2bn.kernels import autograd, compiler

try:
    # The import freezes torch's global flags, which runs in the same process have to set.
    with mock.patch.object(torch.backends, "disable_global_flags"):
        from torch.testing._internal import common_modules
except ImportError as error:
    common_modules, missing = None, str(error)
else:
    missing = ""

COUNTERPARTS = {nn.BatchNorm1d: L2BatchNorm1d, nn.BatchNorm2d: L2BatchNorm2d, nn.BatchNorm3d: L2BatchNorm3d}
KINDS = list(COUNTERPARTS)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    require("PyTorch's module inputs", missing)

    def run(function: Any, tensors: Any, *constants: Any, **_: Any) -> list[Tensor]:
        return compiler.listed(function(*tensors, *constants))

    monkeypatch.setattr(autograd, "run_kernel", run)


def inputs_of(stock: type[nn.Module], training: bool) -> list[Any]:
    torch.manual_seed(0)
    (info,) = [info for info in common_modules.module_db if info.module_cls is stock]
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
    inputs = info.module_inputs_func(info, **arguments)
    assert len(inputs) >= 7
    return inputs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stock", KINDS)
def test_the_layer_does_with_each_input_what_batch_norm_does(stock: type[nn.Module], training: bool) -> None:
    """The same shape, gradients and derivatives that fit the values, copies and pickles that compute the same."""
    for given in inputs_of(stock, training):
        options = given.constructor_input
        for fused in ("off", "on"):
            layer = COUNTERPARTS[stock](*options.args, **options.kwargs, fused=fused, dtype=torch.float64)
            bn = stock(*options.args, **options.kwargs, dtype=torch.float64)
            (x,) = given.forward_input.args
            twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            y, expected = layer.train(training)(x), bn.train(training)(x)
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype), given.desc
            for twin in twins:
                assert torch.equal(twin.train(training)(x), y), given.desc
            for key, value in bn.state_dict().items():
                ours = layer.state_dict()[key]
                assert (ours.shape, ours.dtype) == (value.shape, value.dtype)
                assert ours.isfinite().all() == value.isfinite().all(), (given.desc, key)
        if x.numel():
            layer.fused, layer.momentum = "off", 0.0
            assert torch.autograd.gradcheck(layer, (x,), fast_mode=True), given.desc
            assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True), given.desc
