"""A control of L2BN: all samples are divided by one number, the running mean of their norms.

    z_n = a * x_n / r,  r a running mean of ||x_n||_2;  y = BN(z)

The features get the scale that they have in L2BN, and with it the weight of eps and the start of the running
variance, while the norms stay as unequal as they were. What it has over BN is a side effect of the scale; what
L2BN has over it comes from equal norms and their gradient.

r is a buffer, so the state dict is not BN's. It is used in training too, constant to the gradient, and updated
before: cumulatively through the first 1/momentum batches, since a start at any fixed number would be far off,
then by momentum. The processes of a distributed training update it by the mean over all their samples.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.kernels.formulas import TINY, Scale, squared_target, widened
from l2bn.norms.stepped import put_before

BN_SHAPED = False


def convert(
    bn: _BatchNorm, eps: float | None = None, momentum: float | None = None, scale: Scale = "unit"
) -> nn.Module:
    """Return the layer that takes the place of `bn`, on the same parameters, and with two buffers more.

    `momentum` is also that of the running mean of norms. `scale` is that of L2BN, for the sample whose norm is
    the mean: "unit" (l2 norm 1) or "rms" (root mean square 1).
    """
    step = DivideByMeanNorm(bn.momentum if momentum is None else momentum).train(bn.training)
    held = next(itertools.chain(bn.parameters(), bn.buffers()), torch.empty(0))
    return put_before(bn, step.to(held.device), scale, eps, momentum)


class DivideByMeanNorm(nn.Module):
    """Divide all samples by the running mean of their norms; a batch in training updates it first.

    A forward pass that is computed twice, as by activation checkpointing, moves the mean twice.
    """

    running_norm: Tensor
    num_batches_tracked: Tensor

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_norm", torch.ones(()))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Forget the mean; the next batch begins it."""
        self.running_norm.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor, scale: Scale = "unit") -> Tensor:
        """(N, ...) to the same."""
        if self.training:
            self._track(x.detach())
        return x * (squared_target(x, scale) ** 0.5 / self.running_norm.clamp_min(TINY))

    def _track(self, x: Tensor) -> None:
        norms = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            wide = widened(norms)  # a sum of them may exceed float16, and bfloat16 counts to 256
            total = torch.stack([wide.sum(), wide.new_full((), len(wide))])
            dist.all_reduce(total)
            norm = total[0] / total[1]
        elif x.numel():
            norm = norms.mean()
        else:  # the mean of no norms is no number
            return
        self.num_batches_tracked.add_(1)
        factor = 1.0 / self.num_batches_tracked
        if self.momentum is not None:
            factor = factor.clamp_min(self.momentum)
        self.running_norm.lerp_(norm.to(self.running_norm.dtype), factor)
