"""`DDPCheckpointManager`: checkpoints for a training loop that is not a `Run`. The same files, the same commit."""

import logging
import operator
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hpcckpt.checkpoint import collected
from hpcckpt.content import plain_metrics, prepared
from hpcckpt.distributed import Collectives
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError, TaskEnvironmentError, UsageError
from hpcckpt.layout import RunLayout, parse_checkpoint_name
from hpcckpt.policy import Position, Retention
from hpcckpt.reading import read_content
from hpcckpt.state.conditions import conditions
from hpcckpt.state.foreign import fitted, model_state_in
from hpcckpt.state.model import portable_names
from hpcckpt.state.rng import rng_state, set_rng_state
from hpcckpt.state.tracked import Stateful, Tracked, check_version
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import reading

_log = logging.getLogger("hpcckpt")
# How often another file is looked for because a run has deleted the chosen one meanwhile.
_RETRIES = 20


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
        if keep_last is not None and keep_last < 2:
            raise UsageError(
                f"keep_last={keep_last}: give at least 2, so that a damaged newest one has one to fall back on, or None for all"
            )
        if locking not in ("flock", "off"):
            raise UsageError(f"locking={locking!r}: give flock or off")
        # A symlink here is the caller's own choice of a place.
        folder = self.checkpoint_dir.expanduser().resolve()
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
        filename: str | os.PathLike[str] | None = None,
    ) -> str | None:
        """Save the end of `epoch`, durably; returns the path on rank 0, None on the others. Every rank must call it.

        Args:
            model: with any wrappers; the file has none of their names.
            optimizer: or None.
            epoch: the one that is finished, counted from 0.
            metrics: numbers that `load` returns.
            scheduler: or anything else with a state.
            is_best: let `best_model.pt` be this one, until another one is.
            filename: of your own in place of checkpoint_epochNNNN.pt. Such a file is neither deleted nor found by a plain `load`.

        Checkpoints of later epochs, of training before you went back to this one, move to superseded/.

        Raises:
            CheckpointSaveError, FencedError, RunDirectoryError, UsageError: on every rank; everything older is intact.
        """
        tracked, position = self._ranks.together(lambda: (self._tracked(model, optimizer, scheduler), _end_of(epoch)))
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        of_ranks = self._ranks.gather((rng_state(), conditions(device)))
        state = collected(self._ranks, tracked)
        name = None if filename is None else os.fspath(filename)
        path = self._ranks.from_main(
            lambda: str(self._commit(position, state(), tracked.wrapper(), metrics or {}, of_ranks, name, is_best=is_best))
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
        with ExitStack() as marks:
            chosen = self._ranks.from_main(lambda: self._choose(filepath, marks, load_best=load_best))
            if chosen is None:
                return -1, {}
            return self._ranks.together(lambda: self._load(Path(chosen), model, optimizer, scheduler, load_best=load_best))

    def _commit(
        self,
        position: Position,
        state: dict[str, Any],
        wrapper: str,
        metrics: Mapping[str, float],
        of_ranks: list[tuple[dict[str, Any], dict[str, Any]]],
        filename: str | None,
        *,
        is_best: bool,
    ) -> Path:
        numbers = plain_metrics(metrics)  # before anything is moved
        if not self._claimed:
            # Not before the first save: whoever only loads must not fence off a run that is training.
            try:
                task = TaskEnvironment.from_environ(os.environ)
                self._store.claim(task.job_id, task.incarnation, share=True)
            except TaskEnvironmentError:
                self._store.claim(None, share=True)
            self._claimed = True
        if filename is None:
            self._supersede(position.epoch)
        checkpoint = prepared(
            position,
            state,
            metrics=numbers,
            wrapper=wrapper,
            generators=[generators for generators, _ in of_ranks],
            conditions=[here for _, here in of_ranks],
            data_state={"loaders": {}, "last_loader": None},
            name=filename,
            is_best=is_best,
        )
        path = checkpoint.commit(self._store)
        _log.info("%s: saved epoch %d", path, position.epoch)
        return path

    def _supersede(self, epoch: int) -> None:
        """Move checkpoints behind this epoch away: they are of training that is not gone on with."""
        infos = self._store.infos()
        later = [info.name for info in infos if info.epoch > epoch]
        if later:
            self._store.rewind(next((info.name for info in reversed(infos) if info.epoch <= epoch), None))
            _log.warning("%s: went back to epoch %d; moved to %s: %s", self._layout.checkpoints, epoch, self._layout.superseded, later)

    def _choose(self, filepath: str | os.PathLike[str] | None, marks: ExitStack, *, load_best: bool) -> str | None:
        """Return the file to load, verified where it has a manifest, and marked as being read. Rank 0."""
        for _ in range(_RETRIES):
            path = self._candidate(filepath, load_best=load_best)
            if path is None:
                return None
            try:
                # A run that trains in this directory must not delete it before all ranks have it.
                marks.enter_context(reading(path, follow_symlink=True))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CheckpointCorruptError(f"{path}: cannot be read ({error.strerror}); mend that, or give another path") from None
            return str(path)
        raise CheckpointNotFoundError(f"{self._layout.checkpoints}: what is there is deleted faster than it can be read; give a filepath")

    def _candidate(self, filepath: str | os.PathLike[str] | None, *, load_best: bool) -> Path | None:
        folder = self._layout.checkpoints
        if filepath is not None:
            path = Path(filepath).expanduser()
            own = folder / path
            # A bare name is one in this directory, if it is there.
            path = own if len(path.parts) == 1 and own.exists() else path.absolute()
            if not path.exists():
                there = ", ".join(sorted(entry.name for entry in folder.glob("*.pt"))) or "no checkpoint"
                raise CheckpointNotFoundError(f"{filepath}: there is no such file; {folder} has {there}")
            self._store.verify(path)
            return path
        if load_best:
            if not self._layout.best.exists():
                raise CheckpointNotFoundError(f"{self._layout.best}: there is no best checkpoint; save(..., is_best=True) makes one")
            self._store.verify(self._layout.best)
            return self._layout.best
        newest = self._store.newest_good(lambda problem: _log.warning("%s", problem))
        if newest is not None:
            self._store.keep(newest.name)
            return self._store.path(newest.name)
        # Written by another program under these names: no manifest to verify them by.
        names = os.listdir(folder) if folder.is_dir() else []
        bare = [(place, name) for name in names if (place := parse_checkpoint_name(name)) is not None]
        if bare:
            name = max(bare, key=lambda item: (item[0][0], item[0][1] is None, item[0][1] or 0))[1]
            _log.warning("%s has no manifest, so it cannot be verified", folder / name)
            return folder / name
        others = sorted(name for name in names if Path(name).suffix in (".pt", ".pth", ".ckpt", ".safetensors"))
        if others:
            raise CheckpointNotFoundError(
                f"{folder}: has files under other names only ({', '.join(others)}); give one of them as filepath, or another directory"
            )
        _log.info("%s: there is no checkpoint yet", folder)
        return None

    def _load(
        self, path: Path, model: torch.nn.Module, optimizer: Stateful | None, scheduler: Stateful | None, *, load_best: bool
    ) -> tuple[int, dict[str, float]]:
        content = read_content(path)
        state = model_state_in(content)
        epoch, metrics, generators = _place_in(content, path)
        own = fitted(state, set(portable_names(model).values()))
        self._tracked(model, optimizer, scheduler).load({**content, "model_state_dict": own})
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
        return epoch, metrics

    @staticmethod
    def _tracked(model: torch.nn.Module, optimizer: Stateful | None, scheduler: Stateful | None) -> Tracked:
        tracked = Tracked()
        for name, value in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
            if value is not None:
                tracked.add(name, value)
        return tracked


def _end_of(epoch: int) -> Position:
    try:
        number = operator.index(epoch)
    except TypeError:
        raise UsageError(f"epoch={epoch!r}: give a whole number") from None
    if number < 0 or isinstance(epoch, bool):
        raise UsageError(f"epoch={epoch!r}: epochs count from 0")
    return Position(number, 0, epoch_finished=True)


def _place_in(content: Mapping[str, Any], path: Path) -> tuple[int, dict[str, float], list[dict[str, Any]]]:
    """Return (last finished epoch, metrics, generators of each rank) of a file, which may be another program's.

    Raises:
        CheckpointMismatchError: it says something that is none of these.
    """
    check_version(content, path)
    epoch = content.get("epoch", -1)
    if not isinstance(epoch, int) or isinstance(epoch, bool):
        raise CheckpointMismatchError(f"{path}: its epoch is {epoch!r}, which is no whole number; load the weights with load_weights")
    if "format_version" not in content:
        metrics = content.get("metrics")
        return epoch, dict(metrics) if isinstance(metrics, Mapping) else {}, []
    if not content.get("data_state", {}).get("epoch_finished", True):
        _log.warning("%s: was saved within epoch %d, which begins anew", path, epoch)
        epoch -= 1
    return epoch, dict(content.get("metrics") or {}), list(content.get("rng_state") or [])
