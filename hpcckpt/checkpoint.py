"""Save and restore over ranks: rank 0 touches the files, and what happens to it happens to all.

Both are collectives, and neither can leave a rank waiting: whatever rank 0 meets (a full disk, a damaged file, a newer
attempt) is raised on every rank.
"""

import copy
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hpcckpt.data import STATES, Loops
from hpcckpt.distributed import Collectives, Ranks, has_varying_buckets
from hpcckpt.errors import UsageError
from hpcckpt.exactness import Exactness, per_rank
from hpcckpt.layout import RunLayout
from hpcckpt.origin import Origin, Restored, SavedPlace, choose, place_in, read, weights_in
from hpcckpt.policy import Position
from hpcckpt.state.conditions import differences, doubts
from hpcckpt.state.marks import Mark, changed_since, marked
from hpcckpt.state.overridden import given, overridden
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.state.portable import portable
from hpcckpt.state.rng import derive_seed, rng_state, seed_all, set_rng_state
from hpcckpt.state.tracked import FORMAT_VERSION, Tracked
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.ledger import Ledger


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
    conditions: list[dict[str, Any]],
    hyperparameters: Mapping[str, Any] | None = None,
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
        conditions: `state.conditions` of each rank.
        hyperparameters: `state.overridden.given` of the attempt that began the run.
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
        "conditions": _in_kinds(conditions),
        "hyperparameters": dict(hyperparameters or {}),
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
        write=lambda file: write_as_torch(content, file),
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
    # What is too large to be copied, and must not change.
    mark: Mark
    # As `Recorder.lines`.
    lines: int


class Checkpointer:
    """Saves and restores tracked objects. Every rank must create one and call its methods together."""

    def __init__(
        self,
        ranks: Ranks,
        layout: RunLayout,
        store: CheckpointStore,
        ledger: Ledger,
        tracked: Tracked,
        seed: int,
        here: Callable[[], dict[str, Any]],
    ) -> None:
        self._ranks = ranks
        self._layout = layout
        self._store = store
        self._ledger = ledger
        self._tracked = tracked
        self._seed = seed
        # Gives `state.conditions` of this rank.
        self._here = here
        self._given: dict[str, Any] = {}
        self._origin: Origin | None = None
        # Position, metrics and places: of one step's state more may be known later than when it was saved first.
        self._newest: tuple[Position, dict[str, float], dict[str, Any]] | None = None
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
    ) -> None:
        """Commit a checkpoint of this position; nothing happens where the newest one is of it already, metrics and all.

        Every rank must call it. `boundary` was taken at the position, if that is not now; `facts` join the data state.

        Raises:
            CheckpointSaveError, FencedError: on every rank; everything older is intact.
        """
        data_state = {**loops.data_state(position.epoch), **(facts or {})}
        coming = position, dict(metrics), _where(data_state)
        # Metrics and facts are those of rank 0, which need not be the others'.
        if self._ranks.broadcast(self._newest == coming):
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
        self._ranks.from_main(
            lambda: self._commit(
                position,
                state(),
                reason,
                metrics=metrics,
                data_state=data_state,
                generators=[generators for generators, *_ in of_ranks],
                conditions=[here for _, here, *_ in of_ranks],
                hyperparameters=self._given,
            )
        )
        self._newest = coming

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
        if path is None:
            return Restored(origin, put_back=self._seeded())
        restored: Restored = self._ranks.together(
            lambda: read(path, self._layout, lambda content: self._load(content, path, origin, loops))
        )
        if restored.exactness is None:
            return restored
        # What differs may do so on one rank only: another kind of GPU, say.
        mine = restored.exactness
        differs, doubts = zip(*self._ranks.gather((mine.differs, mine.doubts)), strict=True)
        return replace(restored, exactness=replace(mine, differs=per_rank(differs), doubts=per_rank(doubts)))

    def _commit(self, position: Position, state: dict[str, Any], reason: str, **content: Any) -> None:
        began = time.monotonic()
        path = commit(self._store, position, state, wrapper=self._tracked.wrapper(), **content)
        self._ledger.append(
            "saved", file=path.name, epoch=position.epoch, step=position.step, reason=reason, save_s=round(time.monotonic() - began, 4)
        )

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
        differs = differences(_of_rank(content.get("conditions"), self._ranks.rank if ranks == self._ranks.world_size else 0), now)
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


def _in_kinds(conditions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the conditions of all ranks, each different kind of them once."""
    kinds: list[dict[str, Any]] = []
    for here in conditions:
        if here not in kinds:
            kinds.append(here)
    return {"kinds": kinds, "of_rank": [kinds.index(here) for here in conditions]}


def _of_rank(saved: Any, rank: int) -> Mapping[str, Any] | None:
    """Return the conditions of one rank; None where a file has none, or nothing that can be read."""
    try:
        here = saved["kinds"][saved["of_rank"][rank]]
    except (TypeError, KeyError, IndexError):
        return None
    return here if isinstance(here, dict) else None
