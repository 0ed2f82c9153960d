"""The agreement's protocol, without threads, store or clock: what is said, and what each rank makes of it.

All ranks read one list of messages, in one order. A message is put at the first free place of the list, which one writer wins.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

Wish = Literal["stop", "save"]

STRENGTH: Mapping[Wish | None, int] = {None: 0, "save": 1, "stop": 2}
_NEVER = 1 << 62


@dataclass(frozen=True)
class Wished:
    """A rank wants all to act. The first of a round has every rank answer with its tick."""

    wish: Wish


@dataclass(frozen=True)
class Decided:
    """From rank 0: the tick at which all act. It ends the round."""

    tick: int


@dataclass(frozen=True)
class GaveUp:
    """From rank 0: these ranks, in words, did not answer in time."""

    ranks: str
    timeout_s: float


@dataclass(frozen=True)
class Left:
    """A rank, in words, does not read any more: training is over, or has failed there."""

    rank: str


@dataclass(frozen=True)
class Asked:
    """Where is everyone? Has no part in the agreement."""


Message: TypeAlias = Wished | Decided | GaveUp | Left | Asked
_KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in (Wished, Decided, GaveUp, Left, Asked)}


def encode(message: Message) -> str:
    """Return a message as text; equal messages have equal texts."""
    return json.dumps([type(message).__name__, asdict(message)])


def decode(text: str | bytes) -> Message:
    """Return the message that `encode` was given."""
    name, fields = json.loads(text)
    return _KINDS[name](**fields)


def is_met(message: Message, found: Message) -> bool:
    """Whether a message need not be written any more since `found` is at the place that it would have had.

    Slurm signals all ranks at once: of a thousand equal wishes one is written.
    """
    if isinstance(message, Wished) and isinstance(found, Wished):
        return STRENGTH[found.wish] >= STRENGTH[message.wish]
    # Any leaving wakes the reader of one that leaves, too.
    return message == found or (isinstance(message, Left) and isinstance(found, Left))


def outcome(answers: Sequence[int | None], names: Mapping[int, str], timeout_s: float) -> Decided | GaveUp:
    """Return rank 0's word on a round: `answers` are the ranks' ticks, None where there was none within `timeout_s`."""
    ticks = [tick for tick in answers if tick is not None]
    if len(ticks) == len(answers):
        return Decided(max(ticks) + 1)
    missing = (rank for rank, tick in enumerate(answers) if tick is None)
    return GaveUp(", ".join(names.get(rank, f"rank {rank}") for rank in missing), timeout_s)


class Member:
    """One rank's part. It is frozen from its wish, or from the first wish it reads, until it reads the round's decision.

    Attributes:
        ticks: how many were counted, by the training: it does so itself, and calls `act` at `hold_at` and behind it.
        hold_at: the next tick at which there is something to do, or to wait for.
        round: how many decisions were read.
        failure: why there will be no more of them.
    """

    def __init__(self) -> None:
        self.ticks = 0
        self.hold_at = _NEVER
        self.round = 0
        self.failure: str | None = None
        # This rank's answer: no tick behind it returns.
        self._answer: int | None = None
        # What the round was opened for; its answers are given. None between rounds.
        self._open: Wish | None = None
        # This rank's own wish, until it is read.
        self._own: Wish | None = None
        # Decisions that were read and not acted on; their ticks rise.
        self._due: deque[tuple[int, Wish]] = deque()

    def wish(self, wish: Wish) -> bool:
        """Note this rank's wish; return whether it has to be written, which it has not if as much is on its way."""
        on_its_way = max(STRENGTH[known] for known in (self._own, self._open, *(due for _, due in self._due)))
        # Behind a failure nobody would read it; all that is left is to be held.
        is_new = on_its_way < STRENGTH[wish]
        if is_new:
            self._own = wish
            self._freeze()
        return is_new and self.failure is None

    def read(self, message: Message) -> int | None:
        """Take in the next message of the list; return the answer that has to be given for this rank, if any."""
        match message:
            case Wished(wish):
                return self._read_wish(wish)
            case Decided(tick):
                self._read_decision(tick)
            case GaveUp(ranks, timeout_s):
                self.failure = f"there is no answer in {timeout_s:g} s from {ranks}: gone, or it hangs; see its log"
            case Left(rank):
                self.failure = self.failure or f"{rank} has left; see its log"
            case Asked():
                pass
        return None

    def lose(self, why: str) -> None:
        """Take in that no more messages will be read."""
        self.failure = self.failure or why

    def wish_alone(self, wish: Wish) -> None:
        """Act at the next tick: the whole protocol where there is one rank."""
        if self.wish(wish):
            self._due.clear()
            self.read(Wished(wish))
            self.read(Decided(self.ticks + 1))

    @property
    def is_held(self) -> bool:
        """Whether this rank is at a tick that it must not leave before the decision is read."""
        return self.ticks >= self.hold_at and not self._is_due

    def act(self) -> Wish | None:
        """Return what all ranks do at this tick, which is not held."""
        if not self._is_due:
            return None
        _, wish = self._due.popleft()
        self._hold()
        return wish

    @property
    def _is_due(self) -> bool:
        return bool(self._due) and self._due[0][0] == self.ticks

    def _read_wish(self, wish: Wish) -> int | None:
        is_first = self._open is None
        self._open = max(self._open, wish, key=STRENGTH.__getitem__)
        if STRENGTH[wish] >= STRENGTH[self._own]:
            self._own = None
        self._freeze()
        return self._answer if is_first and self.failure is None else None

    def _read_decision(self, tick: int) -> None:
        # Every rank has read the same wishes before it, so all know the same strongest one.
        self._due.append((tick, self._open or "stop"))
        self._open = self._answer = None
        self.round += 1
        if self._own is not None:  # it comes behind this decision, and opens the next round
            self._freeze()
        self._hold()

    def _freeze(self) -> None:
        if self._answer is None:
            # What is decided will be acted on, and then comes the next: so rounds never meet at one tick.
            self._answer = max(self.ticks, self._due[-1][0] if self._due else 0)
        self._hold()

    def _hold(self) -> None:
        first_due = self._due[0][0] if self._due else _NEVER
        self.hold_at = min(first_due, _NEVER if self._answer is None else self._answer + 1)
