"""Random number generators of Python, NumPy and torch, as tensors and primitives that `weights_only` loads."""

import hashlib
import random
import sys
from typing import Any

import torch


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
