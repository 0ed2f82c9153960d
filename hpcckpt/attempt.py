"""One attempt of a run, on one rank: how it begins, what it says, and the ways in which it ends."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from hpcckpt import policy, scheduler
from hpcckpt.background import Background
from hpcckpt.config import RunConfig
from hpcckpt.crew import Crew, SharedFiles
from hpcckpt.distributed import Agreement, Ranks, Wish
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import AgreementError, FencedError
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Origin, Restored
from hpcckpt.recorder import Recorder
from hpcckpt.requeue import LOCAL_REQUEUE_EXIT_CODE, Requeue, Stop
from hpcckpt.sharing import first_of_node
from hpcckpt.signals import SignalLatch
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import make_private_directory
from hpcckpt.store.ledger import Ledger
from hpcckpt.store.shelf import Shelf
from hpcckpt.watch import Watch


@dataclass(frozen=True)
class Launched:
    """What a launcher hands over to the run that it starts."""

    # Installed before torch was imported, which takes seconds.
    latch: SignalLatch
    # As `Requeue` takes it.
    adopt: Callable[[str], object]


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
        launched: Launched | None = None,
    ) -> None:
        self._layout, self._config, self._task = layout, config, task
        self._ranks, self._device = ranks, device
        self._latch = latch
        # Not a latch that was handed over: behind it are submitit's handlers, which requeue.
        self._owns_latch = launched is None
        self.ledger = Ledger(layout.events)
        self.store = CheckpointStore.configured(layout, config.checkpoint)
        self.store.shelf = Shelf()
        self._requeue = Requeue(layout, self.ledger, task, config.requeue, self.store, None if launched is None else launched.adopt)
        self.is_over = False
        self.restart_count, generation, refusal = ranks.from_main(self._claimed)
        self.ledger.generation = generation
        if refusal is not None:
            self._refuse_to_train(refusal)
        if first_of_node(ranks):  # while the script builds its model
            self.store.expect_newest()
        self.recorder = Recorder(layout, config.name) if ranks.is_main else None
        beside = ranks.is_main and config.checkpoint.async_save
        self._background = Background((config.requeue.signal, "TERM"), self.note) if beside else None
        crew = Crew.formed(ranks, config.checkpoint.writers, task.local_rank, self.note)
        settings = config.checkpoint
        ways = {"skips": settings.when_busy == "skip", "is_lazy": settings.staging == "lazy"}
        self.files = SharedFiles(self.store, self.ledger, self._background, **ways, crew=crew)
        self.agreement = Agreement(ranks.store, task.rank, task.world_size, name=f"agreement {generation}")
        self._watch = Watch(layout.stop, latch, self._killed_in_s, self._overdue) if ranks.is_main else None
        self._next_save: float | None = None
        self._is_recording = False
        self._told: set[str] = set()
        self._saved = "nothing was saved"

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
        elif self._background is not None and self._background.has_failed:
            self.agreement.wish("save")  # there every rank hears of it
        return self.agreement.tick()

    @contextmanager
    def saving(self, reason: str, step: int) -> Iterator[None]:
        """Within it a checkpoint is saved, for `reason`. Every rank must enter it.

        At a stop a save that fails (a full disk, say) is told and no more: the run goes on from the one before, and where it cannot save
        again and again, it ends by requeue.max_stalled.
        """
        self._saved = f"saved at step {step}"
        try:
            yield
        except Exception as error:
            if reason != "stop" or isinstance(error, FencedError):
                raise
            self._saved = f"step {step} could not be saved"
            if self._ranks.is_main:
                self.ledger.append("save_failed", step=step, error=f"{type(error).__name__}: {error}")
                print(f"hpcckpt: {error}; going on from the checkpoint before", flush=True)
        else:
            self.note_saved()

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
        if self._watch is not None:
            self._requeue.settle()
            self._watch.close()
            self._watch.take_back()
        self._disconnect()
        self._let_go()
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

        Order, on all ranks: rank 0 decides and all hear it -> all leave the process group -> the others exit -> rank 0 asks for the next
        attempt and exits. The request comes last because Slurm answers it with SIGTERM for every process.

        Raises:
            SystemExit: else always; 0 where another attempt follows (144 under submitit's local launcher, which starts it then).
            FencedError: a newer attempt has taken over; nothing was asked for or noted. On every rank, or on rank 0 alone.
        """
        received, waited_s = zip(*self._ranks.gather((self._latch.received(), self._latch.waited_s())), strict=True)
        stop: Stop = self._ranks.from_main(
            lambda: self._requeue.decide({name for names in received for name in names}, step, round(max(waited_s), 3))
        )
        self.is_over = True
        with suppress(RuntimeError):  # a rank that dies on its way out keeps nobody
            self._disconnect()
        # The signals stay latched: a second one must be harmless on the way out.
        if self._watch is None:
            # Rank 0's code is the job's: a bad one from here would let srun kill rank 0 before it has asked.
            raise SystemExit(LOCAL_REQUEUE_EXIT_CODE if self._task.launcher == "local" and stop.decision.requeue else 0)
        if stop.cause != "requeued":  # else nobody has done what the file asks for
            self._watch.take_back()
        self._let_go()
        code = self._requeue.go_on(stop.cause, stop.decision, self._saved)
        self._watch.close()
        raise SystemExit(code)

    def fail(self, error: BaseException, epoch: int, step: int) -> None:
        """End on this rank alone. The others learn of it from their next collective: this process ends, and with it its connections."""
        self.is_over = True
        if isinstance(error, AgreementError) and self._watch is not None and self._latch.fired:
            self._go_on_without(set(self._latch.received()), str(error))
        if self._watch is not None:
            self._watch.close()
        if not isinstance(error, Exception):  # the script's own SystemExit, or Ctrl-C: the process ends at once
            if isinstance(error, SystemExit) and error.code not in (None, 0):
                self.ledger.append("failed", rank=self._ranks.rank, step=step, error=f"SystemExit: {error.code}")
            self.agreement.close(timeout_s=1)  # who waits for this rank is told
            return
        # An attempt that was overtaken has not failed: it is not wanted any more.
        kind = "fenced" if isinstance(error, FencedError) else "failed"
        self.ledger.append(kind, rank=self._ranks.rank, step=step, error=f"{type(error).__name__}: {error}")
        if self.recorder is not None:
            with suppress(OSError):
                self.recorder.flush(epoch, step)
                self.recorder.close(finished=False)
        self.agreement.close(timeout_s=1)
        self._let_go()  # what was taken before is not lost with this
        self.store.release()
        if self._ranks.world_size == 1:  # nobody to wait for, and a notebook may go on in this process
            self._ranks.close()
        self._restore_signals()

    def _killed_in_s(self, signals: set[str]) -> float | None:
        return self._requeue.killed_in_s(signals, self._latch.waited_s())

    def _overdue(self, signals: set[str]) -> None:
        """Note that the job's time is over before all ranks have come to the stop. Rank 0's watch."""
        try:
            where = self.agreement.whereabouts_text(timeout_s=1.5)
        except Exception as error:  # noqa: BLE001 - nothing may keep it from going on
            where = f"{type(error).__name__}: {error}"
        print("hpcckpt: the job's time is over", flush=True)
        self._go_on_without(signals, where)

    def _go_on_without(self, signals: set[str], where: str) -> None:
        """Go on from the newest checkpoint, since not all ranks come to the stop that was asked for. Rank 0, from any thread."""
        self.ledger.append("overdue", signals=sorted(signals), where=where)
        print(f"hpcckpt: not all ranks have come to the stop: {where}", flush=True)
        with suppress(FencedError):  # the newer attempt is told by it at its next save, in the training's own words
            stop = self._requeue.decide(signals, None)
            if self._watch is not None and stop.cause != "requeued":
                self._watch.take_back()
            self._requeue.go_on(stop.cause, stop.decision, "what was saved last is what there is")

    def _refuse_to_train(self, refusal: policy.StopDecision) -> NoReturn:
        """End an attempt that should not have been started. Every rank must call it."""
        self._ranks.close()
        if self._task.rank == 0:
            self._requeue.go_on("failure", refusal, "nothing was done")
            self.store.release()
        self._restore_signals()
        raise SystemExit(refusal.exit_code)

    def _note_lost(self, lost: Mapping[str, Any]) -> None:
        """Note what became of an attempt that ended without a word, as far as Slurm tells."""
        job_id = self._task.job_id
        restarted = job_id is not None and lost.get("job_id") == job_id
        told = scheduler.former_state(str(job_id)) if restarted and self._task.start is not None else ""
        self.ledger.append("lost", generation=lost.get("generation"), fate=policy.fate_of(told), state=told, restarted=restarted)

    def _refusal(self) -> policy.StopDecision | None:
        """Return why a job that Slurm has started again should not train."""
        if self._task.job_id is None or not self._task.start:
            return None  # somebody has started it, and means it
        events, config = self.ledger.events(), self._config.requeue
        return policy.decide_start(
            requeues=policy.count_requeues(events),
            max_requeues=config.max_requeues,
            stalled=policy.count_stalled(events),
            max_stalled=config.max_stalled,
        )

    def _claimed(self) -> tuple[int, int, policy.StopDecision | None]:
        """Claim the run directory and write the ledger's first line of this attempt.

        Returns (restart_count, generation, why it should not train). Rank 0.
        """
        task = self._task
        make_private_directory(self._layout.root)
        generation = self.store.claim(task.job_id, task.incarnation)
        events = self.ledger.events()
        last, word = policy.last_attempt(events)
        if last is not None and word is None:
            self._note_lost(last)
        refusal = self._refusal()
        restart_count = task.restart_count
        if restart_count is None:
            restart_count = sum(event["event"] == "attempt" and event.get("job_id") == task.job_id for event in events)
        self.ledger.generation = generation
        self.ledger.append(
            "attempt",
            job_id=task.job_id,
            restart_count=restart_count,
            incarnation=list(task.incarnation),
            world_size=task.world_size,
            num_nodes=task.num_nodes,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self._device),
        )
        return restart_count, generation, refusal

    def _disconnect(self) -> None:
        self._ranks.barrier()
        self.agreement.close()
        self._ranks.close()

    def _let_go(self) -> None:
        """Wait for a save that is on its way, and let go of memory and processes."""
        self.store.shelf.close()
        if self._background is not None:
            self._background.close()

    def _restore_signals(self) -> None:
        if self._owns_latch:
            # A script may go on for long behind its run, and Slurm's warning comes to it all the same.
            self._latch.restore(spare=self._task.job_id is not None)
