"""One way of training for every small net of the table: AdamW, warm-up and cosine, the best validation epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lolgen.lora import Batch
from lolgen.tasks.reader import Budget, Layout

Rows = Tensor | Batch
"""What a net reads, by row: a tensor (N, ...) or a batch of LoRAs."""


def apply(net: nn.Module, x: Rows, chunk: int = 512) -> Tensor:
    """The net's scores (N, C) in evaluation mode, a chunk of rows at a time."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(x[i : i + chunk]) for i in range(0, len(x), chunk)])


def train_net(
    make: Callable[[], nn.Module],
    x: Rows,
    y: Tensor,
    x_val: Rows,
    y_val: Tensor,
    classes: Layout,
    *,
    seed: int,
    lr: float,
    budget: Budget,
    epochs: int = 60,
    batch: int = 64,
    weight_decay: float = 1e-2,
    patience: int = 12,
) -> tuple[nn.Module, float]:
    """The net at its best validation epoch, and its score there (`Classes.score`).

    `make` builds it; initial weights, order and dropout follow from `seed`, and the global generator is left as
    it was. Training ends after `patience` epochs without a better one.
    """
    epochs = max(3, round(epochs * budget.epochs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        decayed = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        steps = math.ceil(len(x) / batch)
        total, warm = epochs * steps, max(1, epochs * steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: min((t + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * t / total))
        )
        least, best, waited = float("inf"), copy.deepcopy(net.state_dict()), 0
        for _ in range(epochs):
            net.train()
            for rows in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad(set_to_none=True)
                classes.loss(net(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
            score = classes.score(apply(net, x_val), y_val)
            waited += 1
            if score < least:
                least, best, waited = score, copy.deepcopy(net.state_dict()), 0
            elif waited >= patience:
                break
    net.load_state_dict(best)
    return net.eval(), least


def mlp(inputs: int, hidden: int, outputs: int, dropout: float = 0.1) -> nn.Module:
    """Linear, LayerNorm, ReLU, Dropout, Linear: the head of the paper's models; one linear map when `hidden` is 0."""
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, outputs),
    )
