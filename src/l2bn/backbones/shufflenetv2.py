"""ShuffleNetV2 for 32x32 images: Ma et al., "Practical Guidelines for Efficient CNN Architecture Design",
arXiv 1807.11164.

For 32x32 images the first convolution has stride 1 and the max pool after it is left out, as in
chenyaofo/pytorch-cifar-models; all else is the paper's table 5. Parameters at 10 classes, by width: 352,042
(0.5), 1,263,854 (1.0), 2,488,874 (1.5) and 5,365,486 (2.0). Convolutions keep PyTorch's initial weights, as
there. Modules bear torchvision's names. Letters: N samples, C channels, H and W height and width.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By width: the channels of stages 2, 3, 4 and of the last convolution.
CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
REPEATS = (4, 8, 4)
STEM_CHANNELS = 24


def pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A 1x1 convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def depthwise(channels: int, stride: int) -> list[nn.Module]:
    """A 3x3 convolution of each channel by itself and batch norm, without ReLU."""
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


class Unit(nn.Module):
    """The paper's figure 3 (c): one half of the channels passes by, the other is transformed; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch2 = nn.Sequential(*pointwise(half, half), *depthwise(half, 1), *pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        passed, transformed = x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([passed, self.branch2(transformed)], dim=1), groups=2)


class DownsamplingUnit(nn.Module):
    """The paper's figure 3 (d): all channels go through two branches of stride 2, so that H and W are halved."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch1 = nn.Sequential(*depthwise(in_channels, 2), *pointwise(in_channels, half))
        self.branch2 = nn.Sequential(*pointwise(in_channels, half), *depthwise(half, 2), *pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.branch1(x), self.branch2(x)], dim=1), groups=2)


def shufflenetv2(num_classes: int, width: float = 1.0) -> nn.Sequential:
    """ShuffleNetV2 of width 0.5, 1.0, 1.5 or 2.0; ValueError for another width."""
    if width not in CHANNELS:
        raise ValueError(f"width={width}: choose one of {', '.join(map(str, CHANNELS))}")
    *stages, last = CHANNELS[width]
    layers: dict[str, nn.Module] = {
        "conv1": nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, padding=1, bias=False),  # (N, 24, H, W)
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.ReLU(inplace=True),
        )
    }
    in_channels = STEM_CHANNELS
    for stage, (out_channels, repeats) in enumerate(zip(stages, REPEATS, strict=True), start=2):
        units = [Unit(out_channels) for _ in range(repeats - 1)]
        layers[f"stage{stage}"] = nn.Sequential(DownsamplingUnit(in_channels, out_channels), *units)
        in_channels = out_channels
    layers["conv5"] = nn.Sequential(*pointwise(in_channels, last))  # (N, last, H / 8, W / 8)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()  # (N, last)
    layers["fc"] = nn.Linear(last, num_classes)
    return nn.Sequential(OrderedDict(layers))
