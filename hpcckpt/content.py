"""What a checkpoint file of a run holds, and what its manifest says of it (docs/reference/format.md)."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from hpcckpt.errors import UsageError
from hpcckpt.policy import Position
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.state.tracked import FORMAT_VERSION
from hpcckpt.store.checkpoints import CheckpointStore


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that has only to be committed. Its content is the live state."""

    position: Position
    content: dict[str, Any]
    manifest: dict[str, Any]
    # Of the user's own, as `CheckpointStore.commit` takes it.
    name: str | None

    def commit(self, store: CheckpointStore, write: Callable[[IO[bytes]], None] | None = None) -> Path:
        """Write the file and its manifest; returns its path. Rank 0 alone.

        `write` writes what was copied of the content before; without it the content must not change meanwhile.

        Raises:
            CheckpointSaveError, FencedError, UsageError: as `CheckpointStore.commit`.
        """
        return store.commit(
            self.position.epoch,
            self.position.step,
            epoch_finished=self.position.epoch_finished,
            write=write or (lambda file: write_as_torch(self.content, file)),
            manifest=self.manifest,
            name=self.name,
        )


def prepared(
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
) -> Prepared:
    """Return a checkpoint.

    Args:
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
        UsageError: a metric is no number.
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
    return Prepared(position, content, manifest, name)


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


def conditions_of(saved: Any, rank: int) -> Mapping[str, Any] | None:
    """Return the conditions of one rank in a content; None where a file has none, or nothing that can be read."""
    try:
        here = saved["kinds"][saved["of_rank"][rank]]
    except (TypeError, KeyError, IndexError):
        return None
    return here if isinstance(here, dict) else None


def _in_kinds(conditions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the conditions of all ranks, each different kind of them once."""
    kinds: list[dict[str, Any]] = []
    for here in conditions:
        if here not in kinds:
            kinds.append(here)
    return {"kinds": kinds, "of_rank": [kinds.index(here) for here in conditions]}
