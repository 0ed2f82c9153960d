"""Every shape of loop that a stop can fall into. One rank; `python loops.py RUN_DIR args.shape=… [key=value …]`

Each call of Run in which a stop can fall is a place, and has a name; <run_dir>/places lists them. HPCCKPT_TEST_STOPS and
HPCCKPT_TEST_KILLS ("step 3|poll 1.7") have the rank signal itself, or be killed, there: each once a run. HPCCKPT_TEST_RANK says
which rank that is. What was trained on at each step goes to <run_dir>/trace.<rank>.
"""

import copy
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

import hpcckpt


class Trace:
    """Counts places where a signal may come, and notes what was trained on."""

    def __init__(self, run):
        self.run, self.folder = run, Path(run.run_dir)
        self.asked = os.environ.get("HPCCKPT_TEST_RANK", "0") == str(run.rank)

    def here(self, name):
        self.note("places", name)
        for plan, number in (("STOPS", signal.SIGUSR1), ("KILLS", signal.SIGKILL)):
            mark = self.folder / f"{plan} {name}"
            if self.asked and name in os.environ.get(f"HPCCKPT_TEST_{plan}", "").split("|") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), number)

    def note(self, file, *words):
        with (self.folder / f"{file}.{self.run.rank}").open("a") as lines:
            print(*words, file=lines)


class Counter:
    """An object of the script's own that is saved and restored."""

    def __init__(self):
        self.count, self.best = 0, float("inf")

    def state_dict(self):
        return {"count": self.count, "best": self.best}

    def load_state_dict(self, state):
        self.count, self.best = state["count"], state["best"]


class Stream(IterableDataset):
    """Numbers that know where they are."""

    def __init__(self, first, size):
        self.first, self.size, self.place, self.resumed_at = first, size, 0, 0

    def __iter__(self):
        self.place, self.resumed_at = self.resumed_at, 0
        while self.place < self.size:
            self.place += 1
            yield (torch.tensor([float(self.first + self.place - 1)]),)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.resumed_at = state["place"]


def numbers(first, size):
    return TensorDataset(torch.arange(float(first), float(first + size)).unsqueeze(1))


