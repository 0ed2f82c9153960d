"""The place in an iterable dataset, which only the dataset itself knows: its state is taken, kept for each rank, and given back."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from hpcckpt.data.place import Place
from hpcckpt.data.samples import SeededStream
from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.state.rng import derive_seed

# The states of all ranks, in a checkpoint; and this rank's own, here.
STATES, _MINE = "states", "mine"


class StreamPlace(Place):
    """The place of a loader over an iterable dataset; the position has the state of every rank's dataset, and workers."""

    def __init__(self, stream: SeededStream, *, rank: int, world_size: int, num_workers: int, seed: int, number: int) -> None:
        super().__init__(number)
        self._stream = stream
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._seed = seed
        self.generator = torch.Generator()
        # torchdata's, where there are workers; else the dataset in this process is asked.
        self.loader: DataLoader[Any] | None = None

    def position(self, epoch: int) -> dict[str, Any] | None:
        """As `Place.position`, without the streams' own states: see `state`."""
        position = super().position(epoch)
        return None if position is None else {key: value for key, value in position.items() if key != _MINE}

    def state(self, epoch: int) -> dict[str, Any] | None:
        """Return this rank's part of the position: where the last step left its stream. Between batches only."""
        position = super().position(epoch)
        if position is None or position["is_over"]:
            return None
        mine: dict[str, Any] = self._now() if self._stepped else position[_MINE]
        return mine

    def end(self, *, is_exhausted: bool = True) -> None:
        """As `Place.end`."""
        mine = self._now() if self._stepped and not is_exhausted else None
        super().end(is_exhausted=is_exhausted)
        if self._left is not None:
            self._left = {**self._left, _MINE: mine}

    def restore(self, epoch: int, position: Mapping[str, Any]) -> None:
        """As `Place.restore`; the states of all ranks are in the position."""
        self._check(position)
        rest = {key: value for key, value in position.items() if key != STATES}
        # A copy: the file may be mapped into memory.
        mine = None if position["is_over"] else copy.deepcopy(position[STATES][self._rank])
        super().restore(epoch, {**rest, _MINE: mine})

    def _now(self) -> dict[str, Any]:
        # A copy: the dataset may go on with the very same object.
        return copy.deepcopy(dict(self._source.state_dict()))

    @property
    def _source(self) -> Any:
        return self._stream if self.loader is None else self.loader

    def _enter(self, position: Mapping[str, Any] | None) -> None:
        set_epoch = getattr(self._stream.hpcckpt_dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self._epoch)
        seed = derive_seed(self._seed, "stream", self.number, self._epoch, self._rank)
        self.generator.manual_seed(seed)
        self._stream.hpcckpt_seed = seed
        self.is_skipped = position is not None and bool(position["is_over"])
        if position is not None and not self.is_skipped:
            self._source.load_state_dict(copy.deepcopy(position[_MINE]))

    def _behind_step(self) -> dict[str, Any]:
        return {"num_workers": self._num_workers}

    def _over(self) -> dict[str, Any]:
        return {"num_workers": self._num_workers}

    def _is_end(self, position: Mapping[str, Any]) -> bool:
        return bool(position["is_over"])

    def _check(self, position: Mapping[str, Any]) -> None:
        if "num_workers" not in position:
            raise CheckpointMismatchError(
                f"loader {self.number} has an iterable dataset, but had one with a length when the epoch was interrupted: bring it back, "
                "or go on from the end of an epoch (resume.epoch=…)"
            )
        if position["is_over"] or _MINE in position:
            return
        then, now = (len(position[STATES]), position["num_workers"]), (self._world_size, self._num_workers)
        if then != now:
            raise CheckpointMismatchError(
                f"loader {self.number} has an iterable dataset, whose place within an epoch fits {then[0]} ranks with "
                f"num_workers={then[1]} only, not {now[0]} with {now[1]}: go on as before, or from the end of an epoch (resume.epoch=…)"
            )
