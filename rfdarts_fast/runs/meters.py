"""Running sums of losses and hits, kept on the device so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def batch_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, float64 [4]: loss, hits in the first place and in the first five, images.

    loss: mean over the batch; logits [N, classes]; labels [N].
    """
    n = labels.shape[0]
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (top == labels[:, None]).sum(dim=0)
    sums = torch.stack([loss.detach() * n, hits[0], hits.sum(), torch.full_like(hits[0], n)])
    return sums.to(torch.float64)


class Meter:
    """Mean loss and top-1 / top-5 accuracy over the images added since the last `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def reset(self) -> None:
        self.sums.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: mean over the batch; logits [N, classes]; labels [N]."""
        self.sums += batch_sums(loss, logits, labels)

    @property
    def images(self) -> int:
        return int(self.sums[3])

    def result(self) -> dict[str, float | None]:
        """loss (nats), accuracy and top-5 accuracy (percent); None before the first image."""
        loss, top1, top5, n = self.sums.tolist()
        if not n:
            return {"loss": None, "accuracy": None, "top5": None}
        return {"loss": loss / n, "accuracy": 100 * top1 / n, "top5": 100 * top5 / n}
