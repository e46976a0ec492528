"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385.

Two families that are often confused, because both are called ResNet:

- `cifar_resnet`, section 4.2 of the paper: three stages of 16, 32 and 64 channels with n basic blocks of two
  3x3 convolutions each, depth 6n + 2. Parameters at 10 classes, by kind of shortcut:

      depth     identity   projection
      20         269,722      272,474
      32         464,154      466,906
      44         658,586      661,338
      56         853,018      855,770
      110      1,727,962    1,730,714

- `resnet_3x3_stem`: the four-stage ImageNet nets of section 4.1 (64 to 512 channels) whose 7x7 stem and max
  pool are replaced by one 3x3 convolution of stride 1. Parameters at 10 classes: 11,173,962 (depth 18),
  21,282,122 (34) and 23,520,842 (50).

Blocks are torchvision's: a batch norm after every convolution, a ReLU after the sum, and in a bottleneck the
stride on the 3x3 convolution ("ResNet v1.5"; the paper has it on a 1x1). Modules bear torchvision's names, so
that published weights load. Letters: N samples, C channels, H and W height and width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from l2bn.backbones.initialisation import he_fan_out

Shortcut = Literal["identity", "projection"]

CIFAR_DEPTHS = (20, 32, 44, 56, 110)


class PaddedIdentity(nn.Module):
    """Option A of the paper: every second pixel of x, with zeros for the channels that x does not have."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        subsampled = x[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))


def make_shortcut(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Module | None:
    """The shortcut's layers: None where shapes agree, else option A (identity) or B (projection) of the paper."""
    if stride == 1 and in_channels == out_channels:
        return None
    if shortcut == "identity":
        return PaddedIdentity(out_channels - in_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def resnet(
    num_classes: int,
    block: type[BasicBlock | Bottleneck],
    blocks: Sequence[int],
    width: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    """A 3x3 stem of stride 1, stages `layer1`, `layer2`, ..., the mean over H and W, and a linear layer.

    `blocks` is the number of blocks in each stage, `width` the number of channels in the first (before a
    bottleneck's expansion). Every later stage doubles the channels and halves H and W.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),  # (N, width, H, W)
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
    }
    in_channels = width
    for stage, repeats in enumerate(blocks):
        channels = width * 2**stage
        stage_blocks = []
        for position in range(repeats):
            stride = 2 if stage > 0 and position == 0 else 1
            out_channels = channels * block.expansion
            bypass = make_shortcut(in_channels, out_channels, stride, shortcut)
            stage_blocks.append(block(in_channels, channels, stride, bypass))
            in_channels = out_channels
        layers[f"layer{stage + 1}"] = nn.Sequential(*stage_blocks)  # (N, C, H / 2^stage, W / 2^stage)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()  # (N, C)
    layers["fc"] = nn.Linear(in_channels, num_classes)
    model = nn.Sequential(OrderedDict(layers))
    he_fan_out(model)
    return model


def cifar_resnet(num_classes: int, depth: int = 20, shortcut: Shortcut = "projection") -> nn.Sequential:
    """The basic-block ResNet of depth 20, 32, 44, 56 or 110 for 32x32 images.

    `shortcut="identity"` has no parameters on the shortcuts and is what the paper trained on CIFAR-10;
    `"projection"` puts a 1x1 convolution with batch norm where shapes change, as most later code does.
    ValueError for another depth or shortcut.
    """
    if depth not in CIFAR_DEPTHS:
        valid = ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(f"depth={depth}: a CIFAR ResNet has depth 6n + 2; choose one of {valid}")
    if shortcut not in ("identity", "projection"):
        raise ValueError(f'shortcut={shortcut!r}: choose "identity" or "projection"')
    return resnet(num_classes, BasicBlock, ((depth - 2) // 6,) * 3, 16, shortcut)


def resnet_3x3_stem(num_classes: int, depth: int = 18) -> nn.Sequential:
    """The ImageNet ResNet of depth 18, 34 (basic blocks) or 50 (bottlenecks) with a stem for 32x32 images."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
    if depth not in blocks:
        raise ValueError(f"depth={depth}: choose one of {', '.join(map(str, blocks))}")
    return resnet(num_classes, Bottleneck if depth == 50 else BasicBlock, blocks[depth], 64, "projection")
