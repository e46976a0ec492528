"""The handwritten digits of `digits.csv.gz`: 1,797 real images of 8 x 8 pixels, in scikit-learn's order.

A line of the file is an image: 64 values from 0 to 16, row by row, and its label. It lies here because importing
scikit-learn, for these images alone, took 1.5 to 2 s of each start.
"""

import math
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F

from l2bn.data.splits import Common, Images, Splits, check_image_size, digest, make_splits, stratified_order

FILE = Path(__file__).with_name("digits.csv.gz")
TEST_SHARE = 0.2  # leaves 1,437 training images: 44 batches of 32


def digits(image_size: int = 32, **common: Unpack[Common]) -> Splits:
    """The digits, enlarged by bilinear interpolation, as RGB; a fixed stratified fifth of them is the test set.

    Source: the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998, doi:10.24432/C50P49, under CC BY 4.0.
    """
    check_image_size(image_size)
    table = np.loadtxt(FILE, delimiter=",")
    raw = torch.from_numpy(table[:, :-1]).reshape(-1, 8, 8)  # 0 to 16
    labels = torch.from_numpy(table[:, -1]).long()
    pixels = raw.float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8)
    pixels = F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", align_corners=False)
    every = Images(pixels.round().to(torch.uint8).repeat(1, 3, 1, 1), labels)
    files = digest([raw, labels])
    order = stratified_order(every.labels, "digits")
    held_out = math.ceil(TEST_SHARE * len(every))
    test, train = every.select(order[:held_out].sort().values), every.select(order[held_out:].sort().values)
    return make_splits(train, test, 10, image_size, tuple("0123456789"), files=files, **common)
