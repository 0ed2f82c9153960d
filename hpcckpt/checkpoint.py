"""Save and restore over ranks: rank 0 touches the files, and what happens to it happens to all.

Both are collectives, and neither can leave a rank waiting: whatever rank 0 meets (a full disk, a damaged file, a newer
attempt) is raised on every rank.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hpcckpt.distributed import Ranks
from hpcckpt.errors import CheckpointCorruptError, CheckpointMismatchError
from hpcckpt.layout import RunLayout
from hpcckpt.state.rng import derive_seed, rng_state, seed_all, set_rng_state
from hpcckpt.state.tracked import FORMAT_VERSION, Tracked
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger


@dataclass(frozen=True)
class Position:
    """A place in training: behind optimizer step `step`, within `epoch` or at its end."""

    epoch: int
    step: int
    epoch_finished: bool

    def __str__(self) -> str:
        """Return it in words."""
        return f"{'the end of epoch' if self.epoch_finished else 'epoch'} {self.epoch}, step {self.step}"


@dataclass(frozen=True)
class Boundary:
    """What may change without a training step, copied where the last one ended: an evaluation and a scheduler's step follow
    it, and a stop among them must not save those half done.
    """

    rng: dict[str, Any]
    tracked: dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a start goes on from; `position` is None where it begins anew."""

    position: Position | None = None
    path: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    loaders: dict[str, dict[str, int]] = field(default_factory=dict)
    # In whose loop the last step was made; generators go on there.
    last_loader: str | None = None
    # Puts back generators, schedulers and hyperparameters once more, where the last step was made: the script has run again what
    # comes before, and had drawn and stepped there before the interruption, too.
    put_back: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()


class Checkpointer:
    """Saves and restores tracked objects. Every rank must create one and call its methods together."""

    def __init__(self, ranks: Ranks, layout: RunLayout, store: CheckpointStore, ledger: Ledger, tracked: Tracked, seed: int) -> None:
        self._ranks = ranks
        self._layout = layout
        self._store = store
        self._ledger = ledger
        self._tracked = tracked
        self._seed = seed
        self._newest: Position | None = None

    def boundary(self) -> Boundary:
        """Return a copy of what may change between here and the next training step."""
        return Boundary(rng_state(), self._tracked.small_state())

    def save(
        self,
        position: Position,
        metrics: dict[str, float],
        data_state: dict[str, Any],
        reason: str,
        boundary: Boundary | None = None,
    ) -> None:
        """Commit a checkpoint of this position; nothing happens where the newest one is of this position already.

        Every rank must call it. `boundary` was taken at the position, if that is not now.

        Raises:
            CheckpointSaveError, FencedError: on every rank; everything older is intact.
        """
        if position == self._newest:
            return
        generators = self._ranks.gather(rng_state() if boundary is None else boundary.rng)
        earlier = None if boundary is None else boundary.tracked
        self._ranks.from_main(lambda: self._commit(position, metrics, data_state, reason, earlier, generators))
        self._newest = position

    def restore(self) -> Restored:
        """Load what this start goes on from into the tracked objects of every rank.

        Every rank must call it. Rank 0 decides which file, after verifying it; all load that one.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError: on every rank.
        """
        chosen = self._ranks.from_main(self._choose)
        if chosen is None:
            seed = derive_seed(self._seed, "rank", self._ranks.rank)
            return Restored(put_back=lambda: seed_all(seed))
        path, weights_only = Path(chosen[0]), chosen[1]
        return self._ranks.together(lambda: self._load(path, weights_only=weights_only))

    def _commit(
        self,
        position: Position,
        metrics: dict[str, float],
        data_state: dict[str, Any],
        reason: str,
        earlier: dict[str, Any] | None,
        generators: list[dict[str, Any]],
    ) -> None:
        began = time.monotonic()
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "epoch": position.epoch,
            "step": position.step,
            **self._tracked.state(earlier),
            "metrics": metrics,
            "world_size": self._ranks.world_size,
            "saved_with_wrapper": self._tracked.wrapper(),
            "rng_state": generators,
            "data_state": {"epoch_finished": position.epoch_finished, **data_state},
        }
        versions = {
            "hpcckpt": metadata.version("hpcckpt"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        path = self._store.commit(
            position.epoch,
            position.step,
            epoch_finished=position.epoch_finished,
            write=lambda file: torch.save(content, file),
            manifest={
                "metrics": metrics,
                "world_size": self._ranks.world_size,
                "saved_with_wrapper": content["saved_with_wrapper"],
                "versions": versions,
            },
        )
        self._ledger.append(
            "saved", file=path.name, epoch=position.epoch, step=position.step, reason=reason, save_s=round(time.monotonic() - began, 4)
        )

    def _choose(self) -> tuple[str, bool] | None:
        request = resume.apply(self._layout, self._store)
        newest = self._store.newest_good(lambda problem: self._ledger.append("damaged", problem=problem))
        if newest is not None:
            return str(self._store.path(newest.name)), False
        if request is not None and request["origin"] is not None:
            return request["origin"], bool(request["weights_only"])
        return None

    def _load(self, path: Path, *, weights_only: bool) -> Restored:
        try:
            # Onto the CPU whatever it was saved from: each object moves its state to its own device.
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for bytes it cannot read
            raise CheckpointCorruptError(f"{path}: torch.load cannot read it ({type(error).__name__}: {error})") from error
        if not isinstance(content, dict) or "format_version" not in content:
            raise CheckpointMismatchError(f"{path}: is no checkpoint of hpcckpt (it has no format_version)")
        if content["format_version"] > FORMAT_VERSION:
            raise CheckpointMismatchError(
                f"{path}: was written in format {content['format_version']}, this version reads up to {FORMAT_VERSION}; upgrade hpcckpt"
            )
        self._tracked.load(content, weights_only=weights_only)
        if weights_only:
            seed = derive_seed(self._seed, "rank", self._ranks.rank)
            return Restored(path=path, put_back=lambda: seed_all(seed), notes=("weights only: a new run begins from them",))
        position = Position(content["epoch"], content["step"], content["data_state"]["epoch_finished"])
        if path.parent == self._layout.checkpoints:
            self._newest = position
        data_state, small = content["data_state"], self._tracked.small_state()
        apply_rng, notes = self._generators(content)

        def put_back() -> None:
            self._tracked.put_back(small)
            apply_rng()

        return Restored(position, path, content["metrics"], data_state["loaders"], data_state["last_loader"], put_back, notes)

    def _generators(self, content: dict[str, Any]) -> tuple[Callable[[], None], tuple[str, ...]]:
        saved = content["rng_state"]
        if len(saved) == self._ranks.world_size:
            return lambda: set_rng_state(saved[self._ranks.rank]), ()
        seed = derive_seed(self._seed, "rank", self._ranks.rank, content["step"])
        note = (
            f"saved by {len(saved)} ranks and restored on {self._ranks.world_size}: every sample is still seen once, but random "
            "generators are seeded anew and the result is no longer bit-exact"
        )
        return lambda: seed_all(seed), (note,)
