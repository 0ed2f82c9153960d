"""Ranks that tick, and what may go wrong with one. One rank; prints what it found out, and waits to be killed."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from hpcckpt.distributed import Agreement, Ranks
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import AgreementError

TIMEOUT_S = 1.5
ROUNDS = 300


def lose_one(agreement, victim, how):
    """Tick; one rank ends at its fifth, and then all others wish until they are told who is gone."""
    begin = time.monotonic()
    try:
        for _ in range(4):
            agreement.tick()
        if task.rank == victim:
            os.kill(os.getpid(), how)
        while not is_gone(victim):
            time.sleep(0.01)
        begin = time.monotonic()
        while True:
            agreement.wish("stop")
            assert agreement.tick() is None
    except AgreementError as error:
        return {"error": str(error), "seconds": time.monotonic() - begin, "pids": pids}


def is_gone(rank):
    """Whether a process is stopped, dead, or has been waited for."""
    try:
        return Path(f"/proc/{pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def fetch():
    """Hang, as a file system may."""
    threading.Event().wait()


def step():
    """Wait for all ranks."""
    ranks.barrier()


def hang(agreement):
    """Agree where to stop; there one rank hangs, one is frozen, and one waits in a collective. Rank 0 asks."""
    if task.rank == 1:
        agreement.wish("stop")
    while agreement.tick() != "stop":
        time.sleep(0.001)
    if task.rank == 1:
        step()
    if task.rank == 2:
        fetch()
    if task.rank == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    while not is_gone(3) or not all(rank.place and rank.place.endswith(("step", "fetch")) for rank in agreement.whereabouts(1.0)[1:3]):
        time.sleep(0.01)
    begin = time.monotonic()
    return {"where": agreement.whereabouts_text(1.0), "seconds": time.monotonic() - begin, "pids": pids}


def many_rounds(agreement):
    """Wish on random ranks, often on several at once, at random paces, with collectives here and there, and return what was done."""
    mine, together = random.Random(task.rank), random.Random(7)
    acted, tick = [], 0
    while len(acted) < ROUNDS:
        tick += 1
        if together.random() < 0.2:
            step()
        if mine.random() < 0.1:
            time.sleep(mine.random() * 0.002)
        if mine.random() < 0.3:
            agreement.wish(mine.choice(["save", "stop"]))
        wish = agreement.tick()
        if wish is not None:
            acted.append((tick, wish))
            step()
    step()
    agreement.close()
    is_ended = not any(thread.name == "hpcckpt-agreement" for thread in threading.enumerate())
    return {"acted": ranks.gather(acted), "is_ended": is_ended}


task = TaskEnvironment.from_environ(os.environ)
ranks = Ranks(task, torch.device("cpu"))
pids = ranks.gather(os.getpid())
agreement = Agreement(ranks.store, task.rank, task.world_size, TIMEOUT_S)
ranks.barrier()
match sys.argv[1:]:
    case ["lose", victim, how]:
        result = lose_one(agreement, int(victim), getattr(signal, how))
    case ["hang"]:
        result = hang(agreement)
    case ["rounds"]:
        result = many_rounds(agreement)
print(f"RESULT {json.dumps(result)}", flush=True)
# The end of one would be seen by the others.
signal.pause()
