"""Freed memory stays with the process, so that later steps touch fewer new pages."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from torch import nn
from l2bn.training.compute import free_as_usual, keep_freed_memory
for rule in {rules}:
    assert rule()
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


def page_faults(*rules: str) -> int:
    code = STEPS.format(rules=f"({''.join(f'{rule}, ' for rule in rules)})")
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
@pytest.mark.slow
def test_later_steps_meet_less_than_half_the_new_pages() -> None:
    usual = page_faults()
    assert page_faults("keep_freed_memory") < 0.5 * usual
    assert page_faults("keep_freed_memory", "free_as_usual") > 0.5 * usual
