"""Three kinds of training that show the smallest difference between a run that was stopped and one that was not. One rank.

    python matrix.py RUN_DIR args.workload=mlp|cnn|transformer [args.epochs=… args.samples=… args.workers=… key=value …]

Each call of Run in which a stop can fall is a place, with a name: "begin 0", "step 1", "evaluation 0.1", "end 0". It is printed when it
is reached, and so is the one in which this rank stops.

HPCCKPT_TEST_SIGNALS="0@step 5|1@begin 1+0.004" has rank 0 signal itself at one place and rank 1 at another, four milliseconds later.
HPCCKPT_TEST_EXACT=1 has a rank that did so wait, behind that place, until it is decided where all stop: there or at the next place.
Writes what each rank trained on to <run_dir>/ids.<rank>: epoch, step, ids.
"""

import functools
import os
import random
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, default_collate

import hpcckpt
from hpcckpt.distributed.agreement import Agreement

DECIDED_TIMEOUT_S = 30.0

# Those of this process, wherever its run keeps them.
AGREEMENTS = []


def noted(make):
    def make_and_note(agreement, *arguments, **named):
        AGREEMENTS.append(agreement)
        make(agreement, *arguments, **named)

    return make_and_note


Agreement.__init__ = noted(Agreement.__init__)


class Numbers(Dataset):
    """Samples that depend on their number alone."""

    def __init__(self, size, make):
        self.size, self.make = size, make

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, *self.make(torch.Generator().manual_seed(index))


class Images(Numbers):
    """Pictures that are flipped, shifted and covered with noise, each by another of the global generators."""

    def __init__(self, size, augment):
        super().__init__(size, lambda generator: (torch.randn(1, 8, 8, generator=generator), torch.randint(0, 3, (), generator=generator)))
        self.augment = augment
        self.own = torch.Generator().manual_seed(7)

    def __getitem__(self, index):
        index, image, label = super().__getitem__(index)
        if self.augment == "global":
            if random.random() < 0.5:
                image = image.flip(-1)
            top, left = np.random.randint(0, 3, 2)  # noqa: NPY002 - the global generators are what scripts draw from
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8] + 0.1 * torch.randn(1, 8, 8)
        elif self.augment == "own":
            image = image + 0.1 * torch.randn(1, 8, 8, generator=self.own)
        return index, image, label


def mixed(augment, samples):
    """Mix each image of a batch with another one."""
    ids, images, labels = default_collate(samples)
    if augment == "global":
        share, others = np.random.beta(0.4, 0.4), torch.randperm(len(images))  # noqa: NPY002 - as above
        images = share * images + (1 - share) * images[others]
    return ids, images, labels


class MLP:
    """Dropout, momentum, a schedule by epoch; at the end of an epoch the batch before the last gives some of its own away."""

    batch_size, per_step, batches = 3, 1, 7

    def __init__(self, run, size):
        self.dataset = Numbers(size, lambda generator: (torch.randn(8, generator=generator), torch.randn(3, generator=generator)))
        self.loader_arguments = {}
        self.model = DistributedDataParallel(
            nn.Sequential(nn.Linear(8, 33), nn.Dropout(0.3), nn.Tanh(), nn.Linear(33, 17), nn.Dropout(0.1), nn.Tanh(), nn.Linear(17, 3))
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.epoch_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)
        self.tracked = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.epoch_scheduler}
        if run.args.get("inexact") == "forgets the momentum":
            del self.tracked["optimizer"]
        self.evaluated, self.loss = self.model.module, mse_loss

    def after_step(self):
        pass

    def after_epoch(self):
        self.epoch_scheduler.step()


class CNN(MLP):
    """BatchNorm, and random augmentation by the dataset and in the collate function, here or in workers."""

    def __init__(self, run, size):
        augment, workers = run.args.get("augment", "global"), int(run.args.get("workers", 0))
        self.dataset = Images(size, augment)
        self.loader_arguments = {
            "collate_fn": functools.partial(mixed, augment),
            "num_workers": workers,
            "persistent_workers": bool(run.args.get("persistent", False)) and workers > 0,
        }
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 3))
        self.model = DistributedDataParallel(nn.Sequential(*layers, *head))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        self.epoch_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)
        self.tracked = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.epoch_scheduler}
        # Through DDP, which gives all ranks the statistics of rank 0 before; without it each rank has those of its own last batch.
        self.evaluated = self.model.module if run.args.get("evaluates") == "each rank's own" else self.model
        self.loss = cross_entropy


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(self.encoder(self.embedding(x)).mean(1)).float()


class Transformer:
    """AdamW, a cosine by step, two batches a step, an average of the weights, bfloat16, dropout; the last step has one batch."""

    batch_size, per_step, batches = 2, 2, 13

    def __init__(self, run, size):
        def make(generator):
            return torch.randint(0, 11, (6,), generator=generator), torch.randint(0, 3, (), generator=generator)

        self.dataset, self.loader_arguments = Numbers(size, make), {}
        self.model = DistributedDataParallel(Words())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 7 * int(run.args.get("epochs", 2)))
        self.ema = AveragedModel(self.model.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.tracked = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.step_scheduler, "ema": self.ema}
        self.evaluated, self.loss = self.ema.module, cross_entropy

    def after_step(self):
        self.step_scheduler.step()
        self.ema.update_parameters(self.model.module)

    def after_epoch(self):
        pass


