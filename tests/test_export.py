"""A model with L2BN can be exported to ONNX, where onnxruntime agrees with it."""

from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

from l2bn import swap_norm

SIZE = 64


@pytest.fixture(params=["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> nn.Module:
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
def test_onnxruntime_agrees(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 3, SIZE, SIZE)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model.requires_grad_(True)(x).detach()
    assert expected.std() > 0.1, "an output of zeros would agree with anything"
    assert (torch.from_numpy(output) - expected).abs().max() < 1e-4
