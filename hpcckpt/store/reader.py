"""What is in a checkpoints folder, and which of it is whole. Changes nothing: any process may look, at any time.

Everything is read from disk each time. A checkpoint counts where it has a manifest; whether its bytes are those that were
committed is asked of the digest, never of the name or of the pointer.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from hpcckpt.layout import RunLayout, manifest_name, parse_checkpoint_name
from hpcckpt.policy import CheckpointInfo, Retention
from hpcckpt.store.digest import is_known
from hpcckpt.store.durable import file_digest, read_json
from hpcckpt.store.shelf import Shelf

# How often a look is begun anew because a writer was faster.
_RETRIES = 20


@dataclass(frozen=True)
class Entry:
    """A checkpoint by its manifest."""

    info: CheckpointInfo
    manifest: Mapping[str, Any]
    # False behind an interrupted save over a file of the same name, where it is known which manifest has to be written anew.
    is_settled: bool = True

    @property
    def pointer(self) -> dict[str, Any]:
        """What latest.json says of it, but for the generation."""
        return {key: self.manifest[key] for key in ("file", "size_bytes", "digest", "epoch", "step", "epoch_finished")}


@dataclass(frozen=True)
class _Look:
    """What a folder showed at once: the pointer (None: none, {}: unreadable), the newest good one, and what is wrong."""

    pointer: Mapping[str, Any] | None
    newest: CheckpointInfo | None
    problems: list[str]
    damaged: list[str]


class CheckpointReader:
    """The checkpoints of one folder, for looking at and looking up."""

    def __init__(self, layout: RunLayout, retention: Retention) -> None:
        self._layout = layout
        self._retention = retention
        # What was verified last, for who loads it next; nothing where nobody will.
        self.shelf = Shelf(keeps=False)

    def infos(self) -> list[CheckpointInfo]:
        """Return every committed checkpoint, in order of training; those under names of the user's own are not among them."""
        return sorted((entry.info for entry in self._rotation().values()), key=lambda info: info.order)

    def expect_newest(self) -> None:
        """Begin to read what the pointer names, which will be asked for; nobody may commit anything meanwhile."""
        with contextlib.suppress(CheckpointCorruptError):
            pointer = read_json(self._layout.latest) or {}
            name = str(pointer.get("file"))
            if parse_checkpoint_name(name) is not None:
                self.shelf.begin(self._layout.checkpoints / name, str(pointer.get("digest")))

    def newest_good(self, report: Callable[[str], None]) -> CheckpointInfo | None:
        """Return the checkpoint the pointer names, or the newest one that verifies if that is damaged; None if there is none.

        `report` is told of each damaged one.

        Raises:
            CheckpointCorruptError: there are checkpoints, and all are damaged.
        """
        return self._newest_good(report, [])

    def find(self, asked: str, *, epoch: int | None = None, step: int | None = None, best: bool = False) -> CheckpointInfo:
        """Return the checkpoint of a finished epoch, of an optimizer step, or the best one; verified. `asked`: for messages.

        Raises:
            CheckpointNotFoundError: there is none; the message lists those there are.
            CheckpointCorruptError: it is damaged.
        """
        entries = self._rotation()
        infos = self.infos()
        if best:
            found = self._retention.best(infos)[:1]
            known = "no checkpoint here has the metric checkpoint.monitor, or was saved as the best one"
        elif epoch is not None:
            found = [info for info in infos if info.epoch_finished and info.epoch == epoch]
            known = _known("epochs", [info.epoch for info in infos if info.epoch_finished])
        else:
            found = [info for info in infos if info.step == step][-1:]
            known = _known("steps", [info.step for info in infos])
        if not found:
            raise CheckpointNotFoundError(f"{asked}: {self._layout.checkpoints} has no such checkpoint; {known}")
        problem = self._problem(entries[found[0].name])
        if problem is not None:
            raise CheckpointCorruptError(f"{asked}: {problem.text}; choose another one; {known}")
        return found[0]

    def own(self, path: Path) -> CheckpointInfo | None:
        """Return the checkpoint whose bytes `path` holds, where that is a file of this folder (best_model.pt, say); None elsewhere.

        Raises:
            CheckpointCorruptError: it is in this folder, but no checkpoint was committed with its bytes.
        """
        if path.parent.resolve() != self._layout.checkpoints.resolve():
            return None
        try:
            # Mostly of one algorithm; another version's may be among them.
            known = {str(entry.manifest.get("digest")): entry.info for entry in self._entries().values()}
            algorithms = {digest.partition(":")[0]: digest for digest in known if is_known(digest)}
            digests = [file_digest(path, like)[1] for like in algorithms.values()]
        except OSError as error:
            raise CheckpointCorruptError(f"{path} cannot be read ({error.strerror})") from None
        found = next((known[digest] for digest in digests if digest in known), None)
        if found is None:
            raise CheckpointCorruptError(f"{path} is damaged, or no checkpoint of this run: choose another one")
        return found

    def verify(self, path: Path) -> None:
        """Compare a file of this folder with its manifest; one that has none, or is elsewhere, cannot be told good from bad.

        Raises:
            CheckpointCorruptError: its bytes are not those that were committed.
        """
        entries = self._entries()
        if path.parent.resolve() != self._layout.checkpoints.resolve():
            return
        if path.name in entries:
            problem = self._problem(entries[path.name])
            if problem is not None:
                raise CheckpointCorruptError(f"{problem.text}; choose another one")
        elif path.name == self._layout.best.name and (manifest := self._best_manifest()) is not None:
            problem = self._problem_of(path.name, manifest)
            if problem is not None:
                self.own(path)  # a crash between the file and its manifest

    def names(self) -> list[str]:
        """Return the names of all checkpoints, those of the user's own among them."""
        return list(self._entries())

    def path(self, name: str) -> Path:
        """Return the path of a checkpoint's file.

        Raises:
            CheckpointNotFoundError: `name` is no checkpoint's name, so it must not be looked up.
        """
        if parse_checkpoint_name(name) is None and name not in self._entries():
            raise CheckpointNotFoundError(f"{name!r} is not the name of a checkpoint")
        return self._layout.checkpoints / name

    def _newest_good(self, report: Callable[[str], None], damaged: list[str]) -> CheckpointInfo | None:
        """As `newest_good`; the names of those passed over are appended to `damaged`."""
        look = self._look()
        for _ in range(_RETRIES):
            # A live writer may have moved on, and deleted what was looked at.
            if not look.problems or self._pointer([]) == look.pointer:
                break
            look = self._look()
        for problem in look.problems:
            report(problem)
        damaged += look.damaged
        if look.newest is None and (look.problems or look.pointer is not None):
            raise CheckpointCorruptError(
                f"{self._layout.checkpoints}: no checkpoint here is intact; submit with resume.from=none to begin anew "
                "(what is there moves to superseded/), or with resume.from=PATH"
            )
        return look.newest

    def _look(self) -> "_Look":
        problems: list[str] = []
        damaged: list[str] = []
        pointer = self._pointer(problems)
        entries = self._rotation()
        pointed = None if not pointer else str(pointer.get("file"))
        if pointed is not None and pointed not in entries:
            problems.append(f"{self._layout.latest} names {pointed!r}, which is not there, or has no intact manifest")
        newest_first = sorted(entries, key=lambda name: entries[name].info.order, reverse=True)
        # A file newer than the pointer was never acknowledged; it comes after the one that was, or serves if that is bad.
        for name in sorted(newest_first, key=lambda name: name != pointed):
            problem = self._problem(entries[name])
            if problem is None:
                return _Look(pointer, entries[name].info, problems, damaged)
            problems.append(problem.text)
            damaged += [name] if problem.is_damage else []
        return _Look(pointer, None, problems, damaged)

    def _pointer(self, problems: list[str]) -> dict[str, Any] | None:
        """Return what the pointer says; {} where it cannot be read, None where there is none."""
        try:
            return read_json(self._layout.latest)
        except CheckpointCorruptError as error:
            problems.append(str(error))
            return {}

    def _rotation(self) -> dict[str, Entry]:
        """Return the entries under names that hpcckpt gives: those that may be the newest, and that retention counts."""
        return {name: entry for name, entry in self._entries().items() if parse_checkpoint_name(name) is not None}

    def _entries(self) -> dict[str, Entry]:
        """Return every checkpoint that has an intact manifest, by name."""
        try:
            names = set(os.listdir(self._layout.checkpoints))
        except FileNotFoundError:
            return {}
        return {entry.info.name: entry for name in sorted(names) for entry in self._entry(name, names)}

    def _entry(self, name: str, names: set[str]) -> Iterator[Entry]:
        if manifest_name(name) not in names or name == self._layout.best.name:
            return
        with contextlib.suppress(CheckpointError, ValueError, TypeError, AttributeError, KeyError, OverflowError):
            manifest = read_json(self._layout.checkpoints / manifest_name(name)) or {}
            replaced = manifest.get("replaces")
            # An interrupted save over a file of the same name: the bytes say which of the two manifests is theirs.
            is_settled = replaced is None
            if replaced is not None and (problem := self._problem_of(name, manifest)) is not None:
                # Of a file that cannot be read now nothing is decided.
                is_settled = not problem.is_damage
                manifest = replaced if problem.is_damage else manifest
            if manifest["file"] != name:
                return
            metrics = {str(key): float(value) for key, value in manifest["metrics"].items()}
            step, epoch = int(manifest["step"]), int(manifest["epoch"])
            finished, is_best = bool(manifest["epoch_finished"]), bool(manifest.get("is_best", False))
            yield Entry(CheckpointInfo(name, epoch, step, finished, metrics, is_best), manifest, is_settled)

    def _best_manifest(self) -> dict[str, Any] | None:
        """Return what is known of best_model.pt; None where it is not ours."""
        with contextlib.suppress(CheckpointCorruptError):
            return read_json(self._layout.best.with_name(manifest_name(self._layout.best.name)))
        return None

    def _problem(self, entry: Entry) -> "_Problem | None":
        """Return what is wrong with a checkpoint's bytes, None if nothing is."""
        return self._problem_of(entry.info.name, entry.manifest)

    def _problem_of(self, name: str, manifest: Mapping[str, Any]) -> "_Problem | None":
        path, committed = self._layout.checkpoints / name, str(manifest.get("digest"))
        if not is_known(committed):
            return _Problem(f"{path} has a digest that this version of hpcckpt cannot compute ({committed[:40]!r})", is_damage=False)
        try:
            size_bytes, digest = self.shelf.read(path, committed)
        except OSError as error:
            # Of a file that cannot be read nothing is known: the next look may find it good.
            return _Problem(f"{path} cannot be read ({error.strerror})", is_damage=False)
        if size_bytes != manifest.get("size_bytes"):
            return _Problem(f"{path} has {size_bytes} bytes, but {manifest.get('size_bytes')} were committed", is_damage=True)
        if digest != committed:
            return _Problem(f"{path} is damaged: its digest is not the one that was committed", is_damage=True)
        return None


@dataclass(frozen=True)
class _Problem:
    """Why a checkpoint is passed over, and whether it is known to be bad."""

    text: str
    is_damage: bool


def _known(what: str, numbers: list[int]) -> str:
    return f"there are the {what} {', '.join(str(number) for number in sorted(set(numbers)))}" if numbers else f"there are no {what} yet"
