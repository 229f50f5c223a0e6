"""What codes say about the class of an image: the accuracy of a linear classifier that sees nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_STEPS = 100
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3)
HELD_OUT_SHARE = 0.1


def linear_probe(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, *, codebook_size: int
) -> float:
    """Fit a logistic regression to one-hot codes and measure it; how much it is held back is chosen on a tenth of the training rows.

    Args:
        codes, test_codes: `b n`. labels, test_labels: classes from 0, `b`.

    Returns:
        Share of the test rows that it gets right.
    """
    if len(codes) != len(labels) or len(test_codes) != len(test_labels) or len(codes) < 2 or not len(test_codes):
        raise ValueError(
            f"got {len(codes)} codes for {len(labels)} labels and {len(test_codes)} for {len(test_labels)}"
        )
    num_held_out = max(1, round(HELD_OUT_SHARE * len(codes)))
    fitted, held_out = slice(num_held_out, None), slice(0, num_held_out)

    def share_right(weight_decay: float, rows: slice, seen: Tensor, classes: Tensor) -> float:
        probe = fit(codes[rows], labels[rows], codebook_size=codebook_size, weight_decay=weight_decay)
        return (probe(seen).argmax(dim=1) == classes).float().mean().item()

    best = max(WEIGHT_DECAYS, key=lambda each: share_right(each, fitted, codes[held_out], labels[held_out]))
    return share_right(best, slice(None), test_codes, test_labels)


def fit(codes: Tensor, labels: Tensor, *, codebook_size: int, weight_decay: float) -> "LinearProbe":
    """Multinomial logistic regression of labels `b` on codes `b n`, by L-BFGS."""
    probe = LinearProbe(codes.shape[1], codebook_size, int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=NUM_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(codes), labels) + weight_decay * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


class LinearProbe(nn.Module):
    """A linear map of one-hot codes, as the sum of a row for each."""

    def __init__(self, num_codes: int, codebook_size: int, num_classes: int):
        super().__init__()
        self.offsets = codebook_size * torch.arange(num_codes)
        self.weight = nn.Parameter(torch.zeros(num_codes * codebook_size, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `b n` -> logits `b c`."""
        return F.embedding_bag(codes.long() + self.offsets, self.weight, mode="sum") + self.bias
