"""What an attempt goes on from: which file, and what is in it of the place in training. Decided by rank 0, once."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcckpt.errors import CheckpointMismatchError
from hpcckpt.exactness import Exactness
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Position
from hpcckpt.reading import read_content
from hpcckpt.state.foreign import fitted, model_state_in
from hpcckpt.state.tracked import check_version
from hpcckpt.store import resume
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.durable import reading
from hpcckpt.store.ledger import Ledger
from hpcckpt.store.shelf import Shelf
from hpcckpt.store.view import PATIENCE_S, await_last_save


@dataclass(frozen=True)
class Origin:
    """The file to begin with, None where the run begins anew; `position` is None where its weights alone are taken."""

    path: Path | None = None
    weights_only: bool = False
    # Whether all weights have to fit.
    strict: bool = True
    position: Position | None = None
    # Of each loader, as `data.loader.BatchSize.state`.
    batch_sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # How many lines of metrics.jsonl were given behind the last step, and are not given again.
    lines: int = 0
    # Of the file, as rank 0 has read it; "": it was not verified.
    digest: str = ""

    @property
    def epoch(self) -> int:
        """The epoch in which the attempt goes on."""
        return 0 if self.position is None else self.position.epoch + self.position.epoch_finished

    @property
    def step(self) -> int:
        """How many optimizer steps lie behind it."""
        return 0 if self.position is None else self.position.step


@dataclass(frozen=True)
class SavedPlace:
    """The place in training that a checkpoint holds."""

    position: Position
    metrics: dict[str, float]
    loaders: dict[str, dict[str, Any]]
    # In whose loop the last step was made; generators go on there.
    last_loader: str | None
    # Steps of the epoch in progress that were made in no loop over a loader.
    unplaced_steps: int
    batch_sizes: dict[str, dict[str, int]]
    lines: int
    # Why it cannot be gone on with exactly, as far as the run that saved it knew.
    reasons: list[str]


@dataclass(frozen=True)
class Restored:
    """What a start goes on from, once it is loaded."""

    origin: Origin
    place: SavedPlace | None = None
    exactness: Exactness | None = None
    # Puts back generators, schedulers and hyperparameters once more, where the last step was made: the script has run again what
    # comes before, and had drawn and stepped there before the interruption, too.
    put_back: Callable[[], None] = lambda: None


def choose(layout: RunLayout, store: CheckpointStore, ledger: Ledger) -> Origin:
    """Return what this attempt goes on from, after carrying out a request to go back and setting aside what is damaged. Rank 0.

    Raises:
        CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError.
    """
    _await_view(layout, store, ledger)
    request = resume.apply(layout, store)
    newest = store.recover(lambda problem: ledger.append("damaged", problem=problem))
    if newest is not None:
        path = store.path(newest.name)
        return _peeked(path, layout, store.shelf)
    if request is None or request["origin"] is None:
        return Origin()
    path = Path(request["origin"])
    if request["weights_only"]:
        return Origin(path, weights_only=True, strict=bool(request.get("strict", True)))
    return _peeked(path, layout, store.shelf)


def _await_view(layout: RunLayout, store: CheckpointStore, ledger: Ledger) -> None:
    took_s = await_last_save(layout, ledger.events(), store.generation)
    if took_s is None or took_s > 1:
        how = (
            f"not to be seen here in {PATIENCE_S:g} s; going on from what is" if took_s is None else f"to be seen here after {took_s:.0f} s"
        )
        ledger.append("stale", took_s=took_s)
        print(f"hpcckpt: note: {layout.latest}: the last save of the attempt before was {how}", flush=True)


def read(path: Path, layout: RunLayout, use: Callable[[Any], Any], source: str | None = None) -> Any:
    """Return what `use` makes of a file's content, which is mapped into memory and marked as being read only meanwhile.

    `source`: as `read_content` takes it.
    """
    own = path.parent == layout.checkpoints
    # No process deletes what is marked.
    with reading(path) if own else nullcontext():
        return use(read_content(path, follow_symlinks=not own, source=source))


def place_in(content: Any, path: Path) -> SavedPlace:
    """Return the place in training that a run's checkpoint holds; it keeps nothing of the file in memory.

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
        return SavedPlace(
            Position(int(content["epoch"]), int(content["step"]), bool(data_state["epoch_finished"])),
            dict(content["metrics"]),
            # A copy: one tensor in a stream's state would hold on to the whole file, in memory, for as long as the run trains.
            copy.deepcopy(dict(data_state["loaders"])),
            data_state["last_loader"],
            int(data_state.get("unplaced_steps", 0)),
            {str(number): {key: int(value) for key, value in size.items()} for number, size in data_state.get("batch_sizes", {}).items()},
            int(data_state.get("lines", 0)),
            [str(reason) for reason in data_state.get("reasons", ())],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointMismatchError(
            f"{path}: its place in training cannot be read ({type(error).__name__}: {error}); {weights}"
        ) from None


def weights_in(content: Any, path: Path, names: Mapping[str, list[str]]) -> dict[str, Mapping[str, Any]]:
    """Return the state of each tracked module that a file has: one of a run, or of any other program.

    `names` are the tracked modules, each with the portable names of its state.

    Raises:
        CheckpointMismatchError: a later format, or nothing says which module it is for.
    """
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


def _peeked(path: Path, layout: RunLayout, shelf: Shelf) -> Origin:
    source = shelf.source(path)
    place: SavedPlace = read(path, layout, lambda content: place_in(content, path), source)
    digest = "" if source is None else shelf.digest
    return Origin(path, position=place.position, batch_sizes=place.batch_sizes, lines=place.lines, digest=digest)
