"""`Run`: all that a training script sees.

Three places matter, the same on every rank: `run.epochs` restores before the first epoch and saves at the end of each,
`run.batches` goes on behind the last batch that was trained on, and `run.step` (the last statement of the loop's body)
is where a save or a stop can happen.
"""

import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset

from hpcckpt import config as configuration
from hpcckpt import policy, requeue
from hpcckpt.checkpoint import Boundary, Checkpointer, Position, Restored, plain_metrics
from hpcckpt.config import RunConfig
from hpcckpt.data import Cursor, Loops, make_loader
from hpcckpt.distributed import Agreement, Ranks, choose_device, fix_bucket_order
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import ConfigError, UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.progress import INTERVAL_S, Progress
from hpcckpt.signals import SignalLatch, children_protected
from hpcckpt.state.rng import seed_all
from hpcckpt.state.tracked import Tracked
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory
from hpcckpt.store.ledger import Ledger
from hpcckpt.store.metrics import MetricsFile

T = TypeVar("T")


class Run:
    """One rank's view of a run. Made by the launcher, or by `Run.from_environment`; a context manager.

    Attributes:
        rank, local_rank, node_rank, world_size: this process's place, as PyTorch names it.
        device: this rank's device, cuda:N or cpu.
        args: the user's own configuration (`args:`); `run.args.lr`.
        run_dir: everything about the run is in it.
        restart_count: how often this job was started anew; 0 the first time.
        is_main: whether this is rank 0.
    """

    def __init__(self, layout: RunLayout, config: RunConfig, task: TaskEnvironment, latch: SignalLatch | None = None) -> None:
        """Connect to the other ranks. Every rank must call it, from its main thread.

        Raises:
            RendezvousError: the ranks did not find each other.
            RunDirectoryError: the run directory cannot be used; raised on every rank.
        """
        self.rank, self.local_rank, self.node_rank = task.rank, task.local_rank, task.node_rank
        self.world_size = task.world_size
        self.run_dir = layout.root
        self.args: DictConfig = OmegaConf.create(config.args)
        OmegaConf.set_struct(self.args, True)  # a misspelled name raises, instead of being None
        self._layout, self._config, self._task = layout, config, task
        if "OMP_NUM_THREADS" not in os.environ:
            # The same number on every node and attempt: it decides the order of sums on the CPU.
            torch.set_num_threads(config.slurm.cpus_per_task)
        # Before the ranks meet, which takes time, and again behind it: NCCL has handlers of its own.
        self._latch = latch or SignalLatch((config.requeue.signal, "TERM"))
        self._owns_latch = latch is None
        self._latch.install()
        self.device = choose_device(task)
        self._ranks = Ranks(task, self.device)
        self._latch.install()
        self.is_main = self._ranks.is_main
        self._ledger = Ledger(layout.events)
        self._metrics_file = MetricsFile(layout.metrics)
        self._store = CheckpointStore.configured(layout, config.checkpoint)
        self.restart_count = self._ranks.from_main(self._begin_attempt)
        self._agreement = Agreement(self._ranks.store, task.rank, task.world_size)
        self._tracked = Tracked()
        self._checkpointer = Checkpointer(self._ranks, layout, self._store, self._ledger, self._tracked, config.seed)
        self._loops = Loops()
        self._restored: Restored | None = None
        self._epoch = 0
        self._step = 0
        self._metrics: dict[str, float] = {}
        # Taken where an epoch begins and where its batches end, for as long as no step follows.
        self._boundary: Boundary | None = None
        self._finished = False
        self._progress = Progress(0)
        self._next_report = 0.0
        self._next_save = self._save_deadline()
        # The same initial weights on every rank and attempt.
        seed_all(config.seed)

    @classmethod
    def from_environment(cls, run_dir: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Self:
        """Return a Run for a script that was started by srun, torchrun or by hand, without `hpcckpt submit`.

        Every rank must call it, from its main thread. The configuration is `<run_dir>/config.yaml` where there is one, with
        `overrides` ("checkpoint.every_steps=100") over it. Use it as a context manager, or call `close` at the end.

        Raises:
            ConfigError, TaskEnvironmentError, RunDirectoryError, RendezvousError.
        """
        layout = RunLayout(Path(run_dir).absolute())
        text = layout.config.read_text(encoding="utf-8") if layout.config.is_file() else "entrypoint: __main__:main"
        merged = configuration.parse(text, list(overrides), where=str(layout.config), default_name=layout.root.name)
        config = configuration.resolve(merged)
        if not resume.is_default(config.resume):
            # Read again at each start, it would be obeyed again at each.
            raise ConfigError(
                f"{layout.config}: resume.* is carried out once, by `python -m hpcckpt.submit`; a script of one's own goes on from the "
                "newest checkpoint"
            )
        return cls(layout, config, TaskEnvironment.from_environ(os.environ))

    def track(self, **objects: Any) -> None:
        """Have objects saved and restored under these names: models, optimizers, schedulers, anything with
        state_dict and load_state_dict. Every rank must call it, with the same names, before `epochs`.

        Raises:
            UsageError: too late, a name is taken, or an object has no state.
            CheckpointSaveError: an object's state could not be loaded back.
        """
        if self._restored is not None:
            raise UsageError("run.track: the checkpoint is already restored; call it before run.epochs")
        for name, value in objects.items():
            self._tracked.add(name, value)
            if isinstance(value, torch.nn.Module):
                fix_bucket_order(value)

    def loader(
        self, dataset: Dataset[T], batch_size: int = 1, shuffle: bool = False, drop_last: bool = False, **arguments: Any
    ) -> "DataLoader[T]":
        """Return a DataLoader over this rank's share; iterate over it with `batches`. Every rank must call it.

        `batch_size` is per rank; further arguments are DataLoader's. Over all ranks each sample comes once an epoch.

        Raises:
            UsageError: the dataset has no length, or an argument would replace the resumable order.
        """
        number = len(self._loops)
        loader = make_loader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=self.rank,
            world_size=self.world_size,
            seed=self._config.seed,
            number=number,
            **arguments,
        )
        self._loops.add(cast(Cursor, loader.batch_sampler))
        return loader

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs that are left of 0 … total-1; restore before the first, save at the end of each.

        Every rank must iterate over it, once.

        Raises:
            UsageError: nothing is tracked, or called twice.
            CheckpointCorruptError, CheckpointMismatchError, CheckpointSaveError: on every rank.
        """
        self._restore()
        self._progress = Progress(total)
        while self._epoch < total:
            self._boundary = self._checkpointer.boundary()
            yield self._epoch
            self._end_epoch(is_last=self._epoch + 1 >= total)
            self._metrics = {}
        self._finished = True

    def batches(self, loader: "DataLoader[T]") -> Iterator[T]:
        """Yield the batches of this epoch that were not trained on yet. Every rank must iterate over it.

        Behind a stop at the last step of an epoch, or in its evaluation, none are left: what follows the loop must not need
        a variable that only the loop sets.

        Raises:
            UsageError: the loader was not made by `run.loader`, or there is no epoch yet.
        """
        cursor = loader.batch_sampler
        if not isinstance(cursor, Cursor):
            raise UsageError("run.batches: this DataLoader was not made by run.loader, so its position is unknown; make it with run.loader")
        if self._restored is None:
            raise UsageError("run.batches: call it inside of `for epoch in run.epochs(…)`")
        if self._loops.begin(cursor, self._epoch):
            self._restored.put_back()
        try:
            # Slurm signals every process of the job; workers would die of it.
            with children_protected((self._config.requeue.signal, "TERM")):
                iterator = iter(loader)
            for batch in iterator:
                cursor.advance()
                yield batch
        finally:  # a break ends it too
            self._loops.end(cursor)
            if self._boundary is None:
                self._boundary = self._checkpointer.boundary()

    def step(self) -> None:
        """Say that one optimizer step is done; the last statement of the loop's body. Every rank must call it.

        May save, or save and leave by SystemExit. Costs microseconds otherwise.

        Raises:
            UsageError: outside of `run.epochs`.
            CheckpointSaveError, FencedError, AgreementError: on every rank.
        """
        if self._restored is None or self._finished:
            raise UsageError("run.step: call it inside of `for epoch in run.epochs(…)`")
        self._step += 1
        self._boundary = None
        self._loops.step()
        due = policy.is_step_due(self._step, self._config.checkpoint.every_steps)
        self._act(Position(self._epoch, self._step, epoch_finished=False), due="every_steps" if due else None)

    def poll(self) -> None:
        """Give a stop the chance to happen in a long loop without training steps. Every rank must call it equally often.

        A stop here saves the state behind the last training step; an evaluation begins again after the restart. Between a
        batch and its `step` nothing happens: what was done with that batch is not counted yet.
        """
        if not self._finished and self._loops.is_between_batches:
            self._act(Position(self._epoch, self._step, epoch_finished=False))

    def log(self, **values: Any) -> None:
        """Record values of the step in progress (numbers or one-element tensors) in metrics.jsonl; rank 0's count.

        Call it before `step`. Nothing is written or waited for here.

        Raises:
            UsageError: a value is no number, or more than one.
        """
        for name, value in values.items():
            if not isinstance(value, int | float | str) and math.prod(getattr(value, "shape", (0,))) != 1:
                raise UsageError(f"run.log({name}=…): a {type(value).__name__} is no number, or more than one; log its mean, say")
        if self.is_main:
            self._metrics_file.add("log", self._epoch, self._step + 1, values)

    def report(self, **metrics: Any) -> None:
        """Record metrics of this epoch: in metrics.jsonl and in its checkpoint, where `checkpoint.monitor` looks; rank 0's count.

        Raises:
            UsageError: one is no number, or more than one.
        """
        plain = plain_metrics(metrics)
        self._metrics.update(plain)
        if self.is_main:
            self._metrics_file.add("report", self._epoch, self._step, plain)
            self._report_progress()

    def close(self) -> None:
        """Leave the other ranks in order; harmless when called twice. Every rank must call it."""
        self._disconnect()
        if self.is_main:  # behind the barrier: now all ranks are through
            self._metrics_file.flush()
            self._ledger.append("finished" if self._finished else "left", epoch=self._epoch, step=self._step)
            self._store.release()
        self._restore_signals()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            # The other ranks learn of it from their next collective: this process ends, and with it its connections.
            self._ledger.append("failed", rank=self.rank, step=self._step, error=f"{type(error).__name__}: {error}")
            if self.is_main:
                with suppress(OSError):
                    self._metrics_file.flush()
            self._agreement.close(timeout_s=1)
            self._store.release()
            if self.world_size == 1:  # nobody to wait for, and a notebook may go on in this process
                self._ranks.close()
            self._restore_signals()

    def _begin_attempt(self) -> int:
        """Claim the run directory and write the ledger's first line of this attempt; returns restart_count. Rank 0."""
        make_private_directory(self.run_dir)
        generation = self._store.claim(self._task.job_id, self._task.incarnation)
        restart_count = self._task.restart_count
        if restart_count is None:
            attempts = [event for event in self._ledger.events() if event["event"] == "attempt"]
            restart_count = sum(event.get("job_id") == self._task.job_id for event in attempts)
        self._ledger.append(
            "attempt",
            generation=generation,
            job_id=self._task.job_id,
            restart_count=restart_count,
            world_size=self.world_size,
            num_nodes=self._task.num_nodes,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self.device),
        )
        return restart_count

    def _restore(self) -> None:
        if self._restored is not None:
            raise UsageError("run.epochs: it was called before; a run has one loop over epochs")
        if not self._tracked:
            raise UsageError("run.epochs: nothing is tracked, so nothing would be saved; call run.track(model=…, optimizer=…) before")
        self._restored = restored = self._checkpointer.restore()
        if restored.position is not None:
            self._step = restored.position.step
            self._epoch = restored.position.epoch + restored.position.epoch_finished
            if not restored.position.epoch_finished:
                self._metrics = dict(restored.metrics)
                self._loops.restore(self._epoch, restored.loaders, restored.last_loader)
        if self.is_main:
            self._metrics_file.cut_back(self._step, self._epoch)
            file = None if restored.path is None else restored.path.name
            self._ledger.append("restored", file=file, epoch=self._epoch, step=self._step, notes=restored.notes)
            whence = "from the beginning" if restored.path is None else f"behind {restored.position or 'the weights'} of {restored.path}"
            print(
                f"hpcckpt: attempt {self.restart_count + 1} of job {self._task.job_id}, {self.world_size} ranks: goes on {whence}",
                flush=True,
            )
            for note in restored.notes:
                print(f"hpcckpt: note: {note}", flush=True)
        self._next_save = self._save_deadline()
        restored.put_back()

    def _end_epoch(self, *, is_last: bool) -> None:
        self._boundary = None
        self._loops.end_epoch()
        position = Position(self._epoch, self._step, epoch_finished=True)
        if policy.is_epoch_due(self._epoch, self._config.checkpoint.every_epochs, is_last=is_last):
            self._save(position, "every_epochs")
        if not is_last:
            self._act(position)
        self._epoch += 1

    def _act(self, position: Position, due: Literal["every_steps"] | None = None) -> None:
        """Count a tick of the agreement and do what all ranks have to do now, if anything."""
        if self._latch.fired:
            self._agreement.wish("stop")
        elif self._next_save is not None and time.monotonic() >= self._next_save:
            self._agreement.wish("save")
        wish = self._agreement.tick()
        if wish == "stop":
            self._stop(position)
        elif self._restored is not None and (wish == "save" or due is not None):
            self._save(position, due or "every_minutes")
        elif self.is_main and time.monotonic() >= self._next_report:
            self._report_progress()

    def _save(self, position: Position, reason: str) -> None:
        if self.is_main:
            self._report_progress()
        self._checkpointer.save(position, self._metrics, self._loops.data_state(position.epoch), reason, self._boundary)
        self._next_save = self._save_deadline()

    def _stop(self, position: Position) -> None:
        if self._restored is not None:  # else there is nothing yet that the newest checkpoint does not hold
            self._save(position, "stop")
        stop = requeue.decide(self._ranks, self._task, self._config.requeue, self._ledger, self._store, self._latch.received(), self._step)
        self._disconnect()
        how_to_go_on = f"To go on: python -m hpcckpt.submit conf={self._layout.config}"
        requeue.leave(stop, self._task, self._config.requeue, self._ledger, self._store, self._step, how_to_go_on)

    def _disconnect(self) -> None:
        self._ranks.barrier()
        self._agreement.close()
        self._ranks.close()

    def _restore_signals(self) -> None:
        # Not on the way out of a stop, where a second signal must stay harmless; and not a latch that was handed in, since
        # behind it are submitit's handlers, which requeue.
        if self._owns_latch:
            self._latch.restore()

    def _report_progress(self) -> None:
        self._next_report = time.monotonic() + INTERVAL_S
        values = self._metrics_file.flush()
        if values:
            print(self._progress.line(self._epoch, self._step, values), flush=True)

    def _save_deadline(self) -> float | None:
        minutes = self._config.checkpoint.every_minutes
        # Rank 0's clock counts: clocks of ranks need not agree.
        return time.monotonic() + minutes * 60 if minutes is not None and self.is_main else None
