"""A network file system may show another node what was there a minute ago: wait until the last attempt's last save is to be seen.

NFS keeps names and attributes for up to a minute (acdirmax, nfs(5)), and a requeued job mostly starts on other nodes. Going on from an
older checkpoint would lose steps without a word. The ledger grows while the pointer is replaced, so the one may be seen where the other is
not: a save that the ledger knows of and the pointer does not show means that the pointer is stale.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from hpcckpt.errors import CheckpointCorruptError
from hpcckpt.layout import RunLayout
from hpcckpt.store.durable import read_json

# Longer than NFS keeps anything by default.
PATIENCE_S = 90.0
_POLL_S = 0.5


def is_behind(pointer: Mapping[str, Any] | None, events: Iterable[Mapping[str, Any]], generation: int) -> bool:
    """Return whether the ledger knows of a save by an earlier attempt that the pointer does not show yet.

    Args:
        pointer: what latest.json says; None: nothing.
        events: the ledger.
        generation: of this attempt. A ledger that knows of later ones is of a checkpoints folder that is no more.
    """
    saves = [event for event in events if event.get("event") == "saved" and event.get("generation") is not None]
    if not saves or int(saves[-1]["generation"]) >= generation:
        return False
    saved = (int(saves[-1]["generation"]), int(saves[-1].get("step", 0)))
    # A pointer of a later generation was moved on purpose, back to an earlier step perhaps.
    shown = (0, 0) if pointer is None else (int(pointer.get("generation", 0)), int(pointer.get("step", 0)))
    return shown[0] < saved[0] or (shown[0] == saved[0] and shown[1] < saved[1])


def await_last_save(
    layout: RunLayout, events: Iterable[Mapping[str, Any]], generation: int, patience_s: float = PATIENCE_S
) -> float | None:
    """Wait until the pointer shows what the ledger says was saved; returns the seconds it took, None: more than `patience_s`."""
    known = list(events)
    began = time.monotonic()
    while is_behind(_pointer(layout), known, generation):
        if time.monotonic() - began > patience_s:
            return None
        time.sleep(_POLL_S)
        # Reading a folder anew has NFS ask the server for it.
        with contextlib.suppress(OSError):
            os.listdir(layout.checkpoints)
    return time.monotonic() - began


def _pointer(layout: RunLayout) -> Mapping[str, Any] | None:
    try:
        pointer: Mapping[str, Any] | None = read_json(layout.latest)
    except CheckpointCorruptError:  # damaged: that is dealt with elsewhere, and waiting would not help
        return {"generation": 1 << 62}
    return pointer
