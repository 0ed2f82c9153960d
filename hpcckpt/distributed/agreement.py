"""How the ranks agree at which step to stop, at no cost until one of them wants to.

A rank that was signalled cannot just stop: the others would wait for it in the next all-reduce for ever. So:

1. Each rank counts its ticks (calls of `tick`, at the same places in the program on every rank).
2. A rank that wants something writes its wish to a list of messages in the key-value store, which all ranks read in one order.
3. A background thread on each rank, until then blocked in one read of the store, takes the rank's count as its answer, and has the
   rank go on to the next tick at most: there it is held until the decision is read. A rank that wishes is frozen so at once.
4. Rank 0's thread takes the maximum of the answers, plus one, and writes it to the list. That is the tick at which every rank acts,
   on the strongest wish that stands before the decision. A wish behind it opens the next round; until a rank has acted on the last
   decision, it answers with that one's tick.

No rank is past the decision when it reads it: it was held at its own answer plus one, which is at most the decision.

No rank waits for ever while all live. Answers come from threads that wait for nothing but the store, so a decision needs no rank's
main thread, wherever that is. A rank that is held keeps others waiting, in a collective say, only until the decision is read. Up to
the decided tick every rank passes the same ticks, and thus the same collectives. A decision behind a rank's last tick is not acted on:
training was over by then, on all ranks.

Nor if one does not live. Rank 0's thread waits `timeout_s` for the answers, then writes who gave none: every rank that is held raises,
and names them. Where rank 0 is gone its store mostly is, and readers see that at once; where it hangs, a rank that is held raises after
twice that time by its own clock. While ranks train, only threads of their own call the store: a call to a server that is stopped
does not come back.

The steady state is an addition and a comparison under an uncontended lock. A round costs the store, which rank 0 serves, a few small
messages per rank. `protocol` has the rules alone, `docs/decisions/0013-agreement.md` why they are these.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from hpcckpt.distributed.protocol import Asked, Left, Member, Message, Wish, Wished, decode, encode, is_met, outcome
from hpcckpt.distributed.whereabouts import Whereabouts, in_words, place_of
from hpcckpt.errors import AgreementError

_PATIENCE = timedelta(days=3650)
_POLL_S = 0.01
# Answers need the interpreter's lock only, which a large pickle or a compiler may keep for seconds.
DEFAULT_TIMEOUT_S = 60.0


class Agreement:
    """One rank's side of the agreement. Every rank must create one, over the same store, and call `tick` equally often.

    `wish` and `tick` belong to the thread that creates it, the training's. The store may outlive an attempt (torchrun's does, and so
    would its wishes): each attempt's agreement has a `name` of its own there. A rank whose thread does not answer in `timeout_s` is
    taken for dead.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        name: str = "agreement",
    ) -> None:
        self._store = dist.PrefixStore(name, store)
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._training = threading.get_ident()
        self._names = {rank: f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"}
        self._member = Member()
        # The next place of the list to be read.
        self._place = 0
        self._closing = False
        # Guards the three above; notified when a message was read.
        self._changed = threading.Condition()
        self._listener: threading.Thread | None = None
        if world_size > 1:
            self._store.set(f"name/{rank}", self._names[rank])
            # When it is needed, rank 0 and its store may be gone.
            self._names[0] = self._store.get("name/0").decode()
            # A client of its own: a blocking read would lock the training out of the shared one.
            listening = dist.PrefixStore(name, store.clone())  # type: ignore[attr-defined]  # not in torch's stubs
            self._listener = _in_background(self._listen, listening)

    def wish(self, wish: Wish) -> None:
        """Ask that all ranks act together soon. Any rank may call it, any number of times.

        What was decided when it is called is not changed; a stronger wish ("stop") is then decided anew. Never waits.
        """
        with self._changed:
            if self._world_size == 1:
                self._member.wish_alone(wish)
            elif self._member.wish(wish):
                _in_background(self._say, Wished(wish), self._place)

    def tick(self) -> Wish | None:
        """Count one tick; return what all ranks must do together now, else None.

        Raises:
            AgreementError: this rank was held, and other ranks, which it names, did not answer in time.
        """
        with self._changed:
            self._member.ticks += 1
            if self._member.ticks < self._member.hold_at:
                return None
            return self._held()

    def whereabouts(self, timeout_s: float = 5.0) -> list[Whereabouts]:
        """Return where each rank is now, its training, whatever that waits for; those that give no answer in `timeout_s` included.

        Any one rank may call it, from any thread, until `close`. Nothing of the agreement waits for it.
        """
        found = {self._rank: (self._member.ticks, place_of(self._training))}
        if self._listener is not None:
            # The store may not answer at all.
            _in_background(self._ask, found, time.monotonic() + timeout_s).join(timeout_s)
        answers = found.copy()  # the thread may go on
        return [
            Whereabouts(rank, self._names.get(rank, f"rank {rank}"), *answers.get(rank, (None, None))) for rank in range(self._world_size)
        ]

    def whereabouts_text(self, timeout_s: float = 5.0) -> str:
        """Return `whereabouts` in one line, ranks at one place together."""
        return in_words(self.whereabouts(timeout_s))

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread, within `timeout_s`, or else leave it alone; harmless when called twice.

        Every rank must call it behind a point that all ranks have reached, or on its way out with an error: who waits for this
        rank's answer later raises at once.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            place = self._place
        # To the list, since that is what the thread waits for. Wishes stand before it, and are answered by all.
        _in_background(self._say, Left(self._names[self._rank]), place).join(timeout_s)
        listener.join(max(deadline - time.monotonic(), 0.0))

    def _held(self) -> Wish | None:
        """Wait until it is known what to do at this tick. Called with the lock held."""
        member = self._member
        # Rank 0's thread may take as long as any other to begin, and then waits for the others.
        patience_s = 2 * self._timeout_s
        self._changed.wait_for(lambda: member.failure is not None or not member.is_held, patience_s)
        if member.is_held:
            member.lose(f"there is no decision in {patience_s:g} s from {self._names[0]}: gone, or it hangs; see its log")
            raise AgreementError(f"{self._names[self._rank]}, held at tick {member.ticks} to agree where to stop: {member.failure}")
        return member.act()

    def _listen(self, store: dist.Store) -> None:
        """Read the list until this rank leaves. Runs in a thread of its own, and is the only one that waits for the store."""
        try:
            while self._read_next(store):
                pass
        except RuntimeError as error:
            with self._changed:
                self._member.lose(f"the key-value store is lost, so {self._names[0]} is gone; see its log ({str(error).splitlines()[0]})")
                self._changed.notify_all()

    def _read_next(self, store: dist.Store) -> bool:
        """Wait for the next message, and do what it asks for; False when it was the last."""
        place = self._place
        store.wait([_message(place)], _PATIENCE)
        message = decode(store.get(_message(place)))
        with self._changed:
            self._place += 1
            round_, tick = self._member.round, self._member.ticks
            answer = self._member.read(message)
            self._changed.notify_all()
            is_last = self._closing and isinstance(message, Left)
        if isinstance(message, Asked):
            store.set(f"where/{place}/{self._rank}", json.dumps([tick, place_of(self._training)]))
        if answer is not None:
            store.set(f"answer/{round_}/{self._rank}", str(answer))
            if self._rank == 0:
                self._conclude(store, round_)
        return not is_last

    def _conclude(self, store: dist.Store, round_: int) -> None:
        """Collect the answers of a round, and write the outcome. Rank 0's thread."""
        keys = [f"answer/{round_}/{rank}" for rank in range(self._world_size)]
        try:
            store.wait(keys, timedelta(seconds=self._timeout_s))
        except dist.DistStoreError:  # the time is over
            self._learn_names(store)
        answers = [int(store.get(key)) if store.check([key]) else None for key in keys]
        self._write(store, outcome(answers, self._names, self._timeout_s), self._place)

    def _ask(self, found: dict[int, tuple[int, str]], deadline: float) -> None:
        """Ask all ranks where they are, and put into `found` what they answer."""
        with contextlib.suppress(RuntimeError):  # the store is lost: so nobody else answers
            self._learn_names(self._store)
            with self._changed:
                place = self._place
            place = self._write(self._store, Asked(), place)
            while len(found) < self._world_size and time.monotonic() < deadline:
                # Not by `wait`, whose timeout is a warning in the log.
                for rank in set(range(self._world_size)) - found.keys():
                    key = f"where/{place}/{rank}"
                    if self._store.check([key]):
                        found[rank] = tuple(json.loads(self._store.get(key)))
                time.sleep(_POLL_S)

    def _say(self, message: Message, place: int) -> None:
        with contextlib.suppress(RuntimeError):  # the store is lost, as the listening thread finds, too
            self._write(self._store, message, place)

    def _write(self, store: dist.Store, message: Message, place: int) -> int:
        """Write a message to the first free place of the list from `place` on, unless one there serves as well; returns its place."""
        text = encode(message)
        while not is_met(message, decode(store.compare_set(_message(place), "", text))):
            place += 1
        return place

    def _learn_names(self, store: dist.Store) -> None:
        for rank in range(self._world_size):
            if rank not in self._names and store.check([f"name/{rank}"]):
                self._names[rank] = store.get(f"name/{rank}").decode()


def _message(place: int) -> str:
    return f"message/{place}"


def _in_background(target: Callable[..., object], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name="hpcckpt-agreement", daemon=True)
    thread.start()
    return thread
