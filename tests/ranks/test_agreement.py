"""The agreement with threads and stores, and of real processes that die, freeze and hang; its protocol is in test_protocol.py.

Real signals of a job run it in test_exact_resume.py.
"""

import json
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt.distributed.agreement import Agreement
from hpcckpt.distributed.whereabouts import Whereabouts, in_words
from hpcckpt.errors import AgreementError

SCRIPT = Path(__file__).parents[1] / "scripts" / "ticking.py"
SCRIPT_TIMEOUT_S = 1.5
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


@settings(max_examples=100, deadline=None)
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


def test_over_real_sockets_a_wish_is_acted_on_at_once_by_ranks_in_step_with_each_other():
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
        barrier.wait(30)
        agreement.close()
        return tick

    def client(_rank):
        return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))

    ticks = run_together(3, one_rank, client)
    # The others pass the fifth with no word of the wish, or hear of it before.
    assert ticks in ([5, 5, 5], [6, 6, 6])


def test_a_wish_at_the_very_last_tick_keeps_nobody_from_leaving():
    barrier = threading.Barrier(2)

    def one_rank(rank, store):
        agreement = Agreement(store, rank, 2)
        listener = agreement._listener
        agreement.tick()
        if rank == 1:
            agreement.wish("stop")
        barrier.wait(30)
        agreement.close()
        agreement.close()
        return listener.is_alive()

    assert run_together(2, one_rank) == [False, False]


def test_who_waits_for_a_rank_that_has_left_with_an_error_hears_of_it_at_once():
    has_left = threading.Event()

    def one_rank(rank, store):
        agreement = Agreement(store, rank, 2, timeout_s=30)
        if rank == 1:
            agreement.close(timeout_s=5)
            has_left.set()
            return None
        has_left.wait(30)
        begin = time.monotonic()
        agreement.wish("stop")
        with pytest.raises(AgreementError, match=r"rank 1 \(.*, pid \d+\) has left; see its log"):
            agreement.tick()
        agreement.close(timeout_s=5)
        return time.monotonic() - begin

    assert run_together(2, one_rank)[0] < 10


def test_a_single_rank_agrees_with_itself_at_once():
    agreement = Agreement(dist.HashStore(), 0, 1)
    assert agreement.tick() is None
    agreement.wish("save")
    agreement.wish("stop")
    agreement.wish("save")
    assert agreement.tick() == "stop"
    assert agreement.tick() is None
    assert re.fullmatch(r"rank 0 at test_agreement\.py:\d+ in test_a_single_rank_agrees_with_itself_at_once", agreement.whereabouts_text())
    agreement.close()


def test_ranks_at_one_place_are_told_together():
    here, there = "train.py:31 in step", "data.py:12 in __getitem__"
    places = {0: here, 1: here, 2: there, 3: here, 4: None, 5: None}
    ranks = [Whereabouts(rank, f"rank {rank} (n3, pid {rank})", None if place is None else 9, place) for rank, place in places.items()]
    assert in_words(ranks) == (
        "ranks 0,1,3 at train.py:31 in step; rank 2 at data.py:12 in __getitem__; rank 4 (n3, pid 4) gives no answer; "
        "rank 5 (n3, pid 5) gives no answer"
    )


@pytest.fixture
def ticking(forked_ranks, tmp_path, wait_until):
    """A function that runs `ticking.py` as N real ranks and returns what those say that can."""
    children = []

    def run(arguments, world_size, silent=()):
        logs = [tmp_path / str(rank) for rank in range(world_size)]
        for rank, log in enumerate(logs):
            place = {
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_JOB_ID": tmp_path.name,
                "SUBMITIT_LOCAL_NTASKS": str(world_size),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
            }
            children.append(forked_ranks.start("rank", argv=[str(SCRIPT), *arguments], log=str(log), environ=place))
        results = {}

        def has_all():
            for rank in set(range(world_size)) - results.keys() - set(silent):
                if logs[rank].exists() and (found := re.search("^RESULT (.*)\n", logs[rank].read_text(), re.MULTILINE)):
                    results[rank] = json.loads(found[1])
            return results.keys() == set(range(world_size)) - set(silent)

        try:
            wait_until(has_all, "results of all ranks")
        except pytest.fail.Exception as failure:
            pytest.fail(f"{failure}\n{results}\n" + "\n".join(log.read_text() for log in logs if log.exists()))
        return results

    yield run
    for child in children:
        child.kill()
        forked_ranks.children.remove(child)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_is_named_on_all_others_within_the_deadline(ticking, how):
    results = ticking(["lose", "2", how.name], 4, silent=[2])

    for result in results.values():
        assert re.search(rf"no answer in 1.5 s from rank 2 \(\S+, pid {result['pids'][2]}\): gone, or it hangs", result["error"])
    # By rank 0's clock, from the first wish.
    assert SCRIPT_TIMEOUT_S <= max(result["seconds"] for result in results.values()) < 2 * SCRIPT_TIMEOUT_S


def test_where_rank_0_is_killed_the_others_see_at_once_that_its_store_is_lost(ticking):
    results = ticking(["lose", "0", "SIGKILL"], 3, silent=[0])

    for result in results.values():
        assert re.search(rf"store is lost, so rank 0 \(\S+, pid {result['pids'][0]}\) is gone", result["error"])
        assert result["seconds"] < SCRIPT_TIMEOUT_S


def test_where_rank_0_is_frozen_and_its_store_with_it_the_others_name_it_by_their_own_clocks(ticking):
    results = ticking(["lose", "0", "SIGSTOP"], 3, silent=[0])

    for result in results.values():
        assert re.search(rf"no decision in 3 s from rank 0 \(\S+, pid {result['pids'][0]}\): gone, or it hangs", result["error"])
        assert 2 * SCRIPT_TIMEOUT_S <= result["seconds"] < 4 * SCRIPT_TIMEOUT_S


def test_rank_0_can_say_at_any_time_which_rank_hangs_and_where(ticking):
    result = ticking(["hang"], 4, silent=[1, 2, 3])[0]

    assert re.fullmatch(
        r"rank 0 at ticking\.py:\d+ in hang; rank 1 at ticking\.py:\d+ in step; rank 2 at ticking\.py:\d+ in fetch; "
        rf"rank 3 \(\S+, pid {result['pids'][3]}\) gives no answer",
        result["where"],
    )
    assert 0.9 <= result["seconds"] < 3


def test_hundreds_of_rounds_with_wishes_from_all_ranks_are_agreed_on_by_all(ticking):
    results = ticking(["rounds"], 3)

    for result in results.values():
        assert result["acted"] == [result["acted"][0]] * 3
        assert len(result["acted"][0]) == 300
        assert {wish for _, wish in result["acted"][0]} == {"save", "stop"}
        assert result["is_ended"]
