"""What a submission asked to go on from (`resume.*`), applied once, however often the job is requeued after that.

The request is a file of its own, not part of what a requeued job reads again: a job that was told `resume.epoch=5` and
is requeued in epoch 9 must go on in epoch 9. Three states: asked (by the submission), decided (which checkpoint it
means), applied (the pointer and the files are where they belong). Each step can be repeated after a crash.
"""

from pathlib import Path
from typing import Any

from hpcckpt.config import ResumeConfig
from hpcckpt.errors import CheckpointNotFoundError
from hpcckpt.layout import RunLayout, parse_checkpoint_name
from hpcckpt.policy import CheckpointInfo
from hpcckpt.store.checkpoints import CheckpointStore, free_name
from hpcckpt.store.durable import read_json, write_json

_WORDS = ("latest", "best", "none")  # anything else is a path


def ask(layout: RunLayout, store: CheckpointStore, resume: ResumeConfig) -> None:
    """Check and write down a submission's request; `resume.from=latest` withdraws one that no job has taken up.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: what is asked for is not there, or damaged.
    """
    request = read_json(layout.resume_request)
    if is_default(resume):
        if request is not None and request["state"] == "asked":
            layout.resume_request.unlink(missing_ok=True)
        return
    _target(store, resume)
    # A job may have another working directory.
    source = resume.from_ if resume.from_ in _WORDS else str(Path(resume.from_).expanduser().resolve())
    asked = {"from": source, "epoch": resume.epoch, "step": resume.step, "weights_only": resume.weights_only, "strict": resume.strict}
    write_json(layout.resume_request, {"state": "asked", **asked})


def is_default(resume: ResumeConfig) -> bool:
    """Return whether a submission merely goes on."""
    return resume == ResumeConfig()


def check(store: CheckpointStore, resume: ResumeConfig) -> None:
    """Raise what `ask` would, and write nothing."""
    if not is_default(resume):
        _target(store, resume)


def apply(layout: RunLayout, store: CheckpointStore) -> dict[str, Any] | None:
    """Carry out a pending request; returns the request in force, None without one. Rank 0, once a start.

    The request's `origin` is the file to begin with as long as the run has no checkpoint of its own.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: what is asked for is not there any more, or damaged.
    """
    request: dict[str, Any] | None = read_json(layout.resume_request)
    if request is None or request["state"] == "applied":
        return request
    if request["state"] == "asked":
        resume = ResumeConfig(request["from"], request["epoch"], request["step"], request["weights_only"])
        target = _target(store, resume)
        keep, origin = None, None
        if isinstance(target, Path):
            origin = str(target)
        elif target is not None and resume.weights_only:
            origin = str(free_name(layout.superseded / target.name))  # where the rewind will put it
        elif target is not None:
            keep = target.name
        request |= {"state": "decided", "keep": keep, "origin": origin}
        store.write_note(layout.resume_request, request)
    store.rewind(request["keep"])
    request |= {"state": "applied"}
    store.write_note(layout.resume_request, request)
    return request


def _target(store: CheckpointStore, resume: ResumeConfig) -> CheckpointInfo | Path | None:
    if resume.epoch is not None:
        return store.find(f"resume.epoch={resume.epoch}", epoch=resume.epoch)
    if resume.step is not None:
        return store.find(f"resume.step={resume.step}", step=resume.step)
    if resume.from_ == "best":
        return store.find("resume.from=best", best=True)
    if resume.from_ == "none":
        return None
    if resume.from_ == "latest":
        newest = store.newest_good(lambda _problem: None)
        if newest is None:
            raise CheckpointNotFoundError("resume.weights_only=true: this run has no checkpoint yet; give resume.from=PATH")
        return newest
    path = Path(resume.from_).expanduser().resolve()
    if not path.is_file():
        raise CheckpointNotFoundError(f"resume.from={resume.from_}: there is no such file; give latest, best, none or a checkpoint's path")
    # A file of the run's own is gone back to, where the rewind would move it away; one under another name stays where it is.
    own = store.own(path)
    return path if own is None or parse_checkpoint_name(own.name) is None else own
