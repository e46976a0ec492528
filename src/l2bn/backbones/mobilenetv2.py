"""MobileNetV2 for 32x32 images: Sandler et al., "Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.

For 32x32 images the first convolution and the 24-channel stage have stride 1 instead of 2, as in
chenyaofo/pytorch-cifar-models; all else is the paper's table 2. Parameters at 10 classes, by width: 700,490
(0.5) and 2,236,682 (1.0). Modules bear torchvision's names. Letters: N samples, C channels, H and W height
and width.
"""

from collections import OrderedDict

from torch import Tensor, nn

from l2bn.backbones.initialisation import he_fan_out

# Expansion, output channels at width 1, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width: float) -> int:
    """`channels * width` rounded to a multiple of 8, at least 8 and not below nine tenths of the product."""
    exact = channels * width
    rounded = max(8, int(exact / 8 + 0.5) * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1x1 expansion (none if `expansion` is 1), 3x3 depthwise convolution, 1x1 projection without ReLU.

    The depthwise convolution has the stride. The input is added where it has the output's shape.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [conv_bn_relu6(in_channels, hidden, 1)] if expansion > 1 else []
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenetv2(num_classes: int, width: float = 1.0, dropout: float = 0.2) -> nn.Sequential:
    """MobileNetV2 of any width above 0 (else ValueError); `dropout` in [0, 1) before the linear layer.

    `features` are the stem, 17 inverted residuals and a 1x1 convolution; `classifier` is the head.
    """
    if not width > 0:
        raise ValueError(f"width={width}: give a number above 0, such as 0.5 or 1.0")
    in_channels = scaled(32, width)
    features: list[nn.Module] = [conv_bn_relu6(3, in_channels, 3)]  # (N, C, H, W)
    for expansion, channels, blocks, first_stride in STAGES:
        out_channels = scaled(channels, width)
        for position in range(blocks):
            stride = first_stride if position == 0 else 1
            features.append(InvertedResidual(in_channels, out_channels, stride, expansion))
            in_channels = out_channels
    last = scaled(1280, max(1.0, width))  # the paper does not narrow the last convolution
    features.append(conv_bn_relu6(in_channels, last, 1))
    layers: dict[str, nn.Module] = {
        "features": nn.Sequential(*features),  # (N, last, H / 8, W / 8)
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),  # (N, last)
        "classifier": nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes)),
    }
    model = nn.Sequential(OrderedDict(layers))
    he_fan_out(model, linear_std=0.01)
    return model
