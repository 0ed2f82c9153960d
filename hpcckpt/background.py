"""Saves beside the training: it stands still for one copy of the state, and everything else happens behind its back.

The copy goes to memory that is kept from save to save, in the shape of the file. From there a process beside this one writes it
(`store.writing`); manifest, pointer and retention follow here, on a thread, which waits most of the time.
The state may change as soon as `stage` has returned. One save at a time is on its way: memory for more would be the training's.
"""

import contextlib
import ctypes
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from hpcckpt.state.later import LaterCopy, TornError
from hpcckpt.state.pickled import pickled
from hpcckpt.store.checkpoints import CheckpointStore
from hpcckpt.store.image import Image
from hpcckpt.store.ledger import Ledger
from hpcckpt.store.sink import Sink
from hpcckpt.store.writing import Laid, Writer


@dataclass(frozen=True)
class Files:
    """Where a rank saves, and how."""

    store: CheckpointStore
    ledger: Ledger
    # Rank 0's; None where the training waits for its saves.
    background: "Background | None" = None
    # Whether a save that comes again soon is left out while another one is on its way.
    skips: bool = False
    # Whether what changes in an optimizer's step only is copied beside forward and backward passes.
    is_lazy: bool = False


class Background:
    """Rank 0's. Made, used and closed by the training's thread."""

    def __init__(self, signals: Sequence[str], note: Callable[[str], None]) -> None:
        """Start nothing yet; `signals` as `Companion` takes them, `note` tells the user something once."""
        self._note = note
        self._writer = Writer(signals)
        self._image: Image | None = None
        self._pinned: tuple[int, int] | None = None
        self._warming: threading.Thread | None = None
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Of what is left to be copied; the training's thread.
        self._copy: LaterCopy | None = None
        # Whether something else than a step has changed what was left to be copied.
        self.is_torn = False
        # Read on every step: a plain attribute, no call.
        self.has_failed = False

    @property
    def is_busy(self) -> bool:
        """Whether a save is on its way."""
        return self._saving is not None and self._saving.is_alive()

    def prepare(self, size_bytes: int) -> None:
        """Have memory for a file of about this size, whose first use would take longer than the copy."""

        def warm() -> None:
            try:
                self._reserved(size_bytes).warm()
            except OSError:  # the first save says so
                return

        self._settle_memory()
        warming = threading.Thread(target=warm, name="hpcckpt-warming", daemon=True)
        with contextlib.suppress(RuntimeError):  # a limit of threads: the first save takes longer
            warming.start()
            self._warming = warming

    def stage(self, content: Any, later: Mapping[int, torch.Tensor] | None = None) -> Callable[[IO[bytes]], None] | None:
        """Copy what torch.save would write of `content`; returns what writes that into a file, None where there is no memory for it.

        The save before has to be settled. What is in `later` (see `state.later`) is copied in what is returned; `before_step` waits for
        that.

        Raises:
            RuntimeError, TypeError, pickle.PicklingError: as torch.save, of what it cannot save.
        """
        self._settle_memory()
        try:
            found = pickled(content)
            if found is None:
                laid = self._saved(content)
            else:
                laid, starts = Laid.out(found.entries(), self._reserved)
                self._pin()
                memory = self._reserved(0).memory
                left_out = found.put(memory, starts, later or ())
                if left_out:
                    self._copy = LaterCopy(left_out, ctypes.addressof(ctypes.c_char.from_buffer(memory)), later or {})
        except OSError as error:
            self._note(f"checkpoint.async_save: saved while the training waits, since there is no memory for a copy of the state ({error})")
            self._let_go()
            return None
        image, writer, copy = self._reserved(0), self._writer, self._copy

        def write(file: IO[bytes]) -> None:
            if copy is not None:
                copy.copy()
            cast(Sink, file).entrust(lambda descriptor: writer.write(image, laid, descriptor))
            if copy is not None:
                copy.wait()

        return write

    def before_step(self) -> None:
        """Wait until nothing has to be copied any more of what a step changes."""
        if self._copy is not None:
            copy, self._copy = self._copy, None
            copy.confirm()

    def start(self, save: Callable[[], object]) -> None:
        """Have `save` done beside the training. The end of the process waits for it."""
        copy = self._copy

        def run() -> None:
            try:
                save()
            except TornError:
                self.is_torn = self.has_failed = True
            except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
                self._failure = error
                self.has_failed = True
            finally:
                if copy is not None:
                    copy.give_up()

        self._saving = threading.Thread(target=run, name="hpcckpt-save")
        try:
            self._saving.start()
        except RuntimeError:  # a limit of threads
            self._saving = None
            run()

    def settle(self) -> None:
        """Return when nothing is on its way any more; harmless when called twice.

        Raises:
            CheckpointSaveError, FencedError: the save that was could not be done. It is raised once.
        """
        self.before_step()
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        failure, self._failure, self.has_failed = self._failure, None, False
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for what is on its way, whatever becomes of it, and let go of process and memory; harmless when called twice."""
        self.before_step()
        if self._saving is not None:
            self._saving.join()
        self._settle_memory()
        self._writer.close()
        self._let_go()

    def _reserved(self, size_bytes: int) -> Image:
        if self._image is None:
            self._image = Image()
        if size_bytes > self._image.size_bytes:
            self._unpin()
            self._image.reserve(size_bytes)
        return self._image

    def _let_go(self) -> None:
        self._unpin()
        if self._image is not None:
            self._image.close()
            self._image = None

    def _settle_memory(self) -> None:
        if self._warming is not None:
            self._warming.join()
            self._warming = None

    def _saved(self, content: Any) -> Laid:
        """Return what lies there of a content that only torch.save can write."""
        file = _Filling(self._reserved)
        try:
            torch.save(content, file)  # type: ignore[arg-type]  # RawIOBase has all that torch calls
        finally:
            if file.failure is not None:
                raise file.failure from None  # what torch makes of it says less
        return Laid(file.size_bytes)

    def _pin(self) -> None:
        """Have the memory's pages stay where they are, so that a GPU copies into them by itself; slower, but as well, without."""
        if self._pinned is None and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            image = self._reserved(0)
            start = ctypes.addressof(ctypes.c_char.from_buffer(image.memory))
            if int(_cuda().cudaHostRegister(start, image.size_bytes, 0)) == 0:
                self._pinned = start, image.size_bytes

    def _unpin(self) -> None:
        if self._pinned is not None:
            _cuda().cudaHostUnregister(self._pinned[0])
            self._pinned = None


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _Filling(io.RawIOBase):
    """A write-only file in an image, which grows with it."""

    def __init__(self, reserved: Callable[[int], Image]) -> None:
        super().__init__()
        self._reserved = reserved
        self.size_bytes = 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        with memoryview(data) as whole, whole.cast("B") as view:
            start, end = self.size_bytes, self.size_bytes + len(view)
            try:
                image = self._reserved(0)
                if end > image.size_bytes:
                    image = self._reserved(max(end, start + start // 2))
            except OSError as error:
                self.failure = error
                raise
            image.memory[start:end] = view
            self.size_bytes = end
            return len(view)
