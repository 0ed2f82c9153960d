"""The checkpoints of a run: commit, pointer, retention, rewind. Rank 0 alone uses it; looking needs `reader` only.

Commit order: data under a temporary name -> manifest -> the file's name -> pointer -> best -> retention. Each is durable
before the next one is begun, so the pointer names a complete, durable checkpoint at every instant, and an interrupted
commit leaves a temporary file and a manifest of nothing, both swept by a later one. No name in the folder changes but
under the `guard`: a newer attempt may commit a file of the same name.
"""

import contextlib
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from hpcckpt.config import CheckpointConfig
from hpcckpt.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    FencedError,
    RunDirectoryError,
    UsageError,
)
from hpcckpt.layout import TEMPORARY_PREFIX, RunLayout, checkpoint_name, manifest_name, parse_checkpoint_name
from hpcckpt.policy import CheckpointInfo, Retention
from hpcckpt.store.durable import Draft, drafted, is_being_read, make_private_directory, read_json, sync_directory, write_durably
from hpcckpt.store.guard import Guard
from hpcckpt.store.reader import CheckpointReader, Entry

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Manifest, pointer and what a file system keeps for itself.
_MARGIN_BYTES = 256 * 1024


class CheckpointStore(CheckpointReader):
    """The `checkpoints` folder of one run directory."""

    def __init__(self, layout: RunLayout, retention: Retention, locking: str = "flock") -> None:
        super().__init__(layout, retention)
        self._guard = Guard(layout, locking)
        # What this attempt went on from: known to be good, so it stays as long as the attempt lives.
        self._source: str | None = None

    @classmethod
    def configured(cls, layout: RunLayout, config: CheckpointConfig) -> Self:
        """Return the store of a run with this configuration."""
        retention = Retention(config.keep_last, config.keep_best, config.keep_every_epochs, config.monitor, config.mode)
        return cls(layout, retention, config.locking)

    def claim(self, job_id: str | None, incarnation: Sequence[int] = (), *, share: bool = False) -> int:
        """Take the next generation, from now on the only one that may commit; returns it. As `Guard.claim`."""
        return self._guard.claim(job_id, incarnation, share=share)

    def release(self) -> None:
        """Let another run have the directory; the end of the process does so, too."""
        self._guard.release()

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has taken over."""
        self._guard.refuse_if_fenced()

    def commit(
        self,
        epoch: int,
        step: int,
        *,
        epoch_finished: bool,
        write: Callable[[IO[bytes]], None],
        manifest: Mapping[str, Any],
        name: str | None = None,
    ) -> Path:
        """Let `write` fill a checkpoint, make it durable, point to it, and only then let older ones go.

        `manifest` needs `metrics`; whatever else it holds is recorded. With a `name` of the user's own neither the pointer nor
        retention takes notice of it. `write` is called again where deleting what may go makes room on a full disk.

        Raises:
            UsageError: the name is one that this folder uses itself.
            FencedError: a newer attempt has started; nothing was moved or deleted.
            CheckpointSaveError: the file system failed; everything older is intact.
        """
        given = checkpoint_name(epoch, None if epoch_finished else step)
        if name is not None and name != given:
            self._refuse_name(name)
        info = CheckpointInfo(
            name or given, epoch, step, epoch_finished, dict(manifest["metrics"]), is_best=bool(manifest.get("is_best", False))
        )
        path = self._layout.checkpoints / info.name
        try:
            self.refuse_if_fenced()
            self._make_room(info)
            try:
                self._commit(info, write, manifest)
            except OSError as error:
                # Quotas do not show in the free space.
                if error.errno not in _FULL:
                    raise
                with self._guard.owned():
                    went = self._delete(self._early_surplus(info))
                if not went:
                    raise
                self._commit(info, write, manifest)
        except (FencedError, RunDirectoryError, CheckpointSaveError):
            raise
        except (OSError, CheckpointCorruptError) as error:
            # Without locks, or with a node that was lost, the temporary file may have been swept by a newer attempt.
            with contextlib.suppress(CheckpointCorruptError):
                self.refuse_if_fenced()
            reason = getattr(error, "strerror", None) or error
            raise CheckpointSaveError(
                f"{path}: the checkpoint could not be written ({reason}); the ones before it are intact: "
                "free some space or mend the file system, then submit again"
            ) from error
        return path

    def recover(self, report: Callable[[str], None]) -> CheckpointInfo | None:
        """Return what `newest_good` does, after setting damaged checkpoints aside; it will not be deleted by this attempt.

        Raises:
            CheckpointCorruptError: there are checkpoints, and all are damaged; nothing was moved.
            FencedError: a newer attempt has started.
        """
        damaged: list[str] = []
        problems: list[str] = []
        newest = self._newest_good(problems.append, damaged)
        for problem in problems:
            report(problem)
        if newest is not None:
            self.keep(newest.name)
            with self._guard.owned():
                if problems:
                    # The pointer last: as long as it names what is damaged, or gone, an interrupted call is finished by the next.
                    self._move(damaged, self._layout.damaged)
                    self._point_to(self._rotation()[newest.name])
                self._link_best(self._settled())
        return newest

    @property
    def generation(self) -> int:
        """This attempt's number; 0 where nothing was claimed."""
        return self._guard.generation

    def keep(self, name: str) -> None:
        """Never delete this one as long as this attempt lives: it went on from it, so it is known to be good."""
        self._source = name

    def write_note(self, path: Path, value: Mapping[str, object]) -> None:
        """Write a small JSON file beside the checkpoints, as the newest attempt.

        Raises:
            FencedError: a newer attempt has started.
        """
        with self._guard.owned():
            self._guard.write_json(path, value)

    def rewind(self, keep: str | None) -> None:
        """Go back to checkpoint `keep` (None: to before the first): later ones move to superseded/, nothing is deleted.

        The pointer moves first, so an interruption leaves files that nothing names, and a second call finishes the job.

        Raises:
            CheckpointNotFoundError: `keep` is not there any more; nothing was moved.
        """
        with self._guard.owned():
            entries = self._rotation()
            if keep is None:
                later = list(entries)
                self._layout.latest.unlink(missing_ok=True)
                sync_directory(self._layout.checkpoints)
            elif keep in entries:
                kept = entries[keep]
                later = [name for name, entry in entries.items() if entry.info.order > kept.info.order]
                self._point_to(kept)
            else:
                known = ", ".join(entries) or "nothing"
                raise CheckpointNotFoundError(f"{self._layout.checkpoints}: {keep} is not there any more; resume from another one: {known}")
            self._move(later, self._layout.superseded)
            self._link_best(self._settled())

    def _commit(self, info: CheckpointInfo, write: Callable[[IO[bytes]], None], manifest: Mapping[str, Any]) -> None:
        began = time.monotonic()
        path = self._layout.checkpoints / info.name
        with drafted(path, write) as draft:
            content = {
                "file": info.name,
                "size_bytes": draft.size_bytes,
                "digest": draft.digest,
                "epoch": info.epoch,
                "step": info.step,
                "epoch_finished": info.epoch_finished,
                "generation": self._guard.generation,
                **manifest,
                "save_s": round(time.monotonic() - began, 4),
                "time": time.time(),
            }
            with self._guard.owned():
                entries = self._settled()
                self._publish(draft, entries.get(info.name), content)
                entries[info.name] = Entry(info, content)
                if parse_checkpoint_name(info.name) is not None:
                    self._point_to(entries[info.name])
                self._link_best(entries, info)
                if parse_checkpoint_name(info.name) is not None:
                    self._delete(self._retention.surplus(_in_rotation(entries), self._protected({info.name})))
                self._sweep()

    def _publish(self, draft: Draft, before: Entry | None, content: dict[str, Any]) -> None:
        """Give a file its manifest and its name, in this order: a file without a manifest would never be counted, or deleted."""
        manifest_path = self._layout.checkpoints / manifest_name(draft.path.name)
        # Between the two changes of name the file that is there must fit its manifest all the same.
        replaced = {} if before is None else {"replaces": {key: value for key, value in before.manifest.items() if key != "replaces"}}
        self._guard.write_json(manifest_path, {**content, **replaced})
        draft.publish()
        if before is not None:
            self._guard.write_json(manifest_path, content)

    def _settled(self) -> dict[str, Entry]:
        """Return all entries, after finishing what an interrupted save over one of them has left undecided."""
        entries = self._entries()
        for name, entry in entries.items():
            if not entry.is_settled:
                alone = {key: value for key, value in entry.manifest.items() if key != "replaces"}
                self._guard.write_json(self._layout.checkpoints / manifest_name(name), alone)
                entries[name] = Entry(entry.info, alone)
        return entries

    def _sweep(self) -> None:
        """Delete manifests whose file is gone: of a commit or a deletion that was interrupted."""
        names = set(os.listdir(self._layout.checkpoints))
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if suffix != "json" or stem in names or f"{stem}.pt" in names:
                continue
            with contextlib.suppress(CheckpointCorruptError):
                file = str((read_json(self._layout.checkpoints / name) or {}).get("file"))
                if manifest_name(file) == name:
                    (self._layout.checkpoints / name).unlink(missing_ok=True)

    def _point_to(self, entry: Entry) -> None:
        self._guard.write_json(self._layout.latest, {**entry.pointer, "generation": self._guard.generation})

    def _protected(self, names: Collection[str]) -> set[str]:
        return {*names, *([] if self._source is None else [self._source])}

    def _early_surplus(self, coming: CheckpointInfo) -> list[CheckpointInfo]:
        """Return what will be surplus once `coming` is there: not the pointer's target, nor the best one so far."""
        infos = [info for info in self.infos() if info.name != coming.name]
        pointer = self._pointer([]) or {}
        best = self._retention.best(infos)[:1]
        protected = self._protected({str(pointer.get("file")), coming.name, *(info.name for info in best)})
        return self._retention.surplus([*infos, coming], protected)

    def _make_room(self, coming: CheckpointInfo) -> None:
        """Let what will be surplus go before the save, if there is no room for both.

        Whether there is enough then, the write itself finds out: this one may be smaller than the last one, and not every file
        system tells the truth.
        """
        expected = int((self._pointer([]) or {}).get("size_bytes", 0)) + _MARGIN_BYTES
        if _free_bytes(self._layout.checkpoints) < expected:
            with self._guard.owned():
                self._delete(self._early_surplus(coming))

    def _move(self, names: Collection[str], folder: Path) -> None:
        """Move checkpoints to another folder, with their manifests and those that an interrupted call has left alone."""
        there = set(os.listdir(self._layout.checkpoints))
        files = {name: f"{name.removesuffix('.json')}.pt" for name in there if name.endswith(".json")}
        alone = sorted(name for name, file in files.items() if parse_checkpoint_name(file) is not None and file not in there)
        if names or alone:
            make_private_directory(folder, follow_symlink=False)
            for name in names:
                target = free_name(folder / name)
                os.rename(self._layout.checkpoints / name, target)
                os.rename(self._layout.checkpoints / manifest_name(name), target.with_name(manifest_name(target.name)))
            for name in alone:
                os.rename(self._layout.checkpoints / name, free_name(folder / name))
            sync_directory(folder)
            sync_directory(self._layout.checkpoints)

    def _link_best(self, entries: Mapping[str, Entry], committed: CheckpointInfo | None = None) -> None:
        """Let best_model.pt be the best one by the monitored metric; without one, what was last committed as the best."""
        target, known = self._layout.best, self._best_manifest()
        if self._retention.monitor is None:
            best = [committed] if committed is not None and committed.is_best else []
            stays = not best
        else:
            best = self._retention.best(entry.info for entry in entries.values())[: min(self._retention.keep_best, 1)]
            stays = not best and known is None  # not ours
        if stays:
            return
        manifest_path = target.with_name(manifest_name(target.name))
        if not best:
            target.unlink(missing_ok=True)
            manifest_path.unlink(missing_ok=True)
            return
        entry = entries[best[0].name]
        source = self._layout.checkpoints / entry.info.name
        if known is None or known.get("digest") != entry.manifest["digest"] or not target.exists():
            self._link(source, target)
            self._guard.write_json(manifest_path, {**entry.manifest, "file": target.name})

    def _link(self, source: Path, target: Path) -> None:
        """Give a file a second name; a copy where the file system has no hard links."""
        # rename(2) does nothing, and leaves the new name behind, when both names are one file already.
        if target.exists() and target.samefile(source):
            return
        temporary = self._layout.checkpoints / f"{TEMPORARY_PREFIX}best.{secrets.token_hex(4)}"
        try:
            os.link(source, temporary, follow_symlinks=False)
        except OSError:  # no hard links on this file system

            def copy(file: IO[bytes]) -> None:
                with source.open("rb") as original:
                    shutil.copyfileobj(original, file)

            write_durably(target, copy)
            return
        os.rename(temporary, target)
        sync_directory(self._layout.checkpoints)

    def _delete(self, surplus: list[CheckpointInfo]) -> bool:
        """Delete checkpoints that nobody is reading; returns whether any went. Those left are surplus again at the next save."""
        went = False
        for info in surplus:
            path = self._layout.checkpoints / info.name
            if is_being_read(path):
                continue
            # An interruption in between leaves a manifest alone, which is swept.
            path.unlink(missing_ok=True)
            (self._layout.checkpoints / manifest_name(info.name)).unlink(missing_ok=True)
            went = True
        return went

    def _refuse_name(self, name: str) -> None:
        if not name or name != os.path.basename(name) or self._layout.reserves(name):
            raise UsageError(f"{name!r}: cannot be a checkpoint's name; give a plain file name such as before_finetuning.pt")


def _in_rotation(entries: Mapping[str, Entry]) -> list[CheckpointInfo]:
    return [entry.info for name, entry in entries.items() if parse_checkpoint_name(name) is not None]


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    if status.f_blocks == 0:  # it does not say
        return sys.maxsize
    # What is reserved for root is free to root.
    return status.f_frsize * (status.f_bfree if os.geteuid() == 0 else status.f_bavail)


def free_name(path: Path) -> Path:
    """Return `path`, or the first of path.1, path.2, … that is not taken: an epoch can be superseded twice."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate
