"""What all processes of a run know of a number on their devices, without any of them waiting for it."""

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """The least of a number over all processes, told one question later.

    To read a number from a device, the host has to wait until the device has computed all that was asked of it
    before. The answer to the question before is there already. It is the same in every process, and every process
    gets it at the same question, so that all can act on it alike.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def ask(self, number: Tensor) -> float | None:
        """Ask for the least of `number` (), and get what was asked for the last time (None at the first)."""
        answer = self._answer()
        least = number.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(least, dist.ReduceOp.MIN)
        if least.is_cuda:
            host = torch.empty_like(least, device="cpu", pin_memory=True)
            host.copy_(least, non_blocking=True)
            self._asked = host, torch.cuda.current_stream(least.device).record_event()
        else:
            self._asked = least, None
        return answer

    def _answer(self) -> float | None:
        if self._asked is None:
            return None
        number, copied = self._asked
        if copied is not None:
            copied.synchronize()
        return float(number)
