"""`Run`: all that a training script sees.

Three places matter, the same on every rank: `run.epochs` restores before the first epoch and saves at the end of each,
`run.batches` goes on behind the last batch that was trained on, and behind `run.step` a save or a stop can happen.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset

from hpcckpt import config as configuration
from hpcckpt import policy
from hpcckpt.attempt import Attempt, Launched
from hpcckpt.checkpoint import Boundary, Checkpointer
from hpcckpt.config import RunConfig
from hpcckpt.content import plain_metrics
from hpcckpt.data import Loop, Loops, Place, Share, make_loader
from hpcckpt.distributed import Ranks, choose_device, fix_bucket_order
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Restored
from hpcckpt.policy import Position
from hpcckpt.recorder import refuse_many
from hpcckpt.signals import SignalLatch, children_protected
from hpcckpt.state.conditions import conditions
from hpcckpt.state.rng import seed_all
from hpcckpt.state.tracked import Tracked

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

    def __init__(self, layout: RunLayout, config: RunConfig, task: TaskEnvironment, launched: Launched | None = None) -> None:
        """Connect to the other ranks. Every rank must call it, from its main thread.

        Raises:
            RendezvousError: the ranks did not find each other.
            RunDirectoryError: the run directory cannot be used; raised on every rank.
        """
        self.rank, self.local_rank, self.node_rank, self.world_size = task.rank, task.local_rank, task.node_rank, task.world_size
        self.run_dir = layout.root
        self.args: DictConfig = OmegaConf.create(config.args)
        OmegaConf.set_struct(self.args, True)  # a misspelled name raises, instead of being None
        self._config = config
        if "OMP_NUM_THREADS" not in os.environ:
            # The same number on every node and attempt: it decides the order of sums on the CPU.
            torch.set_num_threads(config.slurm.cpus_per_task)
        # Before the ranks meet, which takes time, and again behind it: NCCL has handlers of its own.
        self._latch = launched.latch if launched else SignalLatch((config.requeue.signal, "TERM"))
        self._latch.install()
        self.device = choose_device(task)
        self._ranks = Ranks(task, self.device)
        self._latch.install()
        self.is_main = self._ranks.is_main
        self._attempt = Attempt(layout, config, task, self._ranks, self.device, self._latch, launched)
        self._recorder, self.restart_count = self._attempt.recorder, self._attempt.restart_count
        self._tracked = Tracked()
        here = partial(conditions, self.device, config.seed, task.num_nodes)
        self._checkpointer = Checkpointer(self._ranks, layout, self._tracked, config.seed, here, self._attempt.files)
        self._loops = Loops(self._ranks)
        self._restored: Restored | None = None
        self._epoch = self._step = 0
        self._metrics: dict[str, float] = {}
        # Taken where an epoch begins and where its batches end, for as long as no step follows.
        self._boundary: Boundary | None = None
        # What all ranks have agreed to do next.
        self._due: Literal["stop", "every_minutes", "every_steps"] | None = None
        self._finished = False
        self._outer_error = sys.exception()  # handled where the Run is made, so none of its own
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
        task = TaskEnvironment.from_environ(os.environ)
        return cls(layout, configuration.of_script(layout.config, layout.root.name, list(overrides)), task)

    @property
    def global_step(self) -> int:
        """Optimizer steps since the beginning of the run, over all attempts; as then, where a restart runs an epoch's beginning again."""
        return self._checkpointer.begun_step if self._loops.is_repeating else self._step

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
        self,
        dataset: Dataset[T],
        batch_size: int | None = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        *,
        keep_global_batch: bool = True,
        **arguments: Any,
    ) -> "DataLoader[T]":
        """Return a DataLoader over this rank's share; iterate over it with `batches`. Every rank must call it.

        Over all ranks each sample comes once an epoch, in an order that depends on seed and epoch only. `batch_size` is per rank; on
        another number of ranks than before it is changed so that all together take as many samples a step as they did, unless
        `keep_global_batch` is false. Further arguments are DataLoader's; a `sampler` or `batch_sampler` is that of all ranks. An
        iterable dataset gives this rank's share, and needs `state_dict` and `load_state_dict` (docs/how-to/data.md).

        Raises:
            UsageError: it could not be gone on with exactly: no length and no state, or an argument that replaces the order.
            CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError: what the run goes on from.
        """
        share = Share(self.rank, self.world_size, self._config.seed, len(self._loops))
        saved = self._checkpointer.origin().batch_sizes.get(str(share.number)) if keep_global_batch else None
        loader, place, size = make_loader(
            dataset, share, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, saved_size=saved, **arguments
        )
        self._loops.add(loader, place, size)
        self._attempt.note(size.note(share.number, self.world_size))
        return loader

    def tensorboard(self, log_dir: str | Path | None = None, **arguments: Any) -> Any:
        """Send what `log` and `report` get to TensorBoard, too, as one curve over all attempts; returns rank 0's SummaryWriter, else None.

        Every rank must call it. `log_dir` is <run_dir>/tensorboard; further arguments are SummaryWriter's.

        Raises:
            UsageError: the package is missing, or an argument would break the curve.
        """
        return self._attempt.attached(self._checkpointer.origin(), lambda recorder: recorder.tensorboard(log_dir, **arguments))

    def wandb(self, **arguments: Any) -> Any:
        """Send what `log` and `report` get to Weights & Biases, too, as one run over all attempts; returns rank 0's, else None.

        Every rank must call it. Arguments are those of wandb.init. Raises as `tensorboard` does.
        """
        return self._attempt.attached(self._checkpointer.origin(), lambda recorder: recorder.wandb(**arguments))

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs that are left of 0 … total-1; restore before the first, save at the end of each.

        Every rank must iterate over it, once. A run that is over goes on where `total` has grown, else it ends at once. Leaving the
        loop by `break` or `return` ends the run there: the last step is saved, and another submission goes on behind it.

        Raises:
            UsageError: nothing is tracked, or called twice.
            CheckpointCorruptError, CheckpointMismatchError, CheckpointSaveError: on every rank.
        """
        self._restore()
        self._attempt.start(total, self._epoch)
        self._loops.settle()
        while self._epoch < total:
            self._boundary = self._checkpointer.begin_epoch(self._step, self._attempt.lines(self._epoch, self._step))
            yield self._epoch
            self._end_epoch(is_last=self._epoch + 1 >= total)
            self._metrics = {}
        self._finished = True

    def batches(self, loader: "DataLoader[T]") -> Iterator[T]:
        """Yield the batches of this epoch that were not trained on yet. Every rank must iterate over it.

        Behind a stop at the last step of an epoch, or in its evaluation, none are left: what follows the loop must not need
        a variable that only the loop sets. Several loaders, several loops over one, and loops in step are all gone on with.

        Raises:
            UsageError: the loader was not made by `run.loader`, or there is no epoch yet.
            CheckpointMismatchError: the data is not what it was when the epoch was interrupted.
        """
        if self._restored is None:
            raise UsageError("run.batches: call it inside of `for epoch in run.epochs(…)`")
        # At the call, which tells what the loop is in; it begins where the first batch is asked for.
        return self._iterate(loader, *self._loops.create(loader, self._epoch))

    def _iterate(self, loader: "DataLoader[T]", place: Place, loop: Loop) -> Iterator[T]:
        self._tracked.share_buffers()
        if self._loops.begin(place, loop, self._epoch) and self._restored is not None:
            self._restored.put_back()
            self._boundary = self._mark()
        is_exhausted = False
        try:
            if not place.is_skipped:
                # Slurm signals every process of the job; workers would die of it.
                with children_protected((self._config.requeue.signal, "TERM")):
                    iterator = iter(loader)
                for batch in iterator:
                    place.advance()
                    yield batch
                    self._loops.refuse_if_over(place, loop)
                    if not place.in_progress and self._loops.is_between_batches:
                        # Not before: what follows the step, a break or a return above all, is not run again.
                        self._boundary = None if self._loops.leads == [place] else self._boundary
                        self._carry_out(waits=self._loops.waits(place))
            is_exhausted = True
        finally:  # a break ends it too
            is_run = place.loop is loop
            is_lead = is_run and self._loops.end(place, is_exhausted=is_exhausted)
            if is_lead or (is_run and self._boundary is None and not self._loops.leads):
                self._boundary = self._mark()
        if is_exhausted:
            self._tracked.share_buffers()

    def enumerate(self, loader: "DataLoader[T]") -> Iterator[tuple[int, T]]:
        """Yield what `batches` does, each with its number in the epoch, from 0, which goes on after a restart."""
        return ((self._loops.place_of(loader).batch, batch) for batch in self.batches(loader))

    def step(self) -> None:
        """Say that one optimizer step is done. Every rank must call it.

        A save, or a save and the end by SystemExit, may follow where the next batch is asked for. Costs microseconds otherwise.

        Raises:
            UsageError: outside of `run.epochs`.
            CheckpointSaveError, FencedError, AgreementError: on every rank.
        """
        if self._restored is None or self._finished:
            raise UsageError("run.step: call it inside of `for epoch in run.epochs(…)`")
        self._step += 1
        self._tracked.note_trained()
        self._boundary = None
        self._loops.step()
        due = policy.is_step_due(self._step, self._config.checkpoint.every_steps)
        self._act(due="every_steps" if due else None, waits=None if self._loops.waits() is None else "")

    def poll(self) -> None:
        """Give a stop the chance to happen in a long loop without training steps. Every rank must call it equally often.

        A stop here saves the state behind the last training step; an evaluation begins again after the restart. In the body of a loop
        with steps it waits for the next batch; between a batch and its `step` nothing happens.
        """
        self._loops.stay()
        if not self._finished and self._loops.is_between_batches:
            self._tracked.share_buffers()
            self._act(waits=self._loops.waits())

    def log(self, **values: Any) -> None:
        """Record values of the step in progress (numbers or one-element tensors) in metrics.jsonl; rank 0's count.

        Call it before `step`. Nothing is written or waited for here, and nothing is recorded twice: after a restart, what the
        script runs again before the loop that is gone on with.

        Raises:
            UsageError: a value is no number, or more than one.
        """
        refuse_many(values)
        if self._recorder is not None and not self._loops.is_repeating:
            self._recorder.log(self._epoch, self._step, values)

    def report(self, **metrics: Any) -> None:
        """Record metrics of this epoch: in metrics.jsonl and in its checkpoint, where `checkpoint.monitor` looks; rank 0's count.

        Raises:
            UsageError: one is no number, or more than one.
        """
        plain = plain_metrics(metrics)
        if self._loops.is_repeating:  # it was given before the interruption, and is in the checkpoint
            return
        self._loops.stay()
        self._metrics.update(plain)
        if self._recorder is not None:
            self._recorder.report(self._epoch, self._step, plain)
            self._recorder.flush(self._epoch, self._step)

    def close(self) -> None:
        """Leave the other ranks in order; within the loop over epochs as `break` does, or an exception. Every rank must call it."""
        if self._attempt.is_over:
            return
        error = sys.exception()
        if error is not None and error is not self._outer_error and not self._finished:
            self._attempt.fail(error, self._epoch, self._step)
            return
        try:
            if is_early := self._restored is not None and not self._finished:
                self._leave_early()
            self._checkpointer.settle()
        except BaseException as failure:
            self._attempt.fail(failure, self._epoch, self._step)
            raise
        kind = "left" if self._restored is None else "finished"
        self._attempt.finish(kind, self._epoch, self._step, **({"early": True} if is_early else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif not self._attempt.is_over:
            self._attempt.fail(error, self._epoch, self._step)

    def _restore(self) -> None:
        if self._restored is not None:
            raise UsageError("run.epochs: it was called before; a run has one loop over epochs")
        if not self._tracked:
            raise UsageError("run.epochs: nothing is tracked, so nothing would be saved; call run.track(model=…, optimizer=…) before")
        self._attempt.recording(self._checkpointer.origin())
        self._restored = restored = self._checkpointer.restore(self._loops)
        place, self._epoch, self._step = restored.place, restored.origin.epoch, restored.origin.step
        if place is not None and not place.position.epoch_finished:
            self._metrics = dict(place.metrics)
            self._loops.restore(self._epoch, place.loaders, place.last_loader, place.unplaced_steps)
        self._attempt.announce(restored)
        restored.put_back()

    def _end_epoch(self, *, is_last: bool) -> None:
        self._boundary = None
        self._tracked.share_buffers()
        self._attempt.note(self._loops.end_epoch())
        position = Position(self._epoch, self._step, epoch_finished=True)
        if policy.is_epoch_due(self._epoch, self._config.checkpoint.every_epochs, is_last=is_last):
            self._save("every_epochs", position, at_once=is_last)
        if not is_last:
            self._act(position)
        self._epoch += 1

    def _act(self, position: Position | None = None, due: Literal["every_steps"] | None = None, waits: str | None = None) -> None:
        """Count a tick of the agreement and do what all ranks have to do now, if anything."""
        if self._due != "stop":
            wish = self._attempt.tick()
            self._due = "stop" if wish == "stop" else "every_minutes" if wish == "save" else due or self._due
        self._carry_out(position, waits)

    def _carry_out(self, position: Position | None = None, waits: str | None = None) -> None:
        """Do what is due, unless it has to wait, and be it that the state behind the last step is no more. Every rank must call it."""
        if waits is not None or self._due is None:
            if waits and self._due is not None:
                self._attempt.note(waits)
            if self._recorder is not None and self._recorder.is_due:
                self._recorder.flush(self._epoch, self._step)
        elif not self._is_disturbed():
            due, self._due = self._due, None
            if self._restored is not None:  # else there is nothing yet that the newest checkpoint does not hold
                self._save(due, position)
            if due == "stop":
                self._attempt.stop(self._step)

    def _is_disturbed(self) -> bool:
        """Whether the state behind the last step cannot be saved any more. Every rank must call it."""
        if changed := () if self._boundary is None else self._checkpointer.changed_since(self._boundary):
            self._attempt.note(f"{', '.join(changed)}: changed behind the last step, so a stop waits for the next one or the epoch's end")
        return bool(changed)

    def _leave_early(self) -> None:
        """Save where the script has left the loop over epochs, if nothing has changed since the last step. Every rank must call it."""
        self._loops.go_back()
        how = "saved there; to go on, submit again"
        if self._boundary is None or self._loops.waits() is not None:
            how = "not saved, since its loop is kept in a variable, or is none over run.batches: nobody knows what has changed since"
        elif changed := self._checkpointer.changed_since(self._boundary):
            how = f"not saved, because of {', '.join(changed)}, which changed since"
        else:
            self._save("left")
        self._attempt.note(f"the training function has left its loop in epoch {self._epoch}, behind step {self._step}: {how}")

    def _save(self, reason: str, position: Position | None = None, *, at_once: bool = False) -> None:
        if self._recorder is not None:
            self._recorder.flush(self._epoch, self._step, durable=True)
        lines = self._attempt.lines(self._epoch, self._step) if self._boundary is None else self._boundary.lines
        facts = {"lines": 0 if position else lines, "reasons": self._loops.reasons(self._tracked.has_gradients)}
        here = position or Position(self._epoch, self._step, epoch_finished=False)
        with self._attempt.saving(reason, self._step):
            self._checkpointer.save(here, self._metrics, self._loops, reason, self._boundary, facts, at_once=at_once)

    def _mark(self) -> Boundary:
        return self._checkpointer.boundary(self._attempt.lines(self._epoch, self._step))
