"""Random number generators of Python, NumPy and torch, as tensors and primitives that `weights_only` loads."""

import contextlib
import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import get_worker_info


def derive_seed(*parts: object) -> int:
    """Return 63 bits that depend on every part: the same on every machine, independent for different parts."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed every generator of this process; NumPy's only where it is already imported."""
    random.seed(seed)
    torch.manual_seed(seed)  # and every CUDA device's
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def drawing(seed: int | None = None) -> Iterator[Callable[[int], None]]:
    """Seed the CPU's generators inside, if at all, and put them back behind it; yields what seeds them anew.

    In a DataLoader's worker, which draws for nobody else, nothing is put back.
    """
    before = None
    if get_worker_info() is None:
        numpy = sys.modules.get("numpy")
        keys = None if numpy is None else numpy.random.get_state(legacy=False)  # half the price
        before = random.getstate(), torch.default_generator.get_state(), numpy, keys
    try:
        if seed is not None:
            seed_cpu(seed)
        yield seed_cpu
    finally:
        if before is not None:
            python, own, numpy, keys = before
            random.setstate(python)
            torch.default_generator.set_state(own)
            if numpy is not None:
                numpy.random.set_state(keys)


def seed_cpu(seed: int) -> None:
    """Seed the CPU's generators; NumPy's only where it is already imported."""
    random.seed(seed)
    # Not torch.manual_seed: it goes to every device, and takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this process."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            # torch has no arithmetic on uint32, and needs none here; int64 loads everywhere.
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        }
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; devices that are not there any more are left out."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, device_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)
    saved = state.get("numpy")
    if saved is not None:
        import numpy as np

        np.random.set_state(  # noqa: NPY002 - the global generator is the one that must go on
            (saved["name"], saved["keys"].numpy().astype("uint32"), saved["position"], saved["has_gauss"], saved["cached_gaussian"])
        )
