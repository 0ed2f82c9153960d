"""The agreement: many schedules of ranks as threads over one store in memory, and once over real sockets.

Real processes with real signals run it in test_exact_resume.py.
"""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.distributed.agreement import Agreement
from hpcckpt.errors import AgreementError

TICKS = 12


def run_together(world_size: int, one_rank, store_of_rank=None) -> list[object]:
    """Run one function as N ranks in N threads and return their results."""
    shared = dist.HashStore()
    results: list[object] = [None] * world_size

    def target(rank: int) -> None:
        try:
            results[rank] = one_rank(rank, shared if store_of_rank is None else store_of_rank(rank))
        except BaseException as error:  # shown by the assertion of the caller
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), f"a rank hangs: {results}"
    return results


wishes = st.dictionaries(st.tuples(st.integers(0, 3), st.integers(1, TICKS)), st.sampled_from(["stop", "save"]), max_size=4)
paces = st.lists(st.sampled_from([0.0, 0.0005, 0.003]), min_size=4, max_size=4)


@settings(max_examples=200, deadline=None)
@given(world_size=st.integers(2, 4), planned=wishes, paces=paces)
def test_all_ranks_act_on_the_same_wishes_at_the_same_ticks(world_size, planned, paces):
    """Ranks run at their own pace, any of them wishes at any tick, and a stop ends the loop, as in training."""
    barrier = threading.Barrier(world_size)

    def one_rank(rank, store):
        agreement = Agreement(store, rank, world_size, timeout_s=30)
        acted = []
        for tick in range(1, TICKS + 1):
            time.sleep(paces[rank])
            if (rank, tick) in planned:
                agreement.wish(planned[rank, tick])
            wish = agreement.tick()
            if wish is not None:
                acted.append((tick, wish))
                barrier.wait(30)  # what follows a decision (a save, leaving) is a collective
            if wish == "stop":
                break
        barrier.wait(30)
        agreement.close()
        return acted

    results = run_together(world_size, one_rank)

    assert all(isinstance(result, list) for result in results), results
    assert all(result == results[0] for result in results), results
    asked = {wish for (rank, tick), wish in planned.items() if rank < world_size}
    assert {wish for _, wish in results[0]} <= asked
    first_asked = min((tick for (rank, tick) in planned if rank < world_size), default=TICKS + 1)
    assert all(tick >= first_asked for tick, _ in results[0])


def test_over_real_sockets_a_wish_is_acted_on_soon_by_ranks_in_step_with_each_other():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))

    barrier = threading.Barrier(3)

    def one_rank(rank, store):
        agreement = Agreement(store, rank, 3)
        tick = 0
        while True:
            barrier.wait(30)  # an all-reduce
            tick += 1
            if rank == 2 and tick >= 5:
                agreement.wish("stop")  # again and again, as a latched signal does
            if agreement.tick() == "stop":
                break
            while tick == 5 and agreement._decision is None:
                time.sleep(0.001)  # a training step that is longer than the threads need to answer
        barrier.wait(30)
        agreement.close()
        return tick

    def client(_rank):
        return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))

    ticks = run_together(3, one_rank, client)
    # A thread may answer for its rank just before or just behind that rank's fifth tick.
    assert ticks in ([5, 5, 5], [6, 6, 6])


def test_a_wish_at_the_very_last_tick_keeps_nobody_from_leaving():
    barrier = threading.Barrier(2)

    def one_rank(rank, store):
        agreement = Agreement(store, rank, 2)
        agreement.tick()
        if rank == 1:
            agreement.wish("stop")
        barrier.wait(30)
        agreement.close()
        return agreement._thread

    assert run_together(2, one_rank) == [None, None]


def test_a_rank_that_is_held_for_one_that_is_gone_gives_up_and_says_so():
    gone = threading.Event()

    def one_rank(rank, store):
        if rank == 1:
            gone.wait(30)
            return None
        agreement = Agreement(store, rank, 2, timeout_s=0.5)
        agreement.wish("stop")

        def tick_on():
            while True:
                agreement.tick()
                time.sleep(0.001)

        with pytest.raises(AgreementError, match="rank 0 waited") as caught:
            tick_on()
        gone.set()
        agreement.close(timeout_s=0)
        return str(caught.value)

    assert "one of them is gone" in str(run_together(2, one_rank)[0])


def test_a_single_rank_agrees_with_itself_at_once():
    agreement = Agreement(dist.HashStore(), 0, 1)
    assert agreement.tick() is None
    agreement.wish("save")
    agreement.wish("stop")
    agreement.wish("save")
    assert agreement.tick() == "stop"
    assert agreement.tick() is None
    agreement.close()
