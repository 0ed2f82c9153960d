"""`DDPCheckpointManager`: checkpoints for a training loop that is not a `Run`. The same files, the same commit."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpcckpt.checkpoint import Position, collected, commit
from hpcckpt.distributed import Collectives
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import CheckpointMismatchError, CheckpointNotFoundError, TaskEnvironmentError
from hpcckpt.layout import RunLayout, parse_checkpoint_name
from hpcckpt.policy import Retention
from hpcckpt.reading import read_content
from hpcckpt.state.foreign import fit_names, model_state_in, renamed
from hpcckpt.state.model import portable_names
from hpcckpt.state.rng import rng_state, set_rng_state
from hpcckpt.state.tracked import Stateful, Tracked
from hpcckpt.store.checkpoints import CheckpointStore

_log = logging.getLogger("hpcckpt")


class DDPCheckpointManager:
    """Saves and loads checkpoints of DDP training in one directory. Every rank must create one and call its methods together.

    Rank 0 saves; all ranks load, after rank 0 has chosen and verified the file; what fails on one rank is raised on all. Files
    are those of a run (docs/reference/format.md), with the newest under `latest.json` and the best as `best_model.pt`.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        rank: int,
        world_size: int,
        *,
        keep_last: int | None = None,
        locking: str = "flock",
    ) -> None:
        """Attach to the process group there is.

        Args:
            checkpoint_dir: made at the first save.
            rank: of this process.
            world_size: how many there are; 1 needs no process group.
            keep_last: how many checkpoints stay, the best one beside them; None: all.
            locking: "off" for a file system without flock.

        Raises:
            UsageError: there is no process group, or not one of these numbers.
        """
        self.checkpoint_dir = Path(checkpoint_dir)
        self.rank = rank
        self.world_size = world_size
        self._ranks = Collectives.attached(rank, world_size)
        folder = self.checkpoint_dir.absolute()
        self._layout = RunLayout(folder.parent, folder.name)
        self._store = CheckpointStore(self._layout, Retention(keep_last), locking)
        self._claimed = False

    def save(
        self,
        model: torch.nn.Module,
        optimizer: Stateful | None,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        scheduler: Stateful | None = None,
        is_best: bool = False,
        filename: str | None = None,
    ) -> str | None:
        """Save the end of `epoch`, durably; returns the path on rank 0, None on the others. Every rank must call it.

        Args:
            model: with any wrappers; the file has none of their names.
            optimizer: or None.
            epoch: the one that is finished, counted from 0.
            metrics: numbers that `load` returns.
            scheduler: or anything else with a state.
            is_best: let `best_model.pt` be this one.
            filename: of your own in place of checkpoint_epochNNNN.pt. Such a file is neither deleted nor found by a plain `load`.

        Raises:
            CheckpointSaveError, FencedError, RunDirectoryError, UsageError: on every rank; everything older is intact.
        """
        tracked = self._tracked(model, optimizer, scheduler)
        generators = self._ranks.gather(rng_state())
        state = collected(self._ranks, tracked)
        position = Position(epoch, 0, epoch_finished=True)
        path = self._ranks.from_main(
            lambda: str(self._commit(position, state(), tracked.wrapper(), dict(metrics or {}), generators, filename, is_best=is_best))
        )
        return path if self._ranks.is_main else None

    def load(
        self,
        model: torch.nn.Module,
        optimizer: Stateful | None = None,
        filepath: str | os.PathLike[str] | None = None,
        load_best: bool = False,
        scheduler: Stateful | None = None,
        map_location: object = None,
    ) -> tuple[int, dict[str, float]]:
        """Load the newest checkpoint, or another one, on every rank; returns (epoch, metrics). Every rank must call it.

        The epoch is the last one that is finished, and -1 where there is no checkpoint yet, so that training goes on with the
        next one in every case: `start = manager.load(model, optimizer)[0] + 1`. Random number generators go on as they
        were saved, if an optimizer is given and the number of ranks is the same.

        Args:
            model: with any wrappers, whatever it was saved with.
            optimizer: None for the weights alone.
            filepath: a checkpoint's path, or its name in the directory; also of another program (see `load_checkpoint_universal`).
            load_best: the one that was saved with `is_best`.
            scheduler: None, or one that was saved, too.
            map_location: without effect: state goes over the CPU to the devices that model and optimizer are on.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError: on every rank.
        """
        del map_location
        chosen = self._ranks.from_main(lambda: self._choose(filepath, load_best=load_best))
        if chosen is None:
            return -1, {}
        return self._ranks.together(lambda: self._load(Path(chosen), model, optimizer, scheduler, load_best=load_best))

    def _commit(
        self,
        position: Position,
        state: dict[str, Any],
        wrapper: str,
        metrics: dict[str, float],
        generators: list[dict[str, Any]],
        filename: str | None,
        *,
        is_best: bool,
    ) -> Path:
        if not self._claimed:
            # Not before the first save: whoever only loads must not fence off a run that is training.
            try:
                task = TaskEnvironment.from_environ(os.environ)
                self._store.claim(task.job_id, task.restart_count)
            except TaskEnvironmentError:
                self._store.claim(None)
            self._claimed = True
        path = commit(
            self._store,
            position,
            state,
            metrics=metrics,
            wrapper=wrapper,
            generators=generators,
            data_state={"loaders": {}, "last_loader": None},
            name=filename,
            is_best=is_best,
        )
        _log.info("%s: saved epoch %d", path, position.epoch)
        return path

    def _choose(self, filepath: str | os.PathLike[str] | None, *, load_best: bool) -> str | None:
        """Return the file to load, verified where it has a manifest. Rank 0."""
        folder = self._layout.checkpoints
        if filepath is not None:
            path = Path(filepath)
            path = path if path.exists() or path.is_absolute() else folder / path
            if not path.exists():
                there = ", ".join(sorted(entry.name for entry in folder.glob("*.pt"))) or "no checkpoint"
                raise CheckpointNotFoundError(f"{filepath}: there is no such file; {folder} has {there}")
            self._store.verify(path)
            return str(path.absolute())
        if load_best:
            if not self._layout.best.exists():
                raise CheckpointNotFoundError(f"{self._layout.best}: there is no best checkpoint; save(..., is_best=True) makes one")
            self._store.verify(self._layout.best)
            return str(self._layout.best)
        newest = self._store.newest_good(lambda problem: _log.warning("%s", problem))
        if newest is not None:
            return str(self._store.path(newest.name))
        # Written by another program under these names: no manifest to verify them by.
        names = os.listdir(folder) if folder.is_dir() else []
        bare = [(place, name) for name in names if (place := parse_checkpoint_name(name)) is not None]
        if bare:
            name = max(bare, key=lambda item: (item[0][0], item[0][1] is None, item[0][1] or 0))[1]
            _log.warning("%s has no manifest, so it cannot be verified", folder / name)
            return str(folder / name)
        others = self._store.names()
        if others:
            raise CheckpointNotFoundError(
                f"{folder}: has checkpoints under names of your own only ({', '.join(others)}); give one of them as filepath"
            )
        return None

    def _load(
        self, path: Path, model: torch.nn.Module, optimizer: Stateful | None, scheduler: Stateful | None, *, load_best: bool
    ) -> tuple[int, dict[str, float]]:
        content = read_content(path)
        state = model_state_in(content)
        fitting = fit_names(state, set(portable_names(model).values()))
        self._tracked(model, optimizer, scheduler).load({**content, "model_state_dict": renamed(state, fitting)})
        generators = content.get("rng_state", [])
        if optimizer is not None and not load_best:
            if len(generators) == self.world_size:
                set_rng_state(generators[self.rank])
            elif self._ranks.is_main:
                _log.warning(
                    "%s: holds random number generators of %d ranks, and there are %d: they stay as they are, so the result is not "
                    "bit-exact",
                    path,
                    len(generators),
                    self.world_size,
                )
        epoch = content.get("epoch", -1)
        if not isinstance(epoch, int):
            raise CheckpointMismatchError(f"{path}: its epoch is {epoch!r}, which is no number")
        return epoch, dict(content.get("metrics") or {})

    @staticmethod
    def _tracked(model: torch.nn.Module, optimizer: Stateful | None, scheduler: Stateful | None) -> Tracked:
        tracked = Tracked()
        for name, value in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
            if value is not None:
                tracked.add(name, value)
        return tracked
