"""Save and restore over ranks: rank 0 touches the files, and what happens to it happens to all.

Both are collectives, and neither can leave a rank waiting: whatever rank 0 meets (a full disk, a damaged file, a newer
attempt) is raised on every rank.
"""

import copy
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hpcckpt.distributed import Collectives, Ranks
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.layout import RunLayout
from hpcckpt.reading import read_content
from hpcckpt.state.foreign import fitted, model_state_in
from hpcckpt.state.rng import derive_seed, rng_state, seed_all, set_rng_state
from hpcckpt.state.tracked import FORMAT_VERSION, Tracked, check_version
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import reading
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


def collected(ranks: Collectives, tracked: Tracked, boundary: Mapping[str, Any] | None = None) -> Callable[[], dict[str, Any]]:
    """Return what gives rank 0 the state of all objects, after gathering what is spread over ranks. Every rank must call it."""
    if not tracked.has_sharded():
        return lambda: tracked.state(boundary)
    state = ranks.together(lambda: tracked.state(boundary, is_main=ranks.is_main))
    return lambda: state


def commit(
    store: CheckpointStore,
    position: Position,
    state: dict[str, Any],
    *,
    metrics: Mapping[str, float],
    wrapper: str,
    generators: list[dict[str, Any]],
    data_state: dict[str, Any],
    name: str | None = None,
    is_best: bool = False,
) -> Path:
    """Write one checkpoint file (docs/reference/format.md) and its manifest; returns its path. Rank 0 alone.

    Args:
        store: where it goes.
        position: what it is the state of.
        state: `Tracked.state`.
        metrics: of its epoch; each a number, or a tensor of one element.
        wrapper: `Tracked.wrapper`.
        generators: `rng_state` of each rank.
        data_state: the position in each loader.
        name: of the user's own, as `CheckpointStore.commit` takes it.
        is_best: recorded in the manifest.

    Raises:
        CheckpointSaveError, FencedError, UsageError: as `CheckpointStore.commit`.
    """
    numbers = plain_metrics(metrics)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "epoch": position.epoch,
        "step": position.step,
        **state,
        "metrics": numbers,
        "world_size": len(generators),
        "saved_with_wrapper": wrapper,
        "rng_state": generators,
        "data_state": {"epoch_finished": position.epoch_finished, **data_state},
    }
    manifest: dict[str, Any] = {
        "metrics": numbers,
        "world_size": len(generators),
        "saved_with_wrapper": wrapper,
        "versions": {
            "hpcckpt": metadata.version("hpcckpt"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        **({"is_best": True} if is_best else {}),
    }
    return store.commit(
        position.epoch,
        position.step,
        epoch_finished=position.epoch_finished,
        write=lambda file: torch.save(content, file),
        manifest=manifest,
        name=name,
    )


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain floats, which any reader of the file understands.

    Raises:
        UsageError: one is no number; names it.
    """
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"metrics: {name} is a {type(value).__name__}, not a number; leave it out, or give its mean, say") from None
    return numbers


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
        state = collected(self._ranks, self._tracked, earlier)
        self._ranks.from_main(lambda: self._commit(position, state(), metrics, data_state, reason, generators))
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
        path, weights_only, strict = Path(chosen[0]), chosen[1], chosen[2]
        return self._ranks.together(lambda: self._load(path, weights_only=weights_only, strict=strict))

    def _commit(
        self,
        position: Position,
        state: dict[str, Any],
        metrics: dict[str, float],
        data_state: dict[str, Any],
        reason: str,
        generators: list[dict[str, Any]],
    ) -> None:
        began = time.monotonic()
        path = commit(
            self._store, position, state, metrics=metrics, wrapper=self._tracked.wrapper(), generators=generators, data_state=data_state
        )
        self._ledger.append(
            "saved", file=path.name, epoch=position.epoch, step=position.step, reason=reason, save_s=round(time.monotonic() - began, 4)
        )

    def _choose(self) -> tuple[str, bool, bool] | None:
        """Return (file, whether its weights only, whether all of them have to fit) to begin with. Rank 0."""
        request = resume.apply(self._layout, self._store)
        newest = self._store.recover(lambda problem: self._ledger.append("damaged", problem=problem))
        if newest is not None:
            return str(self._store.path(newest.name)), False, True
        if request is not None and request["origin"] is not None:
            return request["origin"], bool(request["weights_only"]), bool(request.get("strict", True))
        return None

    def _load(self, path: Path, *, weights_only: bool, strict: bool) -> Restored:
        own = path.parent == self._layout.checkpoints
        # Marked as being read: no process deletes it meanwhile.
        with reading(path) if own else nullcontext():
            return self._load_content(read_content(path, follow_symlinks=not own), path, weights_only=weights_only, strict=strict, own=own)

    def _load_content(self, content: Any, path: Path, *, weights_only: bool, strict: bool, own: bool) -> Restored:
        if weights_only:
            notes = self._tracked.load_weights(self._weights(content, path), strict=strict)
            seed = derive_seed(self._seed, "rank", self._ranks.rank)
            return Restored(path=path, put_back=lambda: seed_all(seed), notes=("weights only: a new run begins from them", *notes))
        place = _place_in(content, path)
        self._tracked.load(content)
        if own:
            self._newest = place.position
        small = self._tracked.small_state()
        apply_rng, notes = self._generators(content)

        def put_back() -> None:
            self._tracked.put_back(small)
            apply_rng()

        return replace(place, put_back=put_back, notes=notes)

    def _weights(self, content: Any, path: Path) -> dict[str, Mapping[str, Any]]:
        """Return the state of each tracked module that a file has: one of a run, or of any other program."""
        names = self._tracked.module_names()
        if isinstance(content, dict) and "format_version" in content:
            check_version(content, path)
            saved = {name: content[f"{name}_state_dict"] for name in names if f"{name}_state_dict" in content}
            # Matched as any other file's: save_dataparallel_checkpoint may have kept a wrapper's names.
            return {name: fitted(state, set(names[name])) for name, state in saved.items()}
        target = "model" if "model" in names else next(iter(names), None)
        if target is None or ("model" not in names and len(names) > 1):
            raise CheckpointMismatchError(
                f"the file holds one model and the run tracks {', '.join(names) or 'none'}: track the one that it is for as `model`"
            )
        return {target: fitted(model_state_in(content), set(names[target]))}

    def _generators(self, content: dict[str, Any]) -> tuple[Callable[[], None], tuple[str, ...]]:
        saved = content["rng_state"]
        if len(saved) == self._ranks.world_size:
            # A copy: the file may be mapped into memory, and this is needed later.
            mine = copy.deepcopy(saved[self._ranks.rank])
            return lambda: set_rng_state(mine), ()
        seed = derive_seed(self._seed, "rank", self._ranks.rank, content["step"])
        note = (
            f"saved by {len(saved)} ranks and restored on {self._ranks.world_size}: every sample is still seen once, but random "
            "generators are seeded anew and the result is no longer bit-exact"
        )
        return lambda: seed_all(seed), (note,)


def _place_in(content: Any, path: Path) -> Restored:
    """Return the place in training that a run's checkpoint holds.

    Raises:
        CheckpointMismatchError: it is none of a run, or of a later format.
    """
    weights = "its weights can be had with resume.weights_only=true"
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise CheckpointMismatchError(f"{path}: is no checkpoint of hpcckpt (it has no format_version); {weights}")
    check_version(content, path)
    missing = [key for key in ("epoch", "step", "metrics", "rng_state", "data_state") if key not in content]
    if missing:
        raise CheckpointMismatchError(f"{path}: is no place in training, it lacks {', '.join(missing)}; {weights}")
    data_state = content["data_state"]
    try:
        position = Position(int(content["epoch"]), int(content["step"]), bool(data_state["epoch_finished"]))
        return Restored(position, path, dict(content["metrics"]), dict(data_state["loaders"]), data_state["last_loader"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(
            f"{path}: its place in training cannot be read ({type(error).__name__}: {error}); {weights}"
        ) from None
