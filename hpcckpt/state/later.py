"""Copying beside forward and backward passes what changes in an optimizer's step only: parameters, and what the optimizer keeps of them.

(CheckFreq, FAST 2021, and DataStates-LLM, HPDC 2024, take snapshots in this window.) Nothing stops a script from changing them
elsewhere, so a copy is looked at twice: a few bytes of each tensor, taken where the training stood still, have to be those of the
copy, whatever changed meanwhile; and no version counter of autograd may have moved before the step is let through.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

# Below, copying at once takes no longer than keeping account.
_WORTH_BYTES = 1024 * 1024
_SAMPLE_BYTES = 64
_SAMPLES = 8
_POLL_S = 0.1


class TornError(Exception):
    """Something has changed while it was copied."""


def changed_by_steps(optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, torch.Tensor]:
    """Return the tensors that change when these make a step, and should not otherwise, by the address of their memory.

    Large ones in the CPU's memory: a GPU's are copied into pinned memory at its bus's speed.
    """
    found = {}
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = [value for state in optimizer.state.values() if isinstance(state, Mapping) for value in state.values()]
        for tensor in (*parameters, *kept):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() >= _WORTH_BYTES:
                    found[storage.data_ptr()] = tensor
    return found


class LaterCopy:
    """A copy that is made by another thread; the training's makes this, and calls `confirm` before anything is changed."""

    def __init__(self, storages: Sequence[tuple[torch.UntypedStorage, int]], target: int, tensors: Mapping[int, torch.Tensor]) -> None:
        """Note how things are now.

        Args:
            storages: what is to be copied, each with its place behind `target`.
            target: an address.
            tensors: whose counters tell of changes, by the address of their storage.
        """
        self._storages, self._target = storages, target
        self._training = threading.current_thread()
        self._versions = [(tensor, tensor._version) for tensor in tensors.values()]  # noqa: SLF001 - documented in autograd's notes
        self._samples = [_samples(storage.data_ptr(), storage.nbytes()) for storage, _ in storages]
        self._copied, self._confirmed = threading.Event(), threading.Event()
        self._is_torn = False
        self._is_begun = False

    def copy(self) -> None:
        """Copy, for the first time it is called."""
        if self._is_begun:
            return
        self._is_begun = True
        try:
            for (storage, place), samples in zip(self._storages, self._samples, strict=True):
                size = storage.nbytes()
                ctypes.memmove(self._target + place, storage.data_ptr(), size)  # other threads run meanwhile
                if _samples(self._target + place, size) != samples:
                    self._is_torn = True
        finally:
            self._copied.set()

    def give_up(self) -> None:
        """Let the training go on though nothing was copied; harmless where it was."""
        self._is_begun = True
        self._copied.set()

    def confirm(self) -> None:
        """Wait for the copy, and note whether it is one of a single state. The training's thread, before it changes anything."""
        self._copied.wait()
        if not self._confirmed.is_set():
            if any(tensor._version != version for tensor, version in self._versions):  # noqa: SLF001 - as above
                self._is_torn = True
            self._storages, self._versions = (), []
            self._confirmed.set()

    def wait(self) -> None:
        """Return when the copy is confirmed.

        Raises:
            TornError: it is of no single state.
        """
        if threading.current_thread() is self._training:
            self.confirm()
        while not self._confirmed.wait(_POLL_S):
            if not self._training.is_alive():  # nor changes anything any more
                self.confirm()
        if self._is_torn:
            raise TornError("parameters have changed while they were copied")


def hold_steps(optimizers: Iterable[torch.optim.Optimizer], before: Callable[[], None]) -> None:
    """Have `before` called where one of these is about to make a step."""

    def hook(*_: object) -> None:
        before()

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(hook)


def after_first_step(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> None:
    """Have `act` called once, where this optimizer has made its next step."""

    def hook(*_: object) -> None:
        handle.remove()
        act()

    handle = optimizer.register_step_post_hook(hook)


def _samples(address: int, size_bytes: int) -> bytes:
    last = size_bytes - _SAMPLE_BYTES
    return b"".join(ctypes.string_at(address + last * number // (_SAMPLES - 1), _SAMPLE_BYTES) for number in range(_SAMPLES))
