"""Which rank am I? A pure function of environment variables.

Understood, first match wins: submitit's local executor, torchrun (or anything that sets RANK and WORLD_SIZE),
Slurm's srun, a single process. torchrun comes before Slurm because it is started inside Slurm jobs.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hpcckpt.errors import TaskEnvironmentError

Launcher = Literal["slurm", "local", "torchrun", "single"]

# Options that sbatch takes from its environment with precedence over the script, and that the requeue depends on.
_OVERRIDING_SBATCH = frozenset({"SBATCH_SIGNAL", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_ARRAY_INX"})

# Where the controller is, which cluster is meant, and who the user is: not of an allocation.
_KEPT_SLURM = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})


@dataclass(frozen=True)
class TaskEnvironment:
    """One rank's place in the job, as its launcher tells it."""

    launcher: Launcher
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
    # "123", or "123_4" for task 4 of array 123: what scontrol requeue takes.
    job_id: str | None = None
    # None where the launcher does not count (submitit's local executor): the ledger does.
    restart_count: int | None = None
    # Which start of the job this is, by every launcher that counts starts; a later one compares greater. Empty: not known.
    incarnation: tuple[int, ...] = ()
    # Set apart what runs beside: two srun in one job, two attempts of one job.
    step_id: str = "0"
    first_host: str = "127.0.0.1"

    @property
    def start(self) -> int | None:
        """Which start of Slurm's job this is, from 0; None where the launcher does not count."""
        return self.incarnation[0] if self.incarnation else None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "TaskEnvironment":
        """Return this process's place.

        Raises:
            TaskEnvironmentError: a variable is no number, is missing, or contradicts another.
        """
        if environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environ:
            task = _from_submitit_local(environ)
        elif "RANK" in environ and "WORLD_SIZE" in environ:
            task = _from_torchrun(environ)
        elif "SLURM_JOB_ID" in environ:
            task = _from_slurm(environ)
        else:
            task = cls("single")
        if not 0 <= task.rank < task.world_size:
            raise TaskEnvironmentError(
                f"rank {task.rank} is outside a world of {task.world_size} ({task.launcher}): "
                "the launcher's variables are damaged; start the job anew"
            )
        if not 0 <= task.local_rank < task.local_world_size:
            raise TaskEnvironmentError(
                f"local rank {task.local_rank} is outside the {task.local_world_size} tasks of node "
                f"{task.node_rank} ({task.launcher}): the launcher's variables are damaged; start the job anew"
            )
        return task

    def check_against(self, nodes: int | str, tasks_per_node: int) -> None:
        """Compare with what the configuration asked for; torchrun and single processes bring their own sizes.

        Args:
            nodes: a number, or a range as `node_range` reads it.
            tasks_per_node: on each of them.

        Raises:
            TaskEnvironmentError: Slurm started another number of tasks than was asked.
        """
        least, most = node_range(nodes)
        asked = range(least * tasks_per_node, most * tasks_per_node + 1, tasks_per_node)
        if self.launcher in ("slurm", "local") and self.world_size not in asked:
            text = f"{asked[0]}" if least == most else f"{asked[0]} to {asked[-1]} in steps of {tasks_per_node}"
            raise TaskEnvironmentError(
                f"{self.world_size} tasks were started, but the configuration asks for {text} "
                f"(slurm.nodes={nodes} x slurm.tasks_per_node={tasks_per_node}): "
                "was the script started by hand, or does slurm.extra change the number of tasks?"
            )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None:
        if default is None:
            raise TaskEnvironmentError(f"the environment variable {name} is not set; was the launcher's environment cut?")
        return default
    try:
        return int(value)
    except ValueError:
        raise TaskEnvironmentError(f"the environment variable {name}={value!r} is not a whole number") from None


def _from_submitit_local(environ: Mapping[str, str]) -> TaskEnvironment:
    world_size = _number(environ, "SUBMITIT_LOCAL_NTASKS")
    return TaskEnvironment(
        launcher="local",
        rank=_number(environ, "SUBMITIT_LOCAL_GLOBALID"),
        local_rank=_number(environ, "SUBMITIT_LOCAL_LOCALID"),
        world_size=world_size,
        local_world_size=world_size,
        job_id=environ["SUBMITIT_LOCAL_JOB_ID"],
    )


