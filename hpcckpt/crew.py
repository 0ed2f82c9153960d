"""The ranks that write one checkpoint file together: `checkpoint.writers` (docs/decisions/0018-writers.md).

Every replica holds the same state, so each can write its share of the file. Rank 0 saves as it does alone; where the file is to be
written it leads a round, in which each writer fills its share (`store.shares`) and answers. The others follow, round for round,
since a full disk may take a second one, until rank 0 says that it is over. What the file holds is rank 0's state: it sends whatever is
small, and compares digests of what is large while the shares are written; where a replica differs, it writes that share itself.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self, TypeVar, cast

from hpcckpt.archive import Layout, Record
from hpcckpt.background import Files
from hpcckpt.distributed import Collectives
from hpcckpt.errors import RankFailedError
from hpcckpt.state.pickled import Pickled, pickled
from hpcckpt.store.digest import Blocks
from hpcckpt.store.shares import Filled, Load, Share, divided, fill, fill_at, fill_end, seen_for
from hpcckpt.store.sink import Sink

T = TypeVar("T")

# What is smaller is sent by rank 0, what is larger a writer has itself.
_LARGE_BYTES: Final = 1024 * 1024
# Sending more than this would take longer than it saves.
_SENT_BYTES: Final = 64 * 1024 * 1024


class Crew:
    """All ranks of a run of which several write. Every rank must create one, and call `together` with the others."""

    def __init__(self, ranks: Collectives, writers: Sequence[int], note: Callable[[str | None], object]) -> None:
        """Take the writing ranks, rank 0 the first of them; `note` tells the user something once."""
        self._ranks = ranks
        self._writers = writers
        self._note = note
        self._is_leading = False

    @classmethod
    def formed(cls, ranks: Collectives, wanted: str, local_rank: int, note: Callable[[str | None], object]) -> Self | None:
        """Return the crew for `checkpoint.writers`; None where rank 0 is the only writer. Every rank must call it."""
        if wanted == "rank0" or ranks.world_size == 1:
            return None
        is_writer = ranks.gather(ranks.is_main or wanted == "all" or local_rank == 0)
        writers = [rank for rank, writes in enumerate(is_writer) if writes]
        return cls(ranks, writers, note) if len(writers) > 1 else None

    def together(self, action: Callable[[], T], state: Callable[[], Any], alone: str | None = None) -> T:
        """Run `action` on rank 0 and return its result, or raise its exception, on every rank alike, as `Ranks.from_main`.

        Every rank must call it. Within `action` rank 0 may write by what `shared` returns.

        Args:
            action: saves.
            state: gives this rank's own copy of the state, as it is in the file.
            alone: why rank 0 has to write alone, if so; the same on every rank.
        """
        if alone is not None:
            self._note_alone(alone)
            return self._ranks.from_main(action)
        if not self._ranks.is_main:
            self._follow(state)

        def led() -> T:
            self._is_leading = True
            try:
                result = action()
            except Exception:
                self._ranks.broadcast(None)
                raise
            finally:
                self._is_leading = False
            self._ranks.broadcast(None)
            return result

        return self._ranks.from_main(led)

    def shared(self, content: Any) -> Callable[[IO[bytes]], None] | None:
        """Return what has all writers write `content` into a file of the store; None where rank 0 writes alone. Rank 0.

        Raises:
            TypeError, AttributeError, pickle.PicklingError: something in it cannot be pickled.
        """
        if not self._is_leading:
            return None
        found = pickled(content)
        if found is None:
            self._note_alone("there is something in the state that only torch.save writes")
            return None
        large = found.large(_LARGE_BYTES)
        entries = found.entries()
        sent_bytes = sum(size for _, size in entries) - sum(entries[number][1] for number in large)
        if sent_bytes > _SENT_BYTES:
            self._note_alone(f"{sent_bytes >> 20} MiB of the state are in tensors below {_LARGE_BYTES >> 20} MiB")
            return None
        round_ = _Round(self._ranks, self._note, found, large, self._writers)
        if round_.writers == 1:
            return None
        return lambda file: cast(Sink, file).entrust(round_.lead)

    def _follow(self, state: Callable[[], Any]) -> None:
        """Fill a share of each file that rank 0 has written, until it is over. All ranks but 0."""
        replica = _Replica(state)
        while (plan := self._ranks.broadcast(_NO_PLAN)) is not None:
            self._ranks.gather(replica.answer(plan, plan.shares.get(self._ranks.rank)))

    def _note_alone(self, reason: str) -> None:
        self._note(f"checkpoint.writers: rank 0 writes alone, since {reason}")


@dataclass(frozen=True)
class SharedFiles(Files):
    """Where a rank saves, and with whom."""

    crew: Crew | None = None


@dataclass(frozen=True)
class _Plan:
    """What writers are told of a file."""

    path: str
    entries: list[tuple[str, int]]
    # Numbers of entries that a writer has itself.
    large: list[int]
    # The data of all others, one behind the other.
    small: bytes
    # By rank.
    shares: dict[int, Share]


_NO_PLAN: _Plan | None = None


@dataclass(frozen=True)
class _Answer:
    """What became of a share."""

    host: str
    filled: Filled | None = None
    # Why nothing was written: its state is not that of the file.
    lacks: str | None = None
    # Number and text of an OSError.
    failure: tuple[int | None, str] | None = None
    error: str | None = None


class _Replica:
    """A rank's own copy of the state, which is made when the first plan comes."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self._state = state
        self._large: list[Record] | None = None

    def answer(self, plan: _Plan, share: Share | None) -> _Answer | None:
        """Fill a share; whatever happens becomes the answer. None without a share."""
        if share is None:
            return None
        host = socket.gethostname()
        try:
            layout = Layout(plan.entries)
            data = self._data(plan)
            if data.keys() >= {number for number, *_ in layout.read_for(share.first, share.last)}:
                return _Answer(host, filled=fill_at(Path(plan.path), layout, share, lambda number: data[number].load(), plan.large))
            return _Answer(host, lacks="has other tensors than")
        except OSError as error:
            return _Answer(host, failure=(error.errno, error.strerror or str(error)))
        except Exception as error:  # noqa: BLE001 - raised on rank 0, and from there everywhere
            return _Answer(host, error=f"{type(error).__name__}: {error}")

    def _data(self, plan: _Plan) -> Mapping[int, Record]:
        """Return what is known here, by number of the entry: what rank 0 has sent, and of this rank what has the right size.

        The tracked objects come first in a file, in the same order on every rank; behind them rank 0 may have more.
        """
        if self._large is None:
            found = pickled(self._state())
            records = [] if found is None else list(found)
            self._large = [] if found is None else [records[number] for number in found.large(_LARGE_BYTES)]
        data, offset, large = {}, 0, frozenset(plan.large)
        for number, (name, size) in enumerate(plan.entries):
            if number not in large:
                data[number] = Record.of(name, plan.small[offset : offset + size])
                offset += size
        for number, record in zip(plan.large, self._large, strict=False):
            if record.size_bytes != plan.entries[number][1]:
                break
            data[number] = record
        return data


