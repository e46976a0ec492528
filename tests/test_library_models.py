"""L2BN in the models of timm and torchvision: everything but the norm stays what it was.

The layers run as the plain composition here, which needs no compilation; test_fused.py compares it with the kernels.
"""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2bn import L2BatchNorm2d, swap_norm
from l2bn.norms import l2bn

TIMM = {  # name: number of batch norm layers, counted in the definition of the architecture
    "cspresnet50": None,
}