def _from_torchrun(environ: Mapping[str, str]) -> TaskEnvironment:
    world_size = _number(environ, "WORLD_SIZE")
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    rank = _number(environ, "RANK")
    return TaskEnvironment(
        launcher="torchrun",
        rank=rank,
        local_rank=_number(environ, "LOCAL_RANK", rank % max(local_world_size, 1)),
        node_rank=_number(environ, "GROUP_RANK", rank // max(local_world_size, 1)),
        world_size=world_size,
        local_world_size=local_world_size,
        num_nodes=_number(environ, "GROUP_WORLD_SIZE", max(world_size // max(local_world_size, 1), 1)),
        job_id=slurm_job_id(environ),
        restart_count=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        incarnation=(_number(environ, "SLURM_RESTART_COUNT", 0), _number(environ, "TORCHELASTIC_RESTART_COUNT", 0)),
        first_host=environ.get("MASTER_ADDR", "127.0.0.1"),
    )


def _from_slurm(environ: Mapping[str, str]) -> TaskEnvironment:
    num_nodes = _number(environ, "SLURM_JOB_NUM_NODES", 1)
    started_by_srun = "SLURM_STEP_ID" in environ
    asked = _number(environ, "SLURM_NTASKS", 1)
    if not started_by_srun and asked * num_nodes > 1:
        raise TaskEnvironmentError(
            f"job {environ['SLURM_JOB_ID']} has {num_nodes} nodes and {asked} tasks, but this process was not started "
            "by srun and would train alone: put `srun` before `python` in the batch script"
        )
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", asked)
    if world_size == 1 and num_nodes > 1:
        raise TaskEnvironmentError(
            f"job {environ['SLURM_JOB_ID']} holds {num_nodes} nodes, but srun started a single task: "
            "ask for --ntasks-per-node, or for one node"
        )
    node_rank = _number(environ, "SLURM_NODEID", 0)
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    # In a batch script without --ntasks the variable counts CPUs; there is one task then.
    tasks = expand_tasks_per_node(per_node) if started_by_srun else [1]
    if not 0 <= node_rank < len(tasks) or sum(tasks) != world_size:
        raise TaskEnvironmentError(
            f"SLURM_NODEID={node_rank}, SLURM_TASKS_PER_NODE={tasks} and {world_size} tasks contradict each other: "
            "variables of another allocation are in the environment; submit from a clean shell"
        )
    hosts = expand_nodelist(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1")
    if len(hosts) == len(tasks):
        hosts, tasks = _in_order_of_groups(environ, hosts, tasks)
    return TaskEnvironment(
        launcher="slurm",
        rank=_number(environ, "SLURM_PROCID", 0),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        node_rank=node_rank,
        world_size=world_size,
        local_world_size=tasks[node_rank],
        num_nodes=len(tasks),
        job_id=slurm_job_id(environ),
        restart_count=_number(environ, "SLURM_RESTART_COUNT", 0),
        incarnation=(_number(environ, "SLURM_RESTART_COUNT", 0),),
        step_id=environ.get("SLURM_STEP_ID", "0"),
        first_host=hosts[0],
    )


def _in_order_of_groups(environ: Mapping[str, str], hosts: list[str], tasks: list[int]) -> tuple[list[str], list[int]]:
    """Return hosts and their numbers of tasks in the order in which SLURM_NODEID counts them.

    In a heterogeneous job that is group by group, while the lists of the step are sorted by name: rank 0 need not be on
    their first host (measured on Slurm 22.05). A node is in one group only.
    """
    groups = range(_number(environ, "SLURM_HET_SIZE", 0))
    known = [host for group in groups for host in expand_nodelist(environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", ""))]
    place = {host: index for index, host in enumerate(known)}
    if not set(hosts) <= set(place):
        return hosts, tasks
    ordered = sorted(zip(hosts, tasks, strict=True), key=lambda node: place[node[0]])
    return [host for host, _ in ordered], [count for _, count in ordered]


def slurm_job_id(environ: Mapping[str, str]) -> str | None:
    """Return what `scontrol requeue` takes: an array's task as 123_4, of a heterogeneous job the leader; None outside of Slurm."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID")


def node_range(nodes: int | str) -> tuple[int, int]:
    """Return the least and the largest number of nodes: 2 is (2, 2), "2-4" is (2, 4).

    Raises:
        TaskEnvironmentError: `nodes` is neither, or the range is empty.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,6})(?:-([1-9][0-9]{0,6}))?", str(nodes))
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise TaskEnvironmentError(f"{nodes!r} is neither a number of nodes from 1 on nor a range of them, as in 2-4")
    return least, most


def expand_tasks_per_node(text: str) -> list[int]:
    """Return tasks per node of Slurm's run-length form: "2(x3),1" is [2, 2, 2, 1].

    Raises:
        TaskEnvironmentError: `text` has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise TaskEnvironmentError(f"SLURM_TASKS_PER_NODE={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the hosts of a Slurm node list in its order: "rack[1-2]n[08,3],m1" is rack1n08, rack1n3, rack2n08, rack2n3, m1.

    Raises:
        TaskEnvironmentError: a bracket holds something else than numbers and ranges of them.
    """
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", nodelist):
        # Text and brackets take turns.
        parts = re.split(r"\[([^\]]*)\]", name)
        choices = [_numbers(part, nodelist) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """Return the numbers of "3,08-11", as wide as they are written."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if match is None:
            raise TaskEnvironmentError(f"the node list {nodelist!r} is not of the form n[1-3,08],m1: variables of the launcher are damaged")
        first, last = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return numbers


def submission_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without what a surrounding allocation leaked.

    SLURM_CPU_BIND, SLURM_NTASKS and their like from an interactive allocation break a job submitted from within it.
    What says where the controller is and who the user is stays, and so do the SBATCH_* defaults of a user or site, save
    those that would override signal, requeue and log mode.
    """
    return {
        name: value
        for name, value in environ.items()
        if not (name.startswith(("SLURM_", "SRUN_", "PMI_", "PMIX_")) and name not in _KEPT_SLURM) and name not in _OVERRIDING_SBATCH
    }
