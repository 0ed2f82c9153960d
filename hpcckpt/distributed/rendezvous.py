"""How the ranks of a job find each other: one key-value store, served by rank 0.

No port is configured. Job id, step id and restart count give a short list of candidates; rank 0 listens on the first
that is free, and the others try the same list. What answers there is a greeter, not the store: it says whose job it is
and on which port the store listens, so that a stranger (another job on the node, an earlier incarnation, any server
at all) is told apart by one line with a deadline. torch's TCPStore, connected to a server that accepts and stays
silent, would wait for ever.

Candidates lie below the kernel's range for outgoing connections (32768 on Linux), so no client socket takes one.
"""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import RendezvousError

_PORTS = range(20000, 32768)
_CANDIDATES = 16
_LINE_BYTES = 512
# For a stranger that accepts and stays silent; a greeter answers in a round trip.
ANSWER_TIMEOUT_S = 5.0
DEFAULT_TIMEOUT_S = 300.0


def candidate_ports(token: str) -> list[int]:
    """Return the ports to try, in order; the same on every rank of one attempt."""
    return random.Random(token).sample(_PORTS, _CANDIDATES)  # noqa: S311 - not to be unpredictable, but agreed


def job_token(task: TaskEnvironment) -> str:
    """Return what tells this attempt of this job from every other."""
    return f"hpcckpt/{task.job_id}/{task.step_id}/{task.restart_count}"


@contextlib.contextmanager
def open_store(task: TaskEnvironment, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[dist.Store]:
    """Yield the store that all ranks of `task` share. Every rank must enter it, and leave when all have used the store.

    Raises:
        RendezvousError: not all found each other within `timeout_s` seconds; names host and ports tried.
    """
    timeout = timedelta(seconds=timeout_s)
    if task.launcher == "torchrun":
        # torchrun's agent has already chosen address and port, and may serve the store itself.
        store, _, _ = next(dist.rendezvous("env://", task.rank, task.world_size, timeout=timeout))
        # It serves all attempts: the addresses of one must not be taken for another's.
        yield dist.PrefixStore(f"hpcckpt {task.restart_count}", store)
    elif task.world_size == 1:
        yield dist.HashStore()
    elif task.rank == 0:
        # Port 0: the kernel's choice is free and stays ours.
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, timeout=timeout, wait_for_workers=False)  # noqa: S104 - for other nodes
        with _greeter(job_token(task), store.port):
            yield store
    else:
        port = _ask_greeter(task.first_host, job_token(task), timeout_s)
        yield dist.TCPStore(task.first_host, port, is_master=False, timeout=timeout, wait_for_workers=False)


@contextlib.contextmanager
def _greeter(token: str, store_port: int) -> Iterator[None]:
    """Tell whoever connects to the first free candidate port whose job this is, and where its store is."""
    listener = _listen_on_first_free(candidate_ports(token))

    closing = threading.Event()

    def greet() -> None:
        while not closing.is_set():
            with contextlib.suppress(OSError):  # one that went away again, or our own end
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(ANSWER_TIMEOUT_S)
                    connection.sendall(f"{token} {store_port}\n".encode())

    thread = threading.Thread(target=greet, name="hpcckpt-greeter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        # close() alone does not wake a thread that is blocked in accept().
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(ANSWER_TIMEOUT_S)


def _listen_on_first_free(ports: list[int]) -> socket.socket:
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), backlog=1024)
    raise RendezvousError(f"rank 0 could not listen on any of the ports {ports} of {socket.gethostname()}: all are in use")


def _ask_greeter(host: str, token: str, timeout_s: float) -> int:
    """Return the port of rank 0's store."""
    ports = candidate_ports(token)
    deadline = time.monotonic() + timeout_s
    delay_s = 0.02
    while True:
        for port in ports:
            name, _, store_port = _greeting(host, port).rpartition(" ")
            if name == token and store_port.isdigit():
                return int(store_port)
        if time.monotonic() > deadline:
            raise RendezvousError(
                f"no answer from rank 0 on host {host}, ports {ports}, in {timeout_s:g} s: did rank 0 fail (see its log), or does a "
                "firewall between the nodes block these ports?"
            )
        # Rank 0 may still be starting Python.
        time.sleep(delay_s)
        delay_s = min(delay_s * 1.5, 0.5)


def _greeting(host: str, port: int) -> str:
    """Return the line that a server says by itself; "" where nobody listens or nothing comes in time."""
    try:
        with socket.create_connection((host, port), ANSWER_TIMEOUT_S) as connection, connection.makefile("rb") as lines:
            return lines.readline(_LINE_BYTES).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""
