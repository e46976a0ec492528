"""Batch norm layers that first change their input: what the controls of L2BN are made of.

A control differs from L2BN in one point of the l2 step alone, so that what it changes can be told from what comes
along. It is computed plainly, by a function of its own and then BN itself; it has no fused kernels and no form with
statistics that are joint across ranks.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn.norms.l2_step import Scale, widened
from l2bn.norms.swap import stock_class

Step = Callable[[Tensor, Scale], Tensor]
"""(N, C, ...), float32 at least, and L2BN's scale to the same shape and type. A module may hold buffers."""


class _Stepped(_BatchNorm):
    """What the layers share."""

    step: Step
    scale: Scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        wide = widened(input)
        own = next((t.dtype for t in (self.weight, self.running_mean) if t is not None), wide.dtype)
        return super().forward(self.step(wide, self.scale).to(own)).to(input.dtype)


class SteppedBatchNorm1d(_Stepped, nn.BatchNorm1d): ...


class SteppedBatchNorm2d(_Stepped, nn.BatchNorm2d): ...


class SteppedBatchNorm3d(_Stepped, nn.BatchNorm3d): ...


class SteppedBatchNormAct2d(SteppedBatchNorm2d):
    """In place of timm's `BatchNormAct2d`, whose dropout and activation it takes over."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - BN's own name
        return self.act(self.drop(super().forward(input)))


_COUNTERPARTS: dict[type[_BatchNorm], type[_Stepped]] = {
    nn.BatchNorm1d: SteppedBatchNorm1d,
    nn.BatchNorm2d: SteppedBatchNorm2d,
    nn.BatchNorm3d: SteppedBatchNorm3d,
}


def put_before(
    bn: _BatchNorm, step: Step, scale: Scale, eps: float | None = None, momentum: float | None = None
) -> nn.Module:
    """A layer on bn's own parameters and buffers that takes `step` of its input first.

    `eps` and `momentum` keep bn's own when None. Raises TypeError for a layer that it cannot stand for.
    """
    cls = _COUNTERPARTS.get(stock_class(bn), SteppedBatchNormAct2d)
    layer = cls(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta")
    layer._parameters.update(bn._parameters)
    layer._buffers.update(bn._buffers)
    layer._modules.update(bn._modules)
    layer.eps = bn.eps if eps is None else eps
    layer.momentum = bn.momentum if momentum is None else momentum
    layer.step, layer.scale = step, scale
    return layer.train(bn.training)
