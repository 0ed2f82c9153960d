"""How format1.pt and format1.json were made, with hpcckpt 0.1.0.dev0 and torch 2.13.0: `python tests/golden/make_format1.py FOLDER`.

They are kept as they are: run it to see where the numbers come from, not to renew them. Every number is one that float32
holds exactly; nothing is drawn at random, and two calls write the same bytes.
"""

import hashlib
import random
import sys
from pathlib import Path

import torch
from torch import nn

from hpcckpt.state.tracked import Tracked
from hpcckpt.store.durable import write_json

RANKS = 2


class Net(nn.Module):
    """Parameters, BatchNorm's buffers, a bfloat16 and an int64 tensor, tied weights, a submodule called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([1.5, -0.375, 1024.0], dtype=torch.bfloat16))
        self.register_buffer("counts", torch.tensor([[1, -2], [2**53 + 1, -(2**63)]]))


def model() -> Net:
    """Return the model: its tensors count up in quarters."""
    net, number = Net(), 0
    with torch.no_grad():
        for tensor in net.parameters():
            values = torch.arange(number, number + tensor.numel(), dtype=torch.float32)
            tensor.copy_((values / 4).reshape(tensor.shape))
            number += tensor.numel()
        net.norm.running_mean.copy_(torch.tensor([-1.25, 7.0]))
        net.norm.running_var.copy_(torch.tensor([0.5, 2.0]))
        net.norm.num_batches_tracked.fill_(12)
    return net


def generators(rank: int) -> dict[str, object]:
    """Return the state of a rank's generators; NumPy's as its legacy seeding by 1 would begin, spelled out."""
    keys = [1]
    for index in range(1, 624):
        keys.append((1812433253 * (keys[-1] ^ (keys[-1] >> 30)) + index) % 2**32)
    return {
        "python": random.Random(rank).getstate(),
        "torch": torch.Generator().manual_seed(rank).get_state(),
        "numpy": {"name": "MT19937", "keys": torch.tensor(keys), "position": 624, "has_gauss": 0, "cached_gaussian": 0.0},
    }


def content() -> dict[str, object]:
    """Return what is in the file."""
    net = model()
    groups = [
        {"params": [net.embedding.weight, net.norm.weight], "weight_decay": 0.0},
        {"params": [*net.module.parameters(), net.norm.bias]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.125)
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            halves, eighths = tensor.detach() / 2, tensor.detach() / 8
            optimizer.state[tensor] = {"step": torch.tensor(12.0), "exp_avg": halves, "exp_avg_sq": eighths}
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3], gamma=0.5)
    tracked = Tracked()
    for name, value in (("model", net), ("optimizer", optimizer), ("scheduler", scheduler)):
        tracked.add(name, value)
    return {
        "format_version": 1,
        "epoch": 3,
        "step": 12,
        **tracked.state(),
        "metrics": {"val_loss": 0.625},
        "world_size": RANKS,
        "saved_with_wrapper": "DistributedDataParallel",
        "rng_state": [generators(rank) for rank in range(RANKS)],
        "data_state": {"epoch_finished": False, "loaders": {"0": {"consumed": 48, "num_samples": 100}}, "last_loader": "0"},
    }


def main(folder: Path) -> None:
    """Write both files."""
    path = folder / "format1.pt"
    with path.open("wb") as file:
        torch.save(content(), file)
    data = path.read_bytes()
    manifest = {
        "file": "checkpoint_epoch0003_step000000012.pt",
        "size_bytes": len(data),
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "epoch": 3,
        "step": 12,
        "epoch_finished": False,
        "generation": 1,
        "metrics": {"val_loss": 0.625},
        "world_size": RANKS,
        "saved_with_wrapper": "DistributedDataParallel",
        "versions": {"hpcckpt": "0.1.0.dev0", "torch": "2.13.0", "python": "3.11.7"},
        "save_s": 0.0027,
        "time": 1795379816.5,
    }
    write_json(folder / "format1.json", manifest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
