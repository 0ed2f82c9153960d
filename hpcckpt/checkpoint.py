"""Save and restore over ranks: rank 0 touches the files, and what happens to it happens to all.

Both are collectives, and neither can leave a rank waiting: whatever rank 0 meets (a full disk, a damaged file, a newer
attempt) is raised on every rank.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hpcckpt.background import Files
from hpcckpt.content import Prepared, conditions_of, prepared
from hpcckpt.crew import SharedFiles
from hpcckpt.data import STATES, Loops
from hpcckpt.distributed import Collectives, Ranks, has_varying_buckets
from hpcckpt.errors import FencedError
from hpcckpt.exactness import Exactness, per_rank
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Origin, Restored, SavedPlace, choose, place_in, read, weights_in
from hpcckpt.policy import Position
from hpcckpt.sharing import shared
from hpcckpt.state.conditions import differences, doubts
from hpcckpt.state.later import after_first_step, changed_by_steps, hold_steps
from hpcckpt.state.marks import Mark, changed_since, marked
from hpcckpt.state.overridden import given, overridden
from hpcckpt.state.portable import portable
from hpcckpt.state.rng import derive_seed, rng_state, seed_all, set_rng_state
from hpcckpt.state.tracked import Tracked


def collected(ranks: Collectives, tracked: Tracked, boundary: Mapping[str, Any] | None = None) -> Callable[[], dict[str, Any]]:
    """Return what gives rank 0 the state of all objects, after gathering what is spread over ranks. Every rank must call it."""
    if not tracked.has_sharded():
        return lambda: tracked.state(boundary)
    state = ranks.together(lambda: tracked.state(boundary, is_main=ranks.is_main))
    return lambda: state


@dataclass(frozen=True)
class Boundary:
    """What may change without a training step, copied where the last one ended: an evaluation and a scheduler's step follow
    it, and a stop among them must not save those half done.
    """

    rng: dict[str, Any]
    tracked: dict[str, Any]
    # What is too large to be copied, and must not change.
    mark: Mark
    # As `Recorder.lines`.
    lines: int


# Position, metrics and places.
_Place = tuple[Position, dict[str, float], dict[str, Any]]
# Saves that come again soon.
_REGULAR = ("every_steps", "every_minutes")
_NOTHING_TRAINS = ("stop", "left")
_TORN = (
    "checkpoint.staging=lazy: something else than an optimizer's step has changed parameters while they were copied; "
    "that save was given up, and from here on the training waits for the copy"
)


class Checkpointer:
    """Saves and restores tracked objects. Every rank must create one and call its methods together."""

    def __init__(
        self,
        ranks: Ranks,
        layout: RunLayout,
        tracked: Tracked,
        seed: int,
        here: Callable[[], dict[str, Any]],
        files: Files,
    ) -> None:
        """Take what it works on; `here` gives `state.conditions` of this rank."""
        self._ranks = ranks
        self._layout = layout
        self._tracked = tracked
        self._seed = seed
        self._here = here
        self._store, self._ledger = files.store, files.ledger
        self._background, self._skips, self._is_lazy = files.background, files.skips, files.is_lazy
        self._crew = files.crew if isinstance(files, SharedFiles) else None
        self._holds_steps = False
        self._given: dict[str, Any] = {}
        self._origin: Origin | None = None
        # Of one step's state more may be known later than when it was saved first. Rank 0's.
        self._newest: _Place | None = None
        # Steps and generators where the epoch began; those of the restored checkpoint until its epoch does.
        self._begun: tuple[int, dict[str, Any]] | None = None
        self._saved_begun: tuple[int, dict[str, Any]] | None = None

    def begin_epoch(self, step: int, lines: int) -> Boundary:
        """Note that an epoch begins; returns its boundary. Every rank must call it.

        Where a restart runs the epoch's beginning again, it draws what it drew there: `begun_step` and generators are those of then.
        """
        boundary = self.boundary(lines)
        self._begun, self._saved_begun = self._saved_begun, None
        if self._begun is None:
            self._begun = step, boundary.rng
        else:
            set_rng_state(self._begun[1])
        return boundary

    @property
    def begun_step(self) -> int:
        """How many steps lay behind the run where the epoch began."""
        return 0 if self._begun is None else self._begun[0]

    def boundary(self, lines: int) -> Boundary:
        """Return a copy of what may change between here and the next training step."""
        # Rank 0's modules are those that are saved.
        mark = marked(self._tracked.named_modules()) if self._ranks.is_main else {}
        return Boundary(rng_state(), self._tracked.small_state(), mark, lines)

    def changed_since(self, boundary: Boundary) -> tuple[str, ...]:
        """Return what has changed on rank 0 since then that the boundary has no copy of. Every rank must call it."""
        return self._ranks.from_main(lambda: tuple(changed_since(boundary.mark, self._tracked.named_modules())))

    def save(
        self,
        position: Position,
        metrics: dict[str, float],
        loops: Loops,
        reason: str,
        boundary: Boundary | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """Save a checkpoint of this position; nothing happens where the newest one is of it already, metrics and all.

        Every rank must call it. The state may change behind it; the checkpoint is there when `settle` has returned, or at once where
        `at_once` says so.

        Args:
            position: of the state.
            metrics: of its epoch.
            loops: where the loaders are.
            reason: for the ledger; one that comes again and again may be skipped.
            boundary: taken at the position, if that is not now.
            facts: join the data state.
            at_once: whether nothing trains meanwhile.

        Raises:
            CheckpointSaveError, FencedError: of this save or the one before, on every rank; everything older is intact.
        """
        called = time.monotonic()
        at_once = at_once or reason in _NOTHING_TRAINS
        data_state = {**loops.data_state(position.epoch), **(facts or {})}
        coming = position, dict(metrics), _where(data_state)
        # Metrics and facts are those of rank 0, which need not be the others'.
        if not self._ranks.from_main(lambda: self._is_wanted(coming, reason, at_once=at_once)):
            return
        of_ranks = self._ranks.collect(
            lambda: (
                rng_state() if boundary is None else boundary.rng,
                self._here(),
                portable(loops.streams(position.epoch), "the loaders' iterable datasets"),
                None if self._begun is None or position.epoch_finished else self._begun[1],
            )
        )
        if self._begun is not None and not position.epoch_finished:
            data_state["begun"] = {"step": self._begun[0], "rng_state": [begun for *_, begun in of_ranks]}
        for number, loader in data_state["loaders"].items():
            if number in of_ranks[0][2]:
                loader[STATES] = [streams[number] for _, _, streams, _ in of_ranks]
        state = collected(self._ranks, self._tracked, None if boundary is None else boundary.tracked)

        def commit() -> None:
            checkpoint = prepared(
                position,
                state(),
                wrapper=self._tracked.wrapper(),
                metrics=metrics,
                data_state=data_state,
                generators=[generators for generators, *_ in of_ranks],
                conditions=[here for _, here, *_ in of_ranks],
                hyperparameters=self._given,
            )
            self._commit(checkpoint, coming, reason, called, at_once=at_once)

        if self._crew is None:
            self._ranks.from_main(commit)
        else:
            self._crew.together(commit, state, "its state is sharded" if self._tracked.has_sharded() else None)

    def settle(self) -> None:
        """Return when everything that was saved is durable. Every rank must call it.

        Raises:
            CheckpointSaveError, FencedError: the last save could not be done; on every rank.
        """
        self._ranks.from_main(lambda: None if self._background is None else self._background.settle())

    def origin(self) -> Origin:
        """Return what this attempt goes on from; decided at the first call, by rank 0, which verifies it.

        Every rank must call it.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError: on every rank.
        """
        if self._origin is None:
            self._origin = self._ranks.from_main(lambda: choose(self._layout, self._store, self._ledger))
        return self._origin

    def restore(self, loops: Loops) -> Restored:
        """Load what this start goes on from into the tracked objects of every rank, and say how exactly.

        Every rank must call it; all load the same file. The places of `loops` are the caller's to restore.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError: on every rank.
        """
        origin = self.origin()
        path = origin.path
        self._given = given(self._tracked.objects())
        if path is None or origin.weights_only:
            self._prepare_at_first_step()
        if path is None:
            self._store.shelf.close()
            return Restored(origin, put_back=self._seeded())
        with shared(self._ranks, self._store.shelf, path, origin.digest) as source:
            restored: Restored = self._ranks.together(
                lambda: read(path, self._layout, lambda content: self._load(content, path, origin, loops), source)
            )
        if self._background is not None and self._crew is None and not origin.weights_only:
            with contextlib.suppress(OSError):  # gone, perhaps, if it is another run's; the other ranks must not wait for this one
                self._background.prepare(path.stat().st_size)
        if restored.exactness is None:
            return restored
        # What differs may do so on one rank only: another kind of GPU, say.
        mine = restored.exactness
        differs, doubts = zip(*self._ranks.gather((mine.differs, mine.doubts)), strict=True)
        return replace(restored, exactness=replace(mine, differs=per_rank(differs), doubts=per_rank(doubts)))

    def _is_wanted(self, coming: _Place, reason: str, *, at_once: bool) -> bool:
        """Return whether a save is to be done now, behind the one before. Rank 0."""
        if self._background is not None:
            if self._skips and reason in _REGULAR and self._background.is_busy:
                self._ledger.append("save_skipped", step=coming[0].step, reason=reason)
                return False
            try:
                self._background.settle()
            except FencedError:
                raise
            except Exception:
                if not at_once:  # else it was told, and this one, the last, may still do
                    raise
        return self._newest != coming

    def _commit(self, checkpoint: Prepared, coming: _Place, reason: str, called: float, *, at_once: bool) -> None:
        """Write a checkpoint, or have it written beside the training, and note it. Rank 0."""
        began = time.monotonic()
        together = None if self._crew is None else self._crew.shared(checkpoint.content)
        beside = None if at_once or together is not None else self._background
        write = None if beside is None else beside.stage(checkpoint.content, self._left_for_later())
        self._newest = coming
        if write is None or self._background is None:
            try:
                self._noted(checkpoint.commit(self._store, together), checkpoint.position, reason, began)
            except BaseException:
                self._newest = None
                raise
        else:
            position, facts = checkpoint.position, {"stall_s": round(time.monotonic() - called, 4)}
            # Not what it was copied from: that changes, and may be a copy for this alone.
            staged = replace(checkpoint, content={})

            def save() -> None:
                try:
                    self._noted(staged.commit(self._store, write), position, reason, began, **facts)
                except Exception as error:
                    self._newest = None
                    self._ledger.append("save_failed", step=position.step, error=f"{type(error).__name__}: {error}")
                    print(f"hpcckpt: {error}", flush=True)
                    raise

            self._background.start(save)

    def _prepare_at_first_step(self) -> None:
        """Have memory for the state's copy made ready as soon as it is known how large it gets: when the optimizers have made a step."""
        if (background := self._background) is not None and self._crew is None:
            for optimizer in self._tracked.optimizers():
                after_first_step(optimizer, lambda: background.prepare(self._tracked.size_bytes()))

    def _left_for_later(self) -> dict[int, torch.Tensor]:
        """Return what may be copied beside the next passes; see `changed_by_steps`."""
        if not self._is_lazy or self._background is None:
            return {}
        if self._background.is_torn:
            self._is_lazy = False
            self._ledger.append("note", text=_TORN)
            print(f"hpcckpt: note: {_TORN}", flush=True)
            return {}
        optimizers = self._tracked.optimizers()
        if not self._holds_steps:
            self._holds_steps = True
            hold_steps(optimizers, self._background.before_step)
        return changed_by_steps(optimizers)

    def _noted(self, path: Path, position: Position, reason: str, began: float, **facts: float) -> None:
        took_s = round(time.monotonic() - began, 4)
        self._ledger.append("saved", file=path.name, epoch=position.epoch, step=position.step, reason=reason, save_s=took_s, **facts)

    def _load(self, content: Any, path: Path, origin: Origin, loops: Loops) -> Restored:
        if origin.weights_only:
            weights = weights_in(content, path, self._tracked.module_names())
            notes = self._tracked.load_weights(weights, strict=origin.strict)
            differs = ("its weights alone were asked for: a new run begins from them",)
            exactness = Exactness(restored=("weights",), differs=differs, notes=notes)
            return Restored(origin, exactness=exactness, put_back=self._seeded())
        place = place_in(content, path)
        self._tracked.load(content)
        if path.parent == self._layout.checkpoints:
            self._newest = place.position, place.metrics, _where(content["data_state"])
        small = self._tracked.small_state()
        put_generators_back = self._generators(content)
        self._saved_begun = self._begun_of(content["data_state"])
        mark = marked(self._tracked.named_modules())

        def put_back() -> None:
            if changed_since(mark, self._tracked.named_modules()):
                # An average of weights that is made before the loop, and was before the interruption, too. The file is kept meanwhile.
                read(path, self._layout, self._tracked.load)
            self._tracked.put_back(small)
            put_generators_back()

        saved = content.get("hyperparameters") or {}
        kept = overridden(self._given, self._tracked.objects(), saved)
        exactness = self._exactness(content, place, loops, kept)
        # Those of the attempt that began the run: what it overrides is told on every restart.
        self._given |= saved
        return Restored(origin, place, exactness, put_back)

    def _exactness(self, content: dict[str, Any], place: SavedPlace, loops: Loops, notes: list[str]) -> Exactness:
        """Return what this rank finds; see `Exactness`."""
        ranks, now = len(content["rng_state"]), self._here()
        differs = differences(conditions_of(content.get("conditions"), self._ranks.rank if ranks == self._ranks.world_size else 0), now)
        if ranks != self._ranks.world_size:
            seen = "every sample is seen once all the same, but generators are seeded anew"
            differs.insert(0, f"saved by {ranks} ranks, restored on {self._ranks.world_size}: {seen}")
        differs += [f"{name}: its state_dict() is empty, so what it holds begins anew" for name in self._tracked.without_state()]
        differs += [
            f"{name}: with a static graph or sparse gradients DDP adds the ranks' gradients in another order after a restart"
            for name, module in self._tracked.named_modules().items()
            if has_varying_buckets(module)
        ]
        differs += loops.resized(place.batch_sizes)
        differs += place.reasons
        if place.unplaced_steps and not place.position.epoch_finished:
            differs.append(f"{place.unplaced_steps} steps of this epoch were made outside of run.batches: the script makes them again")
        generators = "generators" if ranks == 1 else f"generators of {ranks} ranks"
        loaders = [
            f"loader {number} at {where['consumed']} of {where['num_samples']}" if "consumed" in where else f"loader {number}"
            for number, where in place.loaders.items()
        ]
        restored = (*self._tracked.objects(), *([generators] if ranks == self._ranks.world_size else []), *loaders)
        return Exactness(restored, tuple(differs), tuple(doubts(now)), tuple(notes))

    def _seeded(self) -> Callable[[], None]:
        seed = derive_seed(self._seed, "rank", self._ranks.rank)
        return lambda: seed_all(seed)

    def _begun_of(self, data_state: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        begun = data_state.get("begun")
        # Without a loop to go on with, generators are not put back later: they have to be those of the last step.
        if begun is None or data_state["last_loader"] is None or len(begun["rng_state"]) != self._ranks.world_size:
            return None
        return int(begun["step"]), copy.deepcopy(begun["rng_state"][self._ranks.rank])

    def _generators(self, content: dict[str, Any]) -> Callable[[], None]:
        saved = content["rng_state"]
        if len(saved) == self._ranks.world_size:
            # A copy: the file may be mapped into memory, and this is needed later.
            mine = copy.deepcopy(saved[self._ranks.rank])
            return lambda: set_rng_state(mine)
        seed = derive_seed(self._seed, "rank", self._ranks.rank, content["step"])
        return lambda: seed_all(seed)


def _where(data_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a data state tells two checkpoints of one step apart, without the streams' own states."""
    loaders = {number: {key: value for key, value in loader.items() if key != STATES} for number, loader in data_state["loaders"].items()}
    return {"loaders": loaders, **{key: data_state.get(key) for key in ("last_loader", "lines", "reasons")}}
