"""The checkpoints of a run: commit, pointer, lookup, retention, rewind. Rank 0 alone uses it.

Commit order: file -> manifest -> pointer -> best -> retention. Each file is durable before the next one is begun, so
the pointer names a complete, durable checkpoint at every instant, and an interrupted commit leaves at worst a file that
nothing names. No name in the folder changes but under the lock and while this attempt is still the newest: a newer
attempt may commit a file of the same name.

The lock keeps two live processes apart; the generation keeps an old incarnation on a lost node apart, which may hold
no lock and still run.
"""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from hpcckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    FencedError,
    RunDirectoryError,
)
from hpcckpt.layout import TEMPORARY_PREFIX, RunLayout, checkpoint_name, manifest_name, parse_checkpoint_name
from hpcckpt.policy import CheckpointInfo, Retention
from hpcckpt.store.durable import (
    file_digest,
    make_private_directory,
    read_json,
    sync_directory,
    write_durably,
    write_json,
)

LOCK_TIMEOUT_S = 60.0
# What flock(2) says on a file system that has none.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


class CheckpointStore:
    """The `checkpoints` folder of one run directory."""

    def __init__(self, layout: RunLayout, retention: Retention) -> None:
        self._layout = layout
        self._retention = retention
        self._generation = 0

    def claim(self, job_id: str | None) -> int:
        """Take the next generation, from now on the only one that may commit; returns it.

        Raises:
            RunDirectoryError: the directory or the lock cannot be had.
        """
        make_private_directory(self._layout.checkpoints)
        with self._locked():
            claimed = (read_json(self._layout.generation) or {}).get("generation", 0)
            self._generation = int(claimed) + 1
            write_json(
                self._layout.generation,
                {"generation": self._generation, "job_id": job_id, "host": socket.gethostname(), "time": time.time()},
            )
            # What an older attempt had begun to write: it may not commit it any more.
            for leftover in self._layout.checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
                leftover.unlink(missing_ok=True)
        return self._generation

    def commit(
        self, epoch: int, step: int, *, epoch_finished: bool, write: Callable[[IO[bytes]], None], manifest: Mapping[str, Any]
    ) -> Path:
        """Let `write` fill a checkpoint, make it durable, point to it, and only then let older ones go.

        `manifest` needs `metrics`; whatever else it holds is recorded.

        Raises:
            FencedError: a newer attempt has started; nothing was moved or deleted.
            CheckpointSaveError: the file system failed; everything older is intact.
        """
        name = checkpoint_name(epoch, None if epoch_finished else step)
        path = self._layout.checkpoints / name
        began = time.monotonic()
        try:
            self.refuse_if_fenced()
            size_bytes, digest = write_durably(path, write, publishing=self._owned())
            entry = {
                "file": name,
                "size_bytes": size_bytes,
                "digest": digest,
                "epoch": epoch,
                "step": step,
                "epoch_finished": epoch_finished,
                "generation": self._generation,
            }
            with self._owned():
                write_json(
                    self._layout.checkpoints / manifest_name(name),
                    {**entry, **manifest, "save_s": round(time.monotonic() - began, 4), "time": time.time()},
                )
                write_json(self._layout.latest, entry)
                infos = self.infos()
                self._link_best(infos)
                self._delete(self._retention.surplus(infos, {name}))
        except (FencedError, RunDirectoryError):
            raise
        except (OSError, CheckpointCorruptError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointSaveError(
                f"{path}: the checkpoint could not be written ({reason}); the ones before it are intact: "
                "free some space or mend the file system, then submit again"
            ) from error
        return path

    def infos(self) -> list[CheckpointInfo]:
        """Return every committed checkpoint, in order of training; rebuilt from the manifests on disk."""
        return sorted((info for info, _ in self._manifests()), key=lambda info: info.order)

    def newest_good(self, report: Callable[[str], None]) -> CheckpointInfo | None:
        """Return the checkpoint the pointer names, or the newest one that verifies if that is damaged; None if there is none.

        `report` is told of each damaged one.

        Raises:
            CheckpointCorruptError: there are checkpoints, and all are damaged.
        """
        manifests = {info.name: (info, manifest) for info, manifest in self._manifests()}
        try:
            pointer = read_json(self._layout.latest)
            pointed = None if pointer is None else str(pointer.get("file"))
        except CheckpointCorruptError as error:
            report(str(error))
            pointed = None
        if not manifests and not os.path.lexists(self._layout.latest):
            return None
        if pointed is not None and pointed not in manifests:
            report(f"{self._layout.latest} names {pointed!r}, which is not there, or has no intact manifest")
        newest_first = sorted(manifests, key=lambda name: manifests[name][0].order, reverse=True)
        # A file newer than the pointer was never acknowledged; it comes after the one that was, or serves if that is bad.
        for name in sorted(newest_first, key=lambda name: name != pointed):
            info, manifest = manifests[name]
            problem = self._problem(name, manifest)
            if problem is None:
                return info
            report(problem)
        raise CheckpointCorruptError(
            f"{self._layout.checkpoints}: no checkpoint here is intact; submit with resume.from=none to begin anew "
            "(what is there moves to superseded/), or with resume.from=PATH"
        )

    def find(self, *, epoch: int | None = None, step: int | None = None, best: bool = False) -> CheckpointInfo:
        """Return the checkpoint of a finished epoch, of an optimizer step, or the best one; verified.

        Raises:
            CheckpointNotFoundError: there is none; the message lists those there are.
            CheckpointCorruptError: it is damaged.
        """
        infos = self.infos()
        if best:
            found, asked = self._retention.best(infos)[:1], "resume.from=best"
            known = "no checkpoint here has the metric checkpoint.monitor"
        elif epoch is not None:
            found, asked = [info for info in infos if info.epoch_finished and info.epoch == epoch], f"resume.epoch={epoch}"
            known = _known("epochs", [info.epoch for info in infos if info.epoch_finished])
        else:
            found, asked = [info for info in infos if info.step == step][-1:], f"resume.step={step}"
            known = _known("steps", [info.step for info in infos])
        if not found:
            raise CheckpointNotFoundError(f"{asked}: {self._layout.checkpoints} has no such checkpoint; {known}")
        manifest = read_json(self._layout.checkpoints / manifest_name(found[0].name))
        problem = self._problem(found[0].name, manifest or {})
        if problem is not None:
            raise CheckpointCorruptError(f"{asked}: {problem}; choose another one; {known}")
        return found[0]

    def own(self, path: Path) -> CheckpointInfo | None:
        """Return the checkpoint whose bytes `path` holds, where that is a file of this folder (best_model.pt, say); None elsewhere.

        Raises:
            CheckpointCorruptError: it is in this folder, but no checkpoint was committed with its bytes.
        """
        if path.parent.resolve() != self._layout.checkpoints.resolve():
            return None
        try:
            _, digest = file_digest(path)
        except OSError as error:
            raise CheckpointCorruptError(f"{path} cannot be read ({error.strerror})") from None
        found = next((info for info, manifest in self._manifests() if manifest.get("digest") == digest), None)
        if found is None:
            raise CheckpointCorruptError(f"{path} is damaged, or no checkpoint of this run: choose another one")
        return found

    def path(self, name: str) -> Path:
        """Return the path of a checkpoint's file.

        Raises:
            CheckpointNotFoundError: `name` is no checkpoint's name, so it must not be looked up.
        """
        if parse_checkpoint_name(name) is None:
            raise CheckpointNotFoundError(f"{name!r} is not the name of a checkpoint")
        return self._layout.checkpoints / name

    def rewind(self, keep: str | None) -> None:
        """Go back to checkpoint `keep` (None: to before the first): later ones move to superseded/, nothing is deleted.

        The pointer moves first, so an interruption leaves files that nothing names, and a second call finishes the job.

        Raises:
            CheckpointNotFoundError: `keep` is not there any more; nothing was moved.
        """
        with self._owned():
            manifests = {info.name: (info, manifest) for info, manifest in self._manifests()}
            infos = sorted((info for info, _ in manifests.values()), key=lambda info: info.order)
            if keep is None:
                later = infos
                self._layout.latest.unlink(missing_ok=True)
                sync_directory(self._layout.checkpoints)
            elif keep in manifests:
                kept, manifest = manifests[keep]
                later = [info for info in infos if info.order > kept.order]
                fields = ("file", "size_bytes", "digest", "epoch", "step", "epoch_finished")
                write_json(self._layout.latest, {**{key: manifest[key] for key in fields}, "generation": self._generation})
            else:
                known = ", ".join(manifests) or "nothing"
                raise CheckpointNotFoundError(f"{self._layout.checkpoints}: {keep} is not there any more; resume from another one: {known}")
            names = [name for info in later for name in (info.name, manifest_name(info.name))]
            names += self._manifests_alone()  # of an interrupted call
            if names:
                make_private_directory(self._layout.superseded)
                for name in names:
                    os.rename(self._layout.checkpoints / name, free_name(self._layout.superseded / name))
                sync_directory(self._layout.superseded)
                sync_directory(self._layout.checkpoints)
            self._link_best([info for info in infos if info not in later])

    def _manifests(self) -> Iterator[tuple[CheckpointInfo, dict[str, Any]]]:
        try:
            names = os.listdir(self._layout.checkpoints)
        except FileNotFoundError:
            return
        for name in names:
            if parse_checkpoint_name(name) is None:
                continue
            with contextlib.suppress(CheckpointError, ValueError, TypeError, AttributeError, KeyError):
                manifest = read_json(self._layout.checkpoints / manifest_name(name))
                if manifest is None or manifest["file"] != name:
                    continue
                yield (
                    CheckpointInfo(
                        name,
                        int(manifest["epoch"]),
                        int(manifest["step"]),
                        bool(manifest["epoch_finished"]),
                        {str(key): float(value) for key, value in manifest["metrics"].items()},
                    ),
                    manifest,
                )

    def _manifests_alone(self) -> list[str]:
        """Return the names of manifests whose checkpoint is not there."""
        names = set(os.listdir(self._layout.checkpoints))
        files = {name: f"{name.removesuffix('.json')}.pt" for name in names if name.endswith(".json")}
        return sorted(name for name, file in files.items() if parse_checkpoint_name(file) is not None and file not in names)

    def _problem(self, name: str, manifest: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a checkpoint's bytes, None if nothing is."""
        path = self._layout.checkpoints / name
        try:
            size_bytes, digest = file_digest(path)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if size_bytes != manifest.get("size_bytes"):
            return f"{path} has {size_bytes} bytes, but {manifest.get('size_bytes')} were committed"
        if digest != manifest.get("digest"):
            return f"{path} is damaged: its digest is not the one that was committed"
        return None

    def _link_best(self, infos: list[CheckpointInfo]) -> None:
        best = self._retention.best(infos)[:1]
        target = self._layout.best
        if not best:
            target.unlink(missing_ok=True)
            return
        source = self._layout.checkpoints / best[0].name
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

    def _delete(self, surplus: list[CheckpointInfo]) -> None:
        for info in surplus:
            # The manifest first: a file without one is never trusted, a manifest without a file would be looked for.
            for name in (manifest_name(info.name), info.name):
                (self._layout.checkpoints / name).unlink(missing_ok=True)

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has taken over."""
        newest = read_json(self._layout.generation) or {}
        if self._generation and newest.get("generation") != self._generation:
            raise FencedError(
                f"{self._layout.root}: attempt {self._generation} is not the newest any more: attempt {newest.get('generation')} "
                f"(job {newest.get('job_id')} on {newest.get('host')}) took over; this one stops without touching anything"
            )

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        """Hold the lock, as the newest attempt."""
        with self._locked():
            self.refuse_if_fenced()
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # No soft lock in place of flock: a dead host's would never be given back.
        lock = FileLock(self._layout.lock, timeout=LOCK_TIMEOUT_S, mode=0o600, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            holder = read_json(self._layout.generation) or {}
            raise RunDirectoryError(
                f"{self._layout.lock}: another process held this lock for {LOCK_TIMEOUT_S:g} s; the last attempt was job "
                f"{holder.get('job_id')} on {holder.get('host')}: end it if it hangs, then submit again"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise RunDirectoryError(
                f"{self._layout.lock}: cannot be locked ({error.strerror or error}); put run_dir on a file system that has flock (Lustre: "
                "mounted with -o flock)"
            ) from None
        try:
            yield
        finally:
            lock.release()


def _known(what: str, numbers: list[int]) -> str:
    return f"there are the {what} {', '.join(str(number) for number in sorted(set(numbers)))}" if numbers else f"there are no {what} yet"


def free_name(path: Path) -> Path:
    """Return `path`, or the first of path.1, path.2, … that is not taken: an epoch can be superseded twice."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate
