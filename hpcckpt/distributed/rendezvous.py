"""How the ranks of a job find each other: one key-value store, served by rank 0.

The port is not configured. Job id, step id and restart count give a short list of candidates; rank 0 serves on the
first that is free, and the others try the same list. A token in the store tells a stranger's store (another job on
the node, an earlier incarnation) from ours. Candidates lie below the kernel's range for outgoing connections
(32768 on Linux), so no client socket takes one by chance.
"""

import contextlib
import random
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import RendezvousError

_PORTS = range(20000, 32768)
_CANDIDATES = 16
_TOKEN_KEY = "hpcckpt/token"  # noqa: S105 - no secret
# One attempt at a port that answers; a stranger may accept and stay silent.
_ATTEMPT = timedelta(seconds=5)
DEFAULT_TIMEOUT_S = 300.0


def candidate_ports(token: str) -> list[int]:
    """Return the ports to try, in order; the same on every rank of one attempt."""
    return random.Random(token).sample(_PORTS, _CANDIDATES)  # noqa: S311 - not random: agreed


def job_token(task: TaskEnvironment) -> str:
    """Return what tells this attempt of this job from every other."""
    return f"{task.job_id}.{task.step_id}.{task.restart_count}"


def open_store(task: TaskEnvironment, timeout_s: float = DEFAULT_TIMEOUT_S) -> dist.Store:
    """Return the store that all ranks of `task` share. Every rank must call it.

    Raises:
        RendezvousError: not all found each other within `timeout_s` seconds; names host and ports tried.
    """
    if task.launcher == "torchrun":
        # torchrun's agent has already chosen address and port, and may serve the store itself.
        store, _, _ = next(dist.rendezvous("env://", task.rank, task.world_size, timeout=timedelta(seconds=timeout_s)))
        return dist.PrefixStore("hpcckpt", store)
    if task.world_size == 1:
        return dist.HashStore()
    token = job_token(task)
    timeout = timedelta(seconds=timeout_s)
    if task.rank == 0:
        return _serve(token, task.world_size, timeout)
    return _join(task.first_host, token, timeout)


def _serve(token: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    ports = candidate_ports(token)
    for port in ports:
        with contextlib.suppress(dist.DistNetworkError):
            store = dist.TCPStore(
                "0.0.0.0",  # noqa: S104 - ranks of other nodes must reach it
                port,
                world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
            )
            store.set(_TOKEN_KEY, token)
            return store
    raise RendezvousError(f"rank 0 could not serve on any of the ports {ports} of {socket.gethostname()}: all are in use")


def _join(host: str, token: str, timeout: timedelta) -> dist.TCPStore:
    deadline = time.monotonic() + timeout.total_seconds()
    ports = candidate_ports(token)
    delay_s = 0.02
    while time.monotonic() < deadline:
        for port in ports:
            store = _try(host, port, token, timeout)
            if store is not None:
                return store
        # Rank 0 may still be starting Python.
        time.sleep(delay_s)
        delay_s = min(delay_s * 1.5, 0.5)
    raise RendezvousError(
        f"no answer from rank 0 on host {host}, ports {ports}, in {timeout.total_seconds():g} s: did rank 0 fail (see its "
        "log), or does a firewall between the nodes block these ports?"
    )


def _try(host: str, port: int, token: str, timeout: timedelta) -> dist.TCPStore | None:
    try:
        # A refused connection costs a round trip here, and TCPStore's whole timeout there.
        socket.create_connection((host, port), timeout=_ATTEMPT.total_seconds()).close()
        store = dist.TCPStore(host, port, is_master=False, timeout=_ATTEMPT, wait_for_workers=False)
        store.wait([_TOKEN_KEY], _ATTEMPT)
        if store.get(_TOKEN_KEY).decode(errors="replace") != token:
            return None
    except (OSError, RuntimeError):
        return None
    store.set_timeout(timeout)
    return store
