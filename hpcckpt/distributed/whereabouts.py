"""Where each rank is: its tick, and the place in the user's code where its training is. For messages about a rank that hangs."""

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

# Frames that say nothing of the user's code.
_INNARDS = tuple(f"{path}{os.sep}" for path in (Path(__file__).parents[1], Path(torch.__file__).parent))
_LIBRARY = f"{sysconfig.get_path('stdlib')}{os.sep}"
_PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank was when it was asked; `tick` and `place` are None if it gave no answer in time, `name` says host and process."""

    rank: int
    name: str
    tick: int | None
    place: str | None

    @property
    def answers(self) -> bool:
        """Whether the rank's background thread answers at all."""
        return self.tick is not None


def place_of(thread: int) -> str:
    """Return where a thread of this process is, "train.py:31 in step": its innermost call in code that is neither torch's nor ours."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - the documented way
    if frame is None:
        return "its end"
    calls = [(call.f_code.co_filename, line, call.f_code.co_name) for call, line in traceback.walk_stack(frame)]
    file, line, function = next((call for call in calls if not _is_innards(call[0])), calls[0])
    return f"{Path(file).name}:{line} in {function}"


def in_words(ranks: Iterable[Whereabouts]) -> str:
    """Return one line, ranks at one place together: "ranks 0,1,3 at train.py:31 in step; rank 2 (n3, pid 77) gives no answer"."""
    groups: dict[str, list[Whereabouts]] = {}
    for rank in ranks:
        groups.setdefault(f"at {rank.place}" if rank.answers else "no answer", []).append(rank)
    silent = groups.pop("no answer", [])
    told = [f"rank{'s' * (len(group) > 1)} {','.join(str(rank.rank) for rank in group)} {where}" for where, group in groups.items()]
    return "; ".join([*told, *(f"{rank.name} gives no answer" for rank in silent)])


def _is_innards(file: str) -> bool:
    is_library = file.startswith(_LIBRARY) and not any(f"{os.sep}{name}{os.sep}" in file for name in _PACKAGES)
    return file.startswith(("<", *_INNARDS)) or is_library