class Counter:
    """An object of the script's own that is saved and restored: a stop leaves no loop variable to count with."""

    def __init__(self):
        self.batches = self.steps = 0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class Places:
    """Where a stop can fall, and the signals that are planned."""

    def __init__(self, run):
        self.run, self.now, self.timers, self.signalled = run, "", [], False
        plan = filter(None, os.environ.get("HPCCKPT_TEST_SIGNALS", "").split("|"))
        split = [entry.partition("@") for entry in plan]
        self.plan = [place.partition("+")[::2] for rank, _, place in split if rank == str(run.rank)]
        self.is_exact = os.environ.get("HPCCKPT_TEST_EXACT") == "1"

    def reach(self, name):
        """Note that the next thing is a call in which a stop can fall, and do what is planned there."""
        self.now = name
        print("reached", name)
        for place, delay_s in self.plan:
            if place == name and delay_s:
                self.timers.append(threading.Timer(float(delay_s), os.kill, (os.getpid(), signal.SIGUSR1)))
                self.timers[-1].start()
            elif place == name:
                os.kill(os.getpid(), signal.SIGUSR1)
                self.signalled = True

    def visit(self, name, call):
        """Reach a place, and make the call in which the stop may fall."""
        if self.signalled:  # where the epoch before ended, which is no call of the script's
            self.wait_until_decided()
        self.reach(name)
        call()
        if self.signalled:
            self.wait_until_decided()

    def wait_until_decided(self):
        """Wait until all ranks have answered this one's wish, and it is decided where they stop: none is further than this place."""
        self.signalled, deadline = False, time.monotonic() + DECIDED_TIMEOUT_S
        while self.is_exact and self.run.world_size > 1 and AGREEMENTS[0]._member.round == 0:
            assert time.monotonic() < deadline, "the ranks do not agree"
            time.sleep(0.0005)

    def end(self):
        """Let no signal come behind the run, which does not latch it any more."""
        for timer in self.timers:
            timer.cancel()
            timer.join()


def draw():
    """Draw from each generator, as an evaluation may."""
    return torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002 - as above


def evaluate(run, work, places, epoch):
    """Return a loss over noise, of all ranks together."""
    work.evaluated.eval()
    total = torch.zeros(())
    for part in range(2):
        _, x, y = default_collate([work.dataset[index] for index in range(4)])
        with torch.no_grad():
            mine = work.loss(work.evaluated(x), y) * draw()
        if run.world_size > 1:
            dist.all_reduce(mine)
        total += mine
        places.visit(f"evaluation {epoch}.{part}", run.poll)
    work.evaluated.train()
    return total


def train(run, work, places):
    """Be the training script."""
    loader = run.loader(
        work.dataset, work.batch_size, shuffle=True, drop_last=bool(run.args.get("drop_last", False)), **work.loader_arguments
    )
    counter, is_first_batch = Counter(), True
    run.track(**work.tracked, counter=counter)
    with Path(run.run_dir, f"ids.{run.rank}").open("a") as noted:
        for epoch in run.epochs(int(run.args.get("epochs", 2))):
            draw()
            places.visit(f"begin {epoch}", run.poll)
            trained_on = []
            for ids, x, y in run.batches(loader):
                if is_first_batch and run.args.get("inexact") == "seeds anew":
                    torch.manual_seed(counter.steps)
                is_first_batch = False
                trained_on += ids.tolist()
                number = counter.batches % len(loader)  # of this epoch, from 0
                counter.batches += 1
                in_step, is_last = number % work.per_step, number + 1 == len(loader)
                steps_now = is_last or in_step + 1 == work.per_step
                with nullcontext() if steps_now else work.model.no_sync():
                    loss = work.loss(work.model(x), y)
                    (loss / (1 if is_last and in_step == 0 else work.per_step)).backward()
                if not steps_now:
                    continue
                work.optimizer.step()
                work.optimizer.zero_grad()
                rate = work.optimizer.param_groups[0]["lr"]
                work.after_step()
                run.log(loss=loss.detach(), rate=rate)
                counter.steps += 1
                print(epoch, counter.steps, *trained_on, file=noted, flush=True)
                trained_on = []
                places.visit(f"step {counter.steps}", run.step)
            work.after_epoch()
            run.report(loss=evaluate(run, work, places, epoch), drawn=draw())
            places.reach(f"end {epoch}")


def main(run):
    """Train one of the workloads; unless args.samples says otherwise, the last of an epoch's global batches has one sample."""
    kind = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}[run.args.workload]
    full = run.world_size * kind.batch_size
    places = Places(run)
    try:
        train(run, kind(run, int(run.args.get("samples", full * (kind.batches - 1) + 1))), places)
    except SystemExit:
        print("stopped at", places.now)
        raise
    finally:
        places.end()


if __name__ == "__main__":
    with hpcckpt.Run.from_environment(sys.argv[1], sys.argv[2:]) as the_run:
        main(the_run)
