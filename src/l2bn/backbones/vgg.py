"""VGG with batch norm for 32x32 images: Simonyan and Zisserman, arXiv 1409.1556.

Configurations A, B, D and E of the paper. Its head, two layers of 4096 units on 7x7 pixels, is far too large for
32x32 images; as in chenyaofo/pytorch-cifar-models it is 512-512-classes with two dropouts of 0.5 here. The
convolutions keep their biases. Parameters at 10 classes: 9,756,426 (VGG-11), 9,941,322 (VGG-13), 15,253,578
(VGG-16) and 20,565,834 (VGG-19). Modules bear torchvision's names. Letters: N samples, C channels, H and W
height and width.
"""

from collections import OrderedDict

from torch import nn

from l2bn.backbones.initialisation import he_fan_out

# By depth: the number of 3x3 convolutions in each of the five stages.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


def vgg(num_classes: int, depth: int = 16, dropout: float = 0.5) -> nn.Sequential:
    """VGG-11, 13, 16 or 19 with batch norm; ValueError for another depth. `dropout` lies in [0, 1).

    `features` are five stages, each closed by a max pool that halves H and W; `classifier` is the head. Of images
    larger than 32x32 more than one pixel is left then; the head gets their mean.
    """
    if depth not in CONVOLUTIONS:
        raise ValueError(f"depth={depth}: choose one of {', '.join(map(str, CONVOLUTIONS))}")
    features: list[nn.Module] = []
    in_channels = 3
    for repeats, channels in zip(CONVOLUTIONS[depth], CHANNELS, strict=True):
        for _ in range(repeats):
            features += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        features.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(
        nn.Linear(in_channels, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, num_classes),
    )
    layers: dict[str, nn.Module] = {
        "features": nn.Sequential(*features),  # (N, 512, H / 32, W / 32)
        "avgpool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),  # (N, 512)
        "classifier": classifier,
    }
    model = nn.Sequential(OrderedDict(layers))
    he_fan_out(model, linear_std=0.01)
    return model