class Training:
    """What all shapes have in common; some have a model of their own."""

    def __init__(self, run):
        self.run, self.trace = run, Trace(run)
        self.model = self.wrapped(nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.3), nn.Linear(3, 1)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.train = self.train_loader()
        self.other = run.loader(numbers(100, 6), 2, shuffle=True)
        self.held_out = run.loader(numbers(1000, 8), 2)
        self.polls = self.batches = 0
        run.track(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, **self.more())

    def wrapped(self, model):
        return DistributedDataParallel(model) if self.run.world_size > 1 else model

    def more(self):
        """Return what is tracked besides."""
        return {}

    def train_loader(self):
        return self.run.loader(numbers(0, 12), 2, shuffle=True)

    def loss(self, *batches):
        return sum(self.model(x / 1000).square().sum() for x in batches)

    def step(self, kind, *batches, backward=True):
        """Make a step, and say so."""
        if backward:
            loss = self.loss(*batches)
            loss.backward()
            self.run.log(loss=loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trace.note("trace", self.run.global_step + 1, kind, self.epoch, *(int(x) for batch in batches for x in batch.flatten()))
        self.trace.here(f"step {self.run.global_step + 1}")
        self.run.step()

    def poll(self):
        """Give a stop its chance; named by how many steps and polls came before in this epoch."""
        self.polls += 1
        self.trace.here(f"poll {self.epoch}.{self.polls}")
        self.run.poll()

    def evaluate(self, loader=None):
        seen = []
        for (x,) in self.run.batches(loader or self.held_out):
            seen += x.flatten().tolist()
            torch.rand(1)
            self.poll()
        self.run.log(within=len(seen))
        self.run.report(seen=len(seen), total=sum(seen), drawn=float(torch.rand(1)))

    def one_loop(self, kind="train", loader=None):
        for (x,) in self.run.batches(loader or self.train):
            self.step(kind, x)

    def before(self):
        """Do what comes before the loop over epochs."""

    def body(self):
        """Be an epoch."""
        self.one_loop()

    def go(self):
        self.before()
        for epoch in self.run.epochs(int(self.run.args.get("epochs", 3))):
            self.epoch, self.polls = epoch, 0
            torch.rand(1)
            self.body()
            self.scheduler.step()
            self.polls = 100
            self.poll()


class Plain(Training):
    pass


class PollFirst(Training):
    def body(self):
        self.poll()
        self.poll()
        self.one_loop()


class WarmUp(Training):
    def before(self):
        for number in range(3):
            self.trace.here(f"warm-up {number}")
            self.run.poll()
            self.run.poll()


class Evaluate(Training):
    def body(self):
        self.one_loop()
        self.scheduler.step()
        self.evaluate()


class EvaluateFirst(Training):
    def body(self):
        self.evaluate()
        self.one_loop()
        self.evaluate()


class TwoLoaders(Training):
    def body(self):
        self.one_loop()
        self.scheduler.step()
        self.run.report(between=float(torch.rand(1)))
        self.poll()
        self.one_loop("other", self.other)
        self.run.report(behind=float(torch.rand(1)))


class Alternating(Training):
    """Two loaders by turns, each twice; an evaluation between."""

    def body(self):
        self.one_loop("other", self.other)
        self.one_loop()
        self.evaluate()
        self.one_loop("other", self.other)
        self.scheduler.step()
        self.one_loop()


class Accumulate(Training):
    def body(self):
        so_far = []
        for (x,) in self.run.batches(self.train):
            self.poll()
            self.loss(x).backward()
            so_far.append(x)
            if len(so_far) == 2:
                self.step("train", *so_far, backward=False)
                so_far = []
        self.evaluate()


class Break(Training):
    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("train", x)
            if self.run.global_step % 6 == 4:
                break
        self.evaluate()


class BreakAndAgain(Training):
    """A loop that is left behind a step, then a whole one over the same loader."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("a part", x)
            if self.run.global_step % 8 == 2:
                break
        self.poll()
        self.one_loop()


class BreakBeforeTheStep(Training):
    """A batch was handed out and not trained on."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            if self.run.global_step % 4 == 3 and self.run.global_step // 4 == self.epoch:
                break
            self.step("train", x)
        self.poll()
        self.step_of_other()
        self.evaluate()

    def step_of_other(self):
        for (x,) in self.run.batches(self.other):
            self.step("other", x)
            break


class Twice(Training):
    def body(self):
        self.one_loop("first")
        torch.rand(1)
        self.evaluate()
        self.scheduler.step()
        self.one_loop("second")
        self.evaluate()


class OwnEvaluation(Training):
    """The loader that is trained on is evaluated on, too, before and behind."""

    def body(self):
        self.evaluate(self.train)
        self.one_loop()
        self.evaluate(self.train)
        self.scheduler.step()
        self.one_loop("again")
        self.evaluate(self.train)


class Zip(Training):
    order = ("train", "other")

    def body(self):
        first, second = (getattr(self, name) for name in self.order)
        for (x,), (y,) in zip(self.run.batches(first), self.run.batches(second), strict=False):
            self.step("both", x, y)
        self.evaluate()


class ZipOther(Zip):
    order = ("other", "train")


class Cycle(Training):
    """The other loader begins anew within an epoch when it is exhausted."""

    def body(self):
        target = iter(self.run.batches(self.other))
        for (x,) in self.run.batches(self.train):
            try:
                (y,) = next(target)
            except StopIteration:
                target = iter(self.run.batches(self.other))
                (y,) = next(target)
            self.step("both", x, y)
        self.evaluate()


class CycleKept(Training):
    """As above; the iterator is still there when the next epoch begins."""

    def body(self):
        self.target = iter(self.run.batches(self.other))
        for (x,) in self.run.batches(self.train):
            try:
                (y,) = next(self.target)
            except StopIteration:
                self.target = iter(self.run.batches(self.other))
                (y,) = next(self.target)
            self.step("both", x, y)
            if self.run.global_step % 5 == 0:
                break
        self.evaluate()


class Endless(Training):
    """The other loader goes on over the ends of epochs."""

    def before(self):
        def endless():
            while True:
                yield from self.run.batches(self.other)

        self.target = endless()

    def body(self):
        for (x,) in self.run.batches(self.train):
            (y,) = next(self.target)
            self.step("both", x, y)
            if self.run.global_step % 5 == 0:
                break


class Nested(Training):
    """For each batch of one loader a whole loop over another."""

    def body(self):
        for (x,) in self.run.batches(self.other):
            for (y,) in self.run.batches(self.train):
                self.step("both", x, y)


class NestedBehind(Training):
    """A step, and a whole loop over another loader, left early in every other epoch; then one behind."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("outer", x)
            for (y,) in self.run.batches(self.other):
                self.step("inner", y)
                if self.epoch == 1:
                    break
            self.scheduler.step()
        self.one_loop("other", self.other)
        self.evaluate()


class Turns(Training):
    """Two networks that learn by turns, each from a loader of its own; the second one's begins anew, and is kept."""

    def body(self):
        others = self.run.batches(self.other)
        for (x,) in self.run.batches(self.train):
            self.step("first", x)
            for _ in range(2):
                other = next(others, None)
                if other is None:
                    others = self.run.batches(self.other)
                    other = next(others)
                self.step("second", *other)
        self.evaluate()


class EpochDraw(Training):
    """Where an epoch begins it is drawn how its batches are scaled, and which loader comes first (each rank draws for itself)."""

    def body(self):
        scale = float(torch.rand(1))
        for number in torch.randperm(2).tolist() if self.run.world_size == 1 else (0, 1):
            for (x,) in self.run.batches((self.train, self.other)[number]):
                self.step(f"loader {number}", x * (1 + scale))


class ByStep(Training):
    """The loader, and where its loop is left, depend on the step at which the epoch began."""

    def body(self):
        start = self.run.global_step
        self.poll()
        for (x,) in self.run.batches(self.train if start < 4 else self.other):
            self.step("a part", x)
            if self.run.global_step - start >= 4:
                break
        self.evaluate()


class LoaderEachEpoch(Training):
    """A loader that is made anew in each epoch."""

    def body(self):
        loader = self.run.loader(numbers(0, 12), 2, shuffle=True)
        self.poll()
        for (x,) in self.run.batches(loader):
            self.step("new", x)
        self.one_loop()


class Missed(Training):
    """The loader depends on something that is not the same after a restart."""

    def body(self):
        for (x,) in self.run.batches(self.other if self.run.restart_count else self.train):
            self.step("either", x)


class InAThread(Training):
    """Batches are fetched ahead by a thread."""

    def body(self):
        failures = []

        def fetch():
            try:
                next(self.run.batches(self.train))
            except hpcckpt.errors.UsageError as error:
                failures.append(error)

        thread = threading.Thread(target=fetch)
        thread.start()
        thread.join()
        raise failures[0]


class LeftOverBreak(Training):
    """The same, where the loop is left within an accumulation."""

    def body(self):
        for number, (x,) in self.run.enumerate(self.train):
            self.loss(x).backward()
            if number % 2:
                self.step("accumulated", x, backward=False)
            if number == 4:
                break


class EvaluateWithin(Training):
    """An evaluation in the middle of the loop, behind every third step."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("train", x)
            if self.run.global_step % 3 == 0:
                self.evaluate()


class EvaluateWithinQuiet(EvaluateWithin):
    """The same, where no stop can fall in it."""

    def poll(self):
        if self.polls >= 100:
            super().poll()
        self.polls += 1


class SwapWithin(Training):
    """Average weights in the model's place for an evaluation in the loop's body."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("train", x)
            if self.run.global_step % 2 == 0:
                kept = copy.deepcopy(self.model.state_dict())
                self.model.load_state_dict({name: torch.full_like(value, 777.0) for name, value in kept.items()})
                self.poll()
                self.evaluate()
                self.model.load_state_dict(kept)
                self.scheduler.step()


class EvaluateAndBreak(Training):
    """An evaluation in the body, a scheduler's step, a draw, and a break; and polls behind it."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("train", x)
            if self.run.global_step % 3 == 0:
                self.evaluate()
                self.scheduler.step()
                torch.rand(1)
                break
        self.poll()
        self.evaluate()


class Kept(Training):
    """A loop whose iterator is kept in a variable, as a bar of progress is, and which is left by a break."""

    def body(self):
        self.bar = self.run.batches(self.train)
        for (x,) in self.bar:
            self.step("train", x)
            if self.run.global_step % 3 == 0:
                break
        self.scheduler.step()
        self.poll()
        self.evaluate()


class KeptLate(Training):
    """The same, where the former epoch's iterator goes only in the midst of the next loop."""

    def body(self):
        bar = self.run.batches(self.train)
        for (x,) in bar:
            self.step("train", x)
            self.bar = bar  # the one of the epoch before is finalized now
            if self.run.global_step % 6 == 4:
                break


class LeftOver(Training):
    """Gradients of the last batch that go into the next epoch's first step."""

    def body(self):
        for number, (x,) in self.run.enumerate(self.train):
            self.loss(x).backward()
            if number % 4 == 3:
                self.step("accumulated", x, backward=False)


class Numbered(Training):
    """A rate that depends on how many batches of the epoch came before."""

    def body(self):
        for number, (x,) in self.run.enumerate(self.train):
            self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            self.step("train", x)


class EvaluateBeforeStep(Training):
    """An evaluation between a batch and its step."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            if self.run.global_step % 3 == 0:
                self.evaluate()
            self.step("train", x)


class TwoSteps(Training):
    """Two steps a batch, as where two networks train each other."""

    def body(self):
        for (x,) in self.run.batches(self.train):
            self.step("first", x)
            self.step("second", x)


class Outside(Training):
    """Steps that belong to no loop over a loader, in front of one."""

    def body(self):
        for number in range(3):
            self.step("outside", torch.tensor([[float(number)]]))
        self.one_loop()


class OutsideBehind(Training):
    def body(self):
        self.one_loop()
        while self.run.global_step < (self.epoch + 1) * 9:
            self.step("outside", torch.tensor([[float(self.run.global_step)]]))


class Sampler(Evaluate):
    def train_loader(self):
        return self.run.loader(numbers(0, 12), 2, sampler=WeightedRandomSampler(torch.arange(1.0, 13.0), 12))


class Batches(Evaluate):
    def train_loader(self):
        return self.run.loader(numbers(0, 12), batch_sampler=BatchSampler(RandomSampler(range(12)), 2, drop_last=False))


class Iterable(Alternating):
    def train_loader(self):
        return self.run.loader(Stream(20 * self.run.rank, 7), 2)


class IterableTwice(Twice):
    def train_loader(self):
        return self.run.loader(Stream(20 * self.run.rank, 7), 2)


class IterableBreak(BreakAndAgain):
    def train_loader(self):
        return self.run.loader(Stream(20 * self.run.rank, 12), 2)


class Average(Training):
    """Weights averaged once an epoch behind the loop, and an evaluation of the average."""

    def more(self):
        self.average = AveragedModel(getattr(self.model, "module", self.model))
        return {"average": self.average}

    def update(self):
        self.average.update_parameters(getattr(self.model, "module", self.model))

    def body(self):
        self.one_loop()
        self.poll()
        self.update()
        self.evaluate()


class AverageOnMain(Average):
    def update(self):
        if self.run.is_main:
            super().update()


class AverageByHand(Average):
    """As many scripts have it; torch does not count what is written through `.data`."""

    def more(self):
        self.average = copy.deepcopy(getattr(self.model, "module", self.model))
        return {"average": self.average}

    def update(self):
        for own, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
            own.data.mul_(0.9).add_(parameter.data, alpha=0.1)


class AverageFirst(Average):
    """Averaged where the epoch begins."""

    def body(self):
        self.update()
        self.poll()
        self.one_loop()
        self.poll()


class Normalized(Training):
    """BatchNorm, whose statistics an evaluation leaves alone."""

    def wrapped(self, model):
        return super().wrapped(nn.Sequential(nn.BatchNorm1d(1), model))

    def loss(self, *batches):
        return sum(self.model(x / 1000 + torch.randn_like(x)).square().sum() for x in batches)

    def body(self):
        self.one_loop()
        self.model.eval()
        for (x,) in self.run.batches(self.held_out):
            with torch.no_grad():
                self.model(x)
            self.poll()
        self.model.train()


class NormalizedBreak(Normalized):
    """The loop is left by a break, and the evaluation goes around DDP, where each rank uses the statistics that it has."""

    def body(self):
        self.some_steps()
        for number, _ in self.run.enumerate(self.held_out):
            self.evaluate_around(number)
            self.poll()

    def some_steps(self):
        for (x,) in self.run.batches(self.train):
            self.step("train", x)
            if self.run.global_step % 2 == 0:
                break

    def evaluate_around(self, number):
        own = getattr(self.model, "module", self.model)
        own.eval()
        with torch.no_grad():
            seen = own(torch.linspace(-1, 1, 4).unsqueeze(1))
        self.trace.note("evaluated", self.epoch, number, *(value.hex() for value in seen.flatten().tolist()))
        own.train()


class NormalizedFirst(NormalizedBreak):
    """Such an evaluation where an epoch begins, with no poll before."""

    def body(self):
        self.evaluate_around(0)
        self.some_steps()

    def poll(self):
        """Leave it to the end of the epoch to have rank 0's statistics everywhere."""


class NormalizedKept(NormalizedFirst):
    """The loop's iterator is kept in a variable over the end of the epoch."""

    def some_steps(self):
        self.bar = self.run.batches(self.train)
        for (x,) in self.bar:
            self.step("train", x)
            if self.run.global_step % 2 == 0:
                break


class NormalizedOutside(NormalizedFirst):
    """Steps that belong to no loop over a loader, each rank with numbers of its own."""

    def some_steps(self):
        for _ in range(2):
            self.step("outside", torch.randint(100, (2, 1)).float())


class NormalizedAverage(Normalized):
    """An average whose statistics are made anew behind each epoch."""

    def more(self):
        self.average = AveragedModel(getattr(self.model, "module", self.model))
        return {"average": self.average}

    def body(self):
        super().body()
        self.average.update_parameters(getattr(self.model, "module", self.model))
        for (x,) in self.run.batches(self.held_out):
            with torch.no_grad():
                self.average(x)
            self.poll()


class Leaving(Training):
    """Leaves the loop over epochs behind a step, with `return`."""

    def more(self):
        self.patience = Counter()
        return {"patience": self.patience}

    def go(self):
        self.before()
        for epoch in self.run.epochs(int(self.run.args.get("epochs", 3))):
            self.epoch, self.polls = epoch, 0
            self.run.report(begun=float(torch.rand(1)))
            for (x,) in self.run.batches(self.train):
                self.step("train", x)
                if self.run.global_step >= self.run.args.get("max_steps", 1000):
                    return
            self.scheduler.step()
            if self.is_enough():
                break
        self.behind()

    def is_enough(self):
        self.evaluate()
        return False

    def behind(self):
        """Do what comes behind the loop over epochs."""


class EarlyStop(Leaving):
    """Leaves it with `break` behind an evaluation; what counts patience is tracked."""

    def is_enough(self):
        self.evaluate()
        self.patience.count += 1
        self.poll()
        return self.patience.count > self.run.args.get("patience", 1000)


class LoadsTheBest(EarlyStop):
    """Other weights than the last ones are tested behind the loop."""

    def behind(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        self.model.eval()


class LeavesOnAFullDisk(EarlyStop):
    """Leaves it where nothing larger than the ledger can be written any more."""

    def behind(self):
        if self.run.args.get("full") and self.run.is_main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))


