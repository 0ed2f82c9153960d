"""One attempt of a run, on one rank: how it begins, what it says, and the ways in which it ends."""

import os
import shlex
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch

from hpcckpt import requeue
from hpcckpt.config import RunConfig
from hpcckpt.distributed import Agreement, Ranks, Wish
from hpcckpt.environment import TaskEnvironment
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Origin, Restored
from hpcckpt.recorder import Recorder
from hpcckpt.signals import SignalLatch
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory
from hpcckpt.store.ledger import Ledger


class Attempt:
    """What this process is to the run. Every rank must create one, behind its process group, and call its methods together."""

    def __init__(
        self,
        layout: RunLayout,
        config: RunConfig,
        task: TaskEnvironment,
        ranks: Ranks,
        device: torch.device,
        latch: SignalLatch,
        *,
        owns_latch: bool,
    ) -> None:
        self._layout, self._config, self._task = layout, config, task
        self._ranks, self._device = ranks, device
        self._latch = latch
        # Not a latch that was handed in: behind it are submitit's handlers, which requeue.
        self._owns_latch = owns_latch
        self.ledger = Ledger(layout.events)
        self.store = CheckpointStore.configured(layout, config.checkpoint)
        self.restart_count, generation = ranks.from_main(self._claimed)
        self.recorder = Recorder(layout, config.name) if ranks.is_main else None
        self.agreement = Agreement(ranks.store, task.rank, task.world_size, name=f"agreement {generation}")
        self.is_over = False
        self._next_save: float | None = None
        self._is_recording = False
        self._told: set[str] = set()

    def recording(self, origin: Origin) -> Recorder | None:
        """Return rank 0's recorder; from the first call on its file goes on where the run does."""
        if self.recorder is not None and not self._is_recording:
            self._is_recording = True
            self.recorder.begin(origin.epoch, origin.step, origin.lines)
        return self.recorder

    def lines(self, epoch: int, step: int) -> int:
        """Return what a checkpoint behind `step` says of metrics.jsonl: see `Recorder.lines`; rank 0's counts."""
        return 0 if self.recorder is None else self.recorder.lines(epoch, step)

    def attached(self, origin: Origin, attach: Callable[[Recorder], Any]) -> Any:
        """Attach a curve to rank 0's recorder and return it; None on the other ranks. Every rank must call it."""
        recorder = self.recording(origin)
        return self._ranks.together(lambda: None if recorder is None else attach(recorder))

    def tick(self) -> Wish | None:
        """Count a tick of the agreement; return what all ranks have to do: because of a signal, or `checkpoint.every_minutes`.

        Every rank must call it.
        """
        if self._latch.fired:
            self.agreement.wish("stop")
        elif self._next_save is not None and time.monotonic() >= self._next_save:
            self.agreement.wish("save")
        return self.agreement.tick()

    def note_saved(self) -> None:
        """Note that a checkpoint was taken: the next `checkpoint.every_minutes` begin."""
        minutes = self._config.checkpoint.every_minutes
        # Rank 0's clock counts: clocks of ranks need not agree.
        self._next_save = time.monotonic() + minutes * 60 if minutes is not None and self._ranks.is_main else None

    def note(self, text: str | None) -> None:
        """Say something, if anything, in the log and in the ledger, once an attempt; rank 0 does."""
        if self._ranks.is_main and text is not None and text not in self._told:
            self._told.add(text)
            self.ledger.append("note", text=text)
            print(f"hpcckpt: note: {text}", flush=True)

    def announce(self, restored: Restored) -> None:
        """Say where this attempt goes on from, and how exactly; rank 0 does."""
        self.note_saved()
        if not self._ranks.is_main:
            return
        origin, exactness = restored.origin, restored.exactness
        told = {} if exactness is None else exactness.fields()
        file = None if origin.path is None else origin.path.name
        self.ledger.append("restored", file=file, epoch=origin.epoch, step=origin.step, **told)
        whence = "from the beginning" if origin.path is None else f"behind {origin.position or 'the weights'} of {origin.path}"
        print(
            f"hpcckpt: attempt {self.restart_count + 1} of job {self._task.job_id}, {self._task.world_size} ranks: goes on {whence}",
            flush=True,
        )
        for line in () if exactness is None else exactness.lines():
            print(f"hpcckpt: {line}", flush=True)

    def start(self, total_epochs: int, epoch: int) -> None:
        """Note that the loop over epochs begins, at `epoch`."""
        if self.recorder is not None:
            self.recorder.start(total_epochs)
        if epoch >= total_epochs:
            self.note(f"all {total_epochs} epochs are done already; to go on, ask for more")

    def finish(self, kind: str, epoch: int, step: int, **facts: object) -> None:
        """End in order; `kind` is the ledger's word for it. Every rank must call it."""
        self.is_over = True
        self._disconnect()
        if self.recorder is not None:  # behind the barrier: now all ranks are through
            self.recorder.flush(epoch, step)
            self.ledger.append(kind, epoch=epoch, step=step, **facts)
            print(f"hpcckpt: {kind}: {step} steps in {self._layout.root}", flush=True)
            self.store.release()
            # The last: a service that draws curves may take its time.
            self.recorder.close(finished=kind == "finished")
        self._restore_signals()

    def stop(self, step: int) -> NoReturn:
        """End behind a checkpoint, requeued or with the reason why not. Every rank must call it.

        Raises:
            SystemExit: always, but for what `requeue.decide` and `requeue.leave` raise.
        """
        stop = requeue.decide(self._ranks, self._task, self._config.requeue, self.ledger, self.store, self._latch.received(), step)
        self.is_over = True
        self._disconnect()
        # A script of one's own has no configuration there. Relative paths are those of the directory it was submitted from.
        submitted = f"cd {shlex.quote(os.getcwd())} && python -m hpcckpt.submit conf={shlex.quote(str(self._layout.config))}"
        how_to_go_on = f"To go on: {submitted if self._layout.config.is_file() else 'start the same command again'}"
        # The signals stay latched: a second one must be harmless on the way out.
        requeue.leave(stop, self._task, self._config.requeue, self.ledger, self.store, step, how_to_go_on)

    def fail(self, error: BaseException, epoch: int, step: int) -> None:
        """End on this rank alone. The others learn of it from their next collective: this process ends, and with it its connections."""
        self.is_over = True
        if not isinstance(error, Exception):  # the script's own SystemExit, or Ctrl-C: the process ends at once
            return
        self.ledger.append("failed", rank=self._ranks.rank, step=step, error=f"{type(error).__name__}: {error}")
        if self.recorder is not None:
            with suppress(OSError):
                self.recorder.flush(epoch, step)
                self.recorder.close(finished=False)
        self.agreement.close(timeout_s=1)
        self.store.release()
        if self._ranks.world_size == 1:  # nobody to wait for, and a notebook may go on in this process
            self._ranks.close()
        self._restore_signals()

    def _claimed(self) -> tuple[int, int]:
        """Claim the run directory and write the ledger's first line of this attempt; returns (restart_count, generation). Rank 0."""
        task = self._task
        make_private_directory(self._layout.root)
        generation = self.store.claim(task.job_id, task.incarnation)
        restart_count = task.restart_count
        if restart_count is None:
            attempts = [event for event in self.ledger.events() if event["event"] == "attempt"]
            restart_count = sum(event.get("job_id") == task.job_id for event in attempts)
        self.ledger.append(
            "attempt",
            generation=generation,
            job_id=task.job_id,
            restart_count=restart_count,
            world_size=task.world_size,
            num_nodes=task.num_nodes,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self._device),
        )
        return restart_count, generation

    def _disconnect(self) -> None:
        self._ranks.barrier()
        self.agreement.close()
        self._ranks.close()

    def _restore_signals(self) -> None:
        if self._owns_latch:
            self._latch.restore()
