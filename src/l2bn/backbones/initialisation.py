"""The initial weights that several families share. Batch norms keep their own: weight 1, bias 0."""

from torch import nn


def he_fan_out(model: nn.Module, linear_std: float | None = None) -> None:
    """Draw convolutions from N(0, 2 / (kernel area * output channels)): He et al. 2015, arXiv 1502.01852.

    Biases of convolutions become 0. With `linear_std` linear layers are drawn from N(0, linear_std^2) with
    bias 0; without, they keep PyTorch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