class BreakFirst(Leaving):
    """Leaves it before any step of its second epoch."""

    def go(self):
        for epoch in self.run.epochs(3):
            self.epoch, self.polls = epoch, 0
            torch.rand(1)
            if epoch == 1 and self.run.args.get("leaves"):
                break
            self.one_loop()


class BreakBetween(Leaving):
    """Leaves it between a batch and its step: gradients are there, or a forward pass has counted."""

    def go(self):
        for epoch in self.run.epochs(3):
            self.epoch, self.polls = epoch, 0
            for (x,) in self.run.batches(self.train):
                if self.run.global_step == 8 and self.run.args.get("leaves"):
                    return
                self.step("train", x)
            self.evaluate()


class Raises(Leaving):
    """Fails behind its eighth step, or is interrupted; it may be caught inside of main."""

    def go(self):
        try:
            super().go()
        except (ZeroDivisionError, KeyboardInterrupt):
            if self.run.args.get("caught"):
                return
            raise

    def step(self, kind, *batches):
        super().step(kind, *batches)
        if self.run.global_step == 8 and self.run.args.get("leaves"):
            raise {"fails": ZeroDivisionError, "interrupted": KeyboardInterrupt}[self.run.args.leaves]


class OneCycle(Training):
    """A schedule that was made from the number of batches, before the loop over epochs."""

    def more(self):
        self.rates = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(self.rates, 0.1, total_steps=3 * len(self.train) + 1)
        return {"rates": self.rates, "cycle": self.cycle}

    def step(self, kind, *batches):
        self.run.log(rate=self.rates.param_groups[0]["lr"], steps=len(self.train))
        self.rates.step()
        self.cycle.step()
        super().step(kind, *batches)


