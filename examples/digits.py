"""Handwritten digits: 1,797 real images that scikit-learn ships, a small network, the whole of hpcckpt's interface."""

import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import hpcckpt

TRAINING_SAMPLES = 1500


def load() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """Return the training set, and images and labels of the test set; images are 64 numbers in 0..1."""
    images, labels = load_digits(return_X_y=True)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[shuffled] / 16
    y = torch.tensor(labels)[shuffled]
    return TensorDataset(x[:TRAINING_SAMPLES], y[:TRAINING_SAMPLES]), x[TRAINING_SAMPLES:], y[TRAINING_SAMPLES:]


def build_model() -> nn.Module:
    """Return a perceptron with dropout, which tells at once whether random numbers go on where they were."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> float:
    """Return the share of the test images that the model names right."""
    model.eval()
    right = (model(x.to(device)).argmax(1) == y.to(device)).float().mean()
    model.train()
    return float(right)


def main(run: hpcckpt.Run) -> None:
    """Train on every rank; `args`: epochs, lr, batch_size, and step_s, which slows steps down so that one can watch."""
    args: Any = run.args
    dataset, test_x, test_y = load()
    model = DistributedDataParallel(build_model().to(run.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    loader = run.loader(dataset, batch_size=args.batch_size, shuffle=True)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)
    for _ in run.epochs(args.epochs):
        for x, y in run.batches(loader):
            loss = cross_entropy(model(x.to(run.device)), y.to(run.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            time.sleep(args.step_s)
            run.log(loss=loss.detach())
            run.step()
        scheduler.step()
        run.report(accuracy=accuracy(model.module, test_x, test_y, run.device))
