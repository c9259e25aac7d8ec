"""scikit-learn's bundled digits, always split the same way."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Image = npt.NDArray[np.float64]
"""8 x 8 pixels, 0 is paper and 16 is ink."""


@dataclass(frozen=True)
class Labelled:
    """Images of shape (n, 8, 8) and the digits they show."""

    images: npt.NDArray[np.float64]
    digits: npt.NDArray[np.int64]


def load() -> tuple[Labelled, Labelled]:
    """The 1,347 images to learn from, and the 450 that are held out to measure the result."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    return Labelled(train_x, train_y), Labelled(test_x, test_y)
