"""How the ranks agree at which step to stop, at no cost until one of them wants to.

A rank that was signalled cannot just stop: the others would wait for it in the next all-reduce for ever. So:

1. Each rank counts its ticks (calls of `tick`, at the same places in the program on every rank).
2. A rank that wants something writes the wish and wakes all ranks through the process group's key-value store.
3. A background thread on each rank, until then blocked in one read of the store, freezes its rank's count, answers
   with it, and lets the rank go on to the next tick at most: there it waits for the decision.
4. Rank 0's thread takes the maximum of the answers, plus one. That is the tick at which every rank acts.

No rank is past the decision when it learns of it, since it was held at its own answer plus one, which is at most the
decision. No rank waits for ever: answers come from threads that never wait for a training step, so the decision needs
no rank's main thread; and up to the decided tick every rank passes the same ticks and thus the same collectives, so a
rank that is held keeps others waiting only until the decision is there. A decision that lies behind a rank's last
tick is never acted on: then training was over, on all ranks.

The steady state is an addition and a comparison under an uncontended lock. The store is served by rank 0: a round
costs it a few small messages per rank.
"""

import contextlib
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from hpcckpt.errors import AgreementError

Wish = Literal["stop", "save"]

_NEVER = 1 << 62
_PATIENCE = timedelta(days=3650)
DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class _Decision:
    wish: Wish
    tick: int


class Agreement:
    """One rank's side of the agreement. Every rank must create one, over the same store, and call `tick` equally often.

    `wish` and `tick` belong to one thread, the training's. The store may outlive an attempt (torchrun's does, and so would its
    wishes): each attempt's agreement has a `name` of its own there.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float = DEFAULT_TIMEOUT_S, *, name: str = "agreement"
    ) -> None:
        self._store = dist.PrefixStore(name, store)
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._tick = 0
        self._hold_at = _NEVER
        self._round = 0
        self._wished_round = -1
        self._own_wish: Wish | None = None
        self._decision: _Decision | None = None
        self._lost: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if world_size > 1:
            # A client of its own: a blocking read would lock the training out of the shared one.
            listening = dist.PrefixStore(name, store.clone())  # type: ignore[attr-defined]  # not in torch's stubs
            self._thread = threading.Thread(target=self._listen, args=(listening,), name="hpcckpt-agreement", daemon=True)
            self._thread.start()

    def wish(self, wish: Wish) -> None:
        """Ask that all ranks act together soon. Any rank may call it, any number of times.

        While a round is under way nothing is added to it: wish again after it, if the wish was not what was decided.
        """
        if self._world_size == 1:
            if self._own_wish != "stop":
                self._own_wish = wish
        elif self._wished_round < self._round:
            self._wished_round = self._round
            # Slurm signals all ranks at once: the first to wish does it for all. The wish must be there before anyone is woken.
            if self._store.add(f"{self._round}/wishes", 1) == 1:
                self._store.set(f"{self._round}/wish", wish)
                for rank in range(self._world_size):
                    self._store.compare_set(f"{self._round}/wake/{rank}", "", "wake")

    def tick(self) -> Wish | None:
        """Count one tick; return what all ranks must do together now, else None.

        Raises:
            AgreementError: this rank was held, and the others did not answer in time.
        """
        if self._thread is None:
            self._tick += 1
            wish, self._own_wish = self._own_wish, None
            return wish
        with self._changed:
            self._tick += 1
            if self._tick < self._hold_at:
                return None
            return self._held()

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread; harmless when called twice.

        Every rank must call it behind a point that all ranks have reached, or on its way out with an error: then the
        thread may still wait for others and is left alone after `timeout_s`.
        """
        if self._thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            closing = self._round
        # Wishes were made before the common point, so each wake key is settled by now: a round that was woken runs to its
        # end on all ranks, and the thread finds the next one closed.
        with contextlib.suppress(RuntimeError):  # the store may have gone with rank 0
            for round_ in (closing, closing + 1):
                self._store.compare_set(f"{round_}/wake/{self._rank}", "", "close")
        self._thread.join(timeout_s)
        self._thread = None

    def _held(self) -> Wish | None:
        """Wait for the decision; act on it if this is its tick. Called with the lock held."""
        if not self._changed.wait_for(lambda: self._decision is not None or self._lost is not None, self._timeout_s):
            raise AgreementError(
                f"rank {self._rank} waited {self._timeout_s:g} s at tick {self._tick} for all ranks to say where they are: "
                "one of them is gone or hangs; see the logs of the other ranks"
            )
        if self._decision is None:
            raise AgreementError(
                f"rank {self._rank} lost the key-value store while the ranks agreed where to stop ({self._lost}): "
                "rank 0 is gone; see its log"
            ) from self._lost
        decision = self._decision
        self._hold_at = decision.tick
        if self._tick < decision.tick:
            return None
        self._round += 1
        self._decision = None
        self._hold_at = _NEVER
        self._changed.notify_all()
        return decision.wish

    def _listen(self, store: dist.Store) -> None:
        round_ = 0
        try:
            while self._answer(store, round_):
                round_ += 1
        except Exception as error:  # noqa: BLE001 - the store is gone; matters only to a rank that is held
            with self._changed:
                self._lost = error
                self._changed.notify_all()

    def _answer(self, store: dist.Store, round_: int) -> bool:
        """Wait for a round, answer, and publish its decision to the training thread; False when closed."""
        wake = f"{round_}/wake/{self._rank}"
        store.wait([wake], _PATIENCE)
        if store.get(wake) == b"close":
            return False
        with self._changed:
            tick = self._tick
            self._hold_at = tick + 1
        store.set(f"{round_}/tick/{self._rank}", str(tick))
        if self._rank == 0:
            answers = [f"{round_}/tick/{rank}" for rank in range(self._world_size)]
            store.wait(answers, _PATIENCE)
            decided = max(int(store.get(answer)) for answer in answers) + 1
            store.set(f"{round_}/decision", str(decided))
        store.wait([f"{round_}/decision"], _PATIENCE)
        wish: Wish = "save" if store.get(f"{round_}/wish") == b"save" else "stop"
        with self._changed:
            self._decision = _Decision(wish, int(store.get(f"{round_}/decision")))
            self._changed.notify_all()
            # The next round's answer must not overtake this decision.
            self._changed.wait_for(lambda: self._round > round_ or self._closing)
        return True
