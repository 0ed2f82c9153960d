"""How ranks find each other when ports are taken and strangers answer. Ranks are threads here; the sockets are real."""

import contextlib
import socket
import threading

import pytest

from hpcckpt.distributed import rendezvous
from hpcckpt.distributed.rendezvous import candidate_ports, job_token, open_store
from hpcckpt.environment import TaskEnvironment
from hpcckpt.errors import RendezvousError


def place(rank: int, world_size: int = 3, job_id: str = "77", restart_count: int = 0) -> TaskEnvironment:
    return TaskEnvironment(
        "slurm", rank, rank, world_size=world_size, local_world_size=world_size, job_id=job_id, restart_count=restart_count
    )


def meet(places: list[TaskEnvironment]) -> list[list[str]]:
    """Have ranks meet, each say its job and rank, and return whom each of them sees."""
    seen: list[list[str] | BaseException] = [[] for _ in places]
    done = threading.Barrier(len(places))

    def one(index: int, task: TaskEnvironment) -> None:
        try:
            with open_store(task, timeout_s=30) as store:
                store.set(f"here/{task.rank}", f"{task.job_id}:{task.rank}")
                seen[index] = [store.get(f"here/{rank}").decode() for rank in range(task.world_size)]
                done.wait(60)
        except BaseException as error:  # shown by the caller's assertion
            seen[index] = error
            done.abort()

    threads = [threading.Thread(target=one, args=(index, task)) for index, task in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return seen  # type: ignore[return-value]


@contextlib.contextmanager
def silent_listener(port: int):
    """Something that accepts connections and says nothing, as a stranger's server may."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", port))
        listener.listen(64)
        yield


@contextlib.contextmanager
def greeting_stranger(port: int, line: bytes):
    """Something that says a line to whoever connects."""
    with socket.create_server(("", port)) as listener:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        connection.sendall(line)

        thread = threading.Thread(target=greet)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_all_ranks_meet_on_the_first_candidate():
    assert meet([place(2), place(1), place(0)]) == [["77:0", "77:1", "77:2"]] * 3


def test_a_port_in_use_by_a_silent_stranger_is_passed_over(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_TIMEOUT_S", 0.3)
    first, second = candidate_ports(job_token(place(0)))[:2]
    with silent_listener(first), silent_listener(second):
        assert meet([place(0), place(1), place(2)]) == [["77:0", "77:1", "77:2"]] * 3


def test_another_jobs_greeter_on_the_first_candidate_is_told_apart_by_its_token():
    with greeting_stranger(candidate_ports(job_token(place(0)))[0], b"hpcckpt/78/0/0 22\n"):
        assert meet([place(1), place(0), place(2)]) == [["77:0", "77:1", "77:2"]] * 3


@pytest.mark.parametrize("line", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\xff" * 4096, b"", b"hpcckpt/77/0/0 not-a-port\n", b"hpcckpt/77/0/0\n"])
def test_any_other_server_on_the_first_candidate_is_passed_over(line):
    with greeting_stranger(candidate_ports(job_token(place(0)))[0], line):
        assert meet([place(1, 2), place(0, 2)]) == [["77:0", "77:1"]] * 2


def test_two_jobs_that_derive_the_same_ports_do_not_meet(monkeypatch):
    monkeypatch.setattr(rendezvous, "candidate_ports", lambda _token: candidate_ports("the same"))
    both = meet([place(0, 2, "1"), place(0, 2, "2"), place(1, 2, "2"), place(1, 2, "1")])
    assert both == [["1:0", "1:1"], ["2:0", "2:1"], ["2:0", "2:1"], ["1:0", "1:1"]]


def test_a_restarted_job_does_not_meet_its_former_self():
    assert candidate_ports(job_token(place(0))) != candidate_ports(job_token(place(0, restart_count=1)))
    assert job_token(place(0)) != job_token(place(0, restart_count=1))


def test_candidates_lie_below_the_ports_of_outgoing_connections():
    assert all(1024 < port < 32768 for job in range(200) for port in candidate_ports(str(job)))


def test_a_rank_0_that_never_comes_is_reported_with_host_and_ports(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_TIMEOUT_S", 0.3)
    with (
        pytest.raises(RendezvousError, match=r"no answer from rank 0 on host 127\.0\.0\.1, ports \[\d+.* did rank 0 fail"),
        open_store(place(1), timeout_s=0.5),
    ):
        pass


def test_rank_0_says_so_when_every_candidate_is_in_use():
    with contextlib.ExitStack() as stack:
        for port in candidate_ports(job_token(place(0))):
            stack.enter_context(silent_listener(port))
        stack.enter_context(pytest.raises(RendezvousError, match="could not listen on any of the ports"))
        stack.enter_context(open_store(place(0), timeout_s=1))