SHAPES = {
    shape.__name__: shape
    for shape in globals().values()
    if isinstance(shape, type) and issubclass(shape, Training) and shape is not Training
}


def main(run):
    SHAPES[run.args.shape](run).go()


def main_with_finally(arguments):
    """Be a script without a context manager."""
    run = hpcckpt.Run.from_environment(arguments[0], arguments[1:])
    try:
        main(run)
    finally:
        run.close()
        run.close()


def main_with_except(arguments):
    """Be a script that closes where it has caught an error of the training."""
    run = hpcckpt.Run.from_environment(arguments[0], arguments[1:])
    try:
        main(run)
    except BaseException:
        run.close()
        raise
    run.close()


def main_behind_an_error(arguments):
    """Be a script that makes its Run, and closes it, where it has caught an error that has nothing to do with it."""
    try:
        {}["a cache that is not there yet"]
    except KeyError:
        main_with_finally(arguments)


def main_with_context(arguments):
    """Be a script as it should be."""
    with hpcckpt.Run.from_environment(arguments[0], arguments[1:]) as run:
        main(run)


CLOSINGS = {"with": main_with_context, "finally": main_with_finally, "except": main_with_except, "behind": main_behind_an_error}


if __name__ == "__main__":
    CLOSINGS[next((word.partition("=")[2] for word in sys.argv if word.startswith("args.closing=")), "with")](sys.argv[1:])
