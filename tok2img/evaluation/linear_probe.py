"""Linear probe: the accuracy of a linear classifier of images that is given only their codes.

Uses scikit-learn, of the extra `[eval]`.
"""

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3)  # of the squared weights, next to the mean cross-entropy
HELD_OUT_FRACTION = 0.1
MAX_ITERATIONS = 1000


def linear_probe(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, *, codebook_size: int
) -> float:
    """Fit a logistic regression to one-hot codes and measure its accuracy.

    The weight decay is chosen on the first tenth of the training examples.

    Args:
        codes: Codes of the training images, `b n`.
        labels: Their classes, `b` integers.
        test_codes: Codes of the test images, `b n`.
        test_labels: Their classes, `b` integers.
        codebook_size: Number of values that a code can take.

    Returns:
        Fraction of the test images that are classified correctly.

    Raises:
        ValueError: If codes and labels differ in number, or there are too few of them.
    """
    if len(codes) != len(labels) or len(test_codes) != len(test_labels) or len(codes) < 2 or not len(test_codes):
        raise ValueError(
            f"Expected as many labels as codes, at least 2 to train on and 1 to test on, got {len(codes)} codes for "
            f"{len(labels)} labels and {len(test_codes)} for {len(test_labels)}."
        )
    categories: Any = [np.arange(codebook_size)] * codes.shape[1]
    encoder = OneHotEncoder(categories=categories)
    # Sparse matrices `b (n k)` with n ones in a row.
    one_hot, test_one_hot = encoder.fit_transform(codes.cpu().numpy()), encoder.transform(test_codes.cpu().numpy())
    classes, test_classes = labels.cpu().numpy(), test_labels.cpu().numpy()
    num_held_out = max(1, round(HELD_OUT_FRACTION * len(codes)))

    def fit(weight_decay: float, first: int) -> LogisticRegression:
        # scikit-learn weighs the sum of the losses against half of the squared weights.
        strength = 1 / (2 * weight_decay * len(classes[first:]))
        return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(one_hot[first:], classes[first:])

    def held_out_accuracy(weight_decay: float) -> float:
        return fit(weight_decay, num_held_out).score(one_hot[:num_held_out], classes[:num_held_out])

    return fit(max(WEIGHT_DECAYS, key=held_out_accuracy), 0).score(test_one_hot, test_classes)
