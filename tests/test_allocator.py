"""Freed memory stays with the process: a later step touches fewer pages for the first time."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from torch import nn
from l2bn.training.allocator import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
x = torch.randn(32, 64, 72, 72, requires_grad=True)  # 42 MB
layer = nn.BatchNorm2d(64)
def step():
    x.grad = None
    layer(x).sum().backward()
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, kept: bool) -> int:
    code = STEPS.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_later_steps_meet_less_than_half_the_new_pages() -> None:
    assert page_faults(kept=True) < 0.5 * page_faults(kept=False)
