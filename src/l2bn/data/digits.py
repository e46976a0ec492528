"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with the library."""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from l2bn.data.splits import Common, Images, Splits, check_image_size, digest, make_splits, stratified_order

TEST_SHARE = 0.2  # leaves 1,437 training images: 44 batches of 32


def digits(image_size: int = 32, **common: Unpack[Common]) -> Splits:
    """The digits, enlarged by bilinear interpolation, as RGB; a fixed stratified fifth of them is the test set.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, 1998, doi:10.24432/C50P49 (scikit-learn holds its test part).
    """
    check_image_size(image_size)
    data = load_digits()
    pixels = torch.from_numpy(data.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8), values 0 to 16
    pixels = F.interpolate(pixels, size=(image_size, image_size), mode="bilinear", align_corners=False)
    every = Images(pixels.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(data.target).long())
    files = digest([torch.from_numpy(data.images), every.labels])
    order = stratified_order(every.labels, "digits")
    held_out = math.ceil(TEST_SHARE * len(every))
    test, train = every.select(order[:held_out].sort().values), every.select(order[held_out:].sort().values)
    return make_splits(train, test, 10, image_size, tuple("0123456789"), files=files, **common)