class _Round:
    """A file of rank 0's state that all write; rank 0's."""

    def __init__(
        self, ranks: Collectives, note: Callable[[str | None], object], found: Pickled, large: list[int], writers: Sequence[int]
    ) -> None:
        self._ranks = ranks
        self._note = note
        self._records = list(found)
        self._entries = [(record.name, record.size_bytes) for record in self._records]
        self._large = large
        self._layout = Layout(self._entries)
        shares = divided(self._layout, len(writers))
        # Rank 0 has the last one, and goes on with the end of the file.
        self._shares = dict(zip([*writers[1 : len(shares)], writers[0]], shares, strict=True))

    @property
    def writers(self) -> int:
        """How many have a share."""
        return len(self._shares)

    def lead(self, descriptor: int) -> tuple[int, str]:
        """Have all write an empty file, durably; returns (size in bytes, digest).

        Raises:
            OSError: a writer's, or rank 0's own.
            RankFailedError: a writer failed in another way.
        """
        large = frozenset(self._large)
        small = b"".join(bytes(record.load()) for number, record in enumerate(self._records) if number not in large)
        self._ranks.broadcast(_Plan(os.readlink(f"/proc/self/fd/{descriptor}"), self._entries, self._large, small, self._shares))
        with ThreadPoolExecutor(1, "hpcckpt-check") as pool:
            # Nothing may be raised before all have answered.
            checks: Future[dict[int, bytes]] | None = None
            own, error = None, None
            try:
                checks = pool.submit(self._expected)
                own = self._filled(descriptor, self._shares[0])
            except Exception as failure:  # noqa: BLE001 - raised below
                error = failure
            answers: list[_Answer | None] = self._ranks.gather(None)
            if error is not None:
                raise error
            _raise_failures(answers)
            expected = {} if checks is None else checks.result()
        tree = Blocks()
        crcs: dict[int, int] = {}
        for rank, share in self._shares.items():
            filled = own if rank == 0 else self._accepted(rank, answers[rank], expected[rank])
            if filled is None:
                filled = self._filled(descriptor, share)
            tree.append(filled.leaves)
            crcs |= filled.crcs
        tree.append(fill_end(descriptor, self._layout, None if own is None else own.rest, crcs))
        os.fsync(descriptor)
        return self._layout.size_bytes, tree.text()

    def _expected(self) -> dict[int, bytes]:
        """Return what other ranks have to have seen in their shares."""
        load: Load = self._load
        return {rank: seen_for(self._layout, share, load, self._large) for rank, share in self._shares.items() if rank != 0}

    def _accepted(self, rank: int, answer: _Answer | None, expected: bytes) -> Filled | None:
        """Return what a rank has written, if it is rank 0's state; else say so."""
        filled = None if answer is None else answer.filled
        if answer is None or (filled is not None and filled.seen == expected):
            return filled
        what = answer.lacks or "differs from"
        self._note(
            f"checkpoint.writers: the state of rank {rank} on {answer.host} {what} rank 0's, which is saved; rank 0 writes its share"
        )
        return None

    def _filled(self, descriptor: int, share: Share) -> Filled:
        return fill(descriptor, self._layout, share, self._load, self._large)

    def _load(self, number: int) -> memoryview:
        return self._records[number].load()


def _raise_failures(answers: Sequence[_Answer | None]) -> None:
    for rank, answer in enumerate(answers):
        if answer is not None and answer.failure is not None:
            number, text = answer.failure
            raise OSError(number, f"rank {rank} on {answer.host}: {text}")
        if answer is not None and answer.error is not None:
            raise RankFailedError(f"rank {rank} on {answer.host} failed: {answer.error}")
