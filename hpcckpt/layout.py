"""Names of everything in a run directory. No other module spells a file name."""

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT_NAME = re.compile(r"checkpoint_epoch(\d{4,})(?:_step(\d{9,}))?\.pt")

# An unfinished write. The prefix keeps it out of every pattern above.
TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True)
class RunLayout:
    """Paths below one run directory; pure, touches no file.

    `folder` is the name of the checkpoints' folder: a checkpoint manager without a run has its own.
    """

    root: Path
    folder: str = "checkpoints"

    @property
    def config(self) -> Path:
        """The merged configuration of the last submission."""
        return self.root / "config.yaml"

    @property
    def resume_request(self) -> Path:
        """What a submission asked to go on from; applied once (see docs/decisions/0004)."""
        return self.root / "resume.json"

    @property
    def stop(self) -> Path:
        """Made by a user: the run saves, and ends; with `requeue` in it, saves and goes on in another attempt."""
        return self.root / "stop"

    @property
    def logs(self) -> Path:
        """The folder of submitit: scripts, pickles, stdout and stderr of every rank."""
        return self.root / "logs"

    @property
    def events(self) -> Path:
        """The ledger."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """What run.log and run.report gave."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files, of `run.tensorboard`."""
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The id of this run at Weights & Biases, of `run.wandb`."""
        return self.root / "wandb.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, manifests and the pointer."""
        return self.root / self.folder

    @property
    def latest(self) -> Path:
        """The pointer to the newest durable checkpoint."""
        return self.checkpoints / "latest.json"

    @property
    def lock(self) -> Path:
        """Held while the pointer or the generation changes."""
        return self.checkpoints / "latest.json.lock"

    @property
    def attempt_lock(self) -> Path:
        """Held by rank 0 of a live attempt."""
        return self.checkpoints / "attempt.lock"

    @property
    def generation(self) -> Path:
        """The newest attempt's number; older ones are fenced off."""
        return self.checkpoints / "generation.json"

    @property
    def best(self) -> Path:
        """The best checkpoint by `checkpoint.monitor`."""
        return self.checkpoints / "best_model.pt"

    @property
    def superseded(self) -> Path:
        """What a rewind left behind; never deleted by itself."""
        return self.checkpoints / "superseded"

    @property
    def damaged(self) -> Path:
        """Checkpoints whose bytes are not those that were committed; never deleted by itself."""
        return self.checkpoints / "damaged"

    def reserves(self, name: str) -> bool:
        """Return whether no checkpoint may be called so: hpcckpt's own names, and what has no suffix to tell it from those by."""
        suffix = Path(name).suffix
        own = parse_checkpoint_name(name) is not None or name == self.best.name
        return own or name.startswith(".") or suffix in ("", ".", ".json", ".lock") or not name.isprintable()


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """Return the file name of a checkpoint: at the end of `epoch`, or within it behind optimizer step `step`."""
    within = "" if step is None else f"_step{step:09d}"
    return f"checkpoint_epoch{epoch:04d}{within}.pt"


def parse_checkpoint_name(name: str) -> tuple[int, int | None] | None:
    """Return (epoch, step or None) of a checkpoint's file name; None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        return None
    epoch, step = int(match[1]), None if match[2] is None else int(match[2])
    # Only the one spelling that checkpoint_name gives: "00007" must not be a second epoch 7.
    return (epoch, step) if checkpoint_name(epoch, step) == name else None


def manifest_name(name: str) -> str:
    """Return the file name of a checkpoint's manifest; a name of the user's own keeps its suffix, so that latest.pt may be one."""
    return (name.removesuffix(".pt") if parse_checkpoint_name(name) is not None else name) + ".json"
