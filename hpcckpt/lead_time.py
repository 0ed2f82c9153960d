"""Whether there is enough time between Slurm's warning and the end: a decision as a value, as in `policy`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcckpt.policy import RESERVE_S, SLURM_EARLY_S


@dataclass(frozen=True)
class LeadTime:
    """Whether `requeue.lead_time_s` is long enough: why not, or None; and what may be wrong with it, or None."""

    refusal: str | None = None
    warning: str | None = None


def check_lead_time(events: Iterable[Mapping[str, Any]], *, lead_time_s: int, time_min: int) -> LeadTime:
    """Compare the lead time with what earlier attempts of this run have measured: saves, and waits for the stop.

    Args:
        events: the ledger.
        lead_time_s: `requeue.lead_time_s`.
        time_min: `slurm.time_min`.
    """
    known = list(events)
    # Of late: a run may have grown, or moved to another disk.
    saves = [event for event in known if event.get("event") == "saved" and "save_s" in event][-5:]
    saves_s = [float(event["save_s"]) for event in saves]
    # Beside the training: one may be on its way when the warning comes, and the last one comes behind it.
    pending_s = max((float(event["save_s"]) for event in saves if "stall_s" in event), default=0.0)
    waits_s = [float(event["waited_s"]) for event in known if event.get("event") == "stop" and event.get("waited_s") is not None][-5:]
    if not saves_s:
        return LeadTime()
    save_s, wait_s = max(saves_s), max(waits_s, default=0.0)
    needed_s = pending_s + save_s + wait_s + RESERVE_S
    before = f" (the one before that is still on its way, {pending_s:.1f} s)" if pending_s else ""
    measured = f"a save took up to {save_s:.1f} s{before}, and coming to the stop {wait_s:.1f} s"
    better = f"set requeue.lead_time_s={math.ceil(2 * needed_s)}"
    if lead_time_s < needed_s:
        return LeadTime(refusal=f"requeue.lead_time_s: {lead_time_s} s are too short: {measured}; {better}")
    if lead_time_s < 1.5 * needed_s:
        return LeadTime(warning=f"requeue.lead_time_s: {lead_time_s} s are tight: {measured}; {better}")
    if time_min * 60 < 2 * (lead_time_s + SLURM_EARLY_S):
        left_s = max(0, time_min * 60 - lead_time_s - SLURM_EARLY_S)
        return LeadTime(
            warning=f"slurm.time_min: of {time_min} min the warning may leave {left_s:.0f} s to train in, since Slurm sends it up to "
            f"{SLURM_EARLY_S:.0f} s early; ask for more time, or a shorter requeue.lead_time_s"
        )
    return LeadTime()
