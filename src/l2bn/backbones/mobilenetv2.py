"""MobileNetV2 for 32x32 images: Sandler et al., "Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.

It is torchvision's, but the first convolution and the 24-channel stage have stride 1 instead of 2, as in
chenyaofo/pytorch-cifar-models. Parameters at 10 classes, by width: 700,490 (0.5) and 2,236,682 (1.0).
"""

from torch import nn
from torchvision.models import MobileNetV2

# Table 2 of the paper, but for that stride: expansion, channels at width 1, blocks, stride of the first block.
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def mobilenetv2(num_classes: int, width: float = 1.0, dropout: float = 0.2) -> nn.Module:
    """MobileNetV2 of any width above 0 (else ValueError); `dropout` in [0, 1) before the linear layer.

    Images (N, 3, H, W) have (N, C, H / 8, W / 8) features before the mean over H and W.
    """
    if not width > 0:
        raise ValueError(f"width={width}: give a number above 0, such as 0.5 or 1.0")
    model = MobileNetV2(num_classes, width, STAGES, dropout=dropout)
    model.features[0][0].stride = (1, 1)
    return model
