"""Backbones: functions `(num_classes, ...) -> nn.Module` on (N, 3, H, W), with ordinary `nn.BatchNorm2d`.

One family a file for CIFAR-sized images, and `library` for any model of torchvision or timm. No backbone
knows of any other norm: `l2bn.norms.swap` puts one in afterwards.
"""
