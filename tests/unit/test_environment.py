"""Which rank am I: tables of what launchers set, and every contradiction is named."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.environment import TaskEnvironment, expand_nodelist, expand_tasks_per_node, node_range, submission_environ
from hpcckpt.errors import TaskEnvironmentError

# Seven tasks on four nodes, started by srun: this is the second of the third node.
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu[07-09],login1",
}
IN_SRUN = TaskEnvironment(
    "slurm", rank=5, local_rank=1, node_rank=2, world_size=7, local_world_size=2, num_nodes=4, job_id="123", restart_count=0,
    incarnation=(0,), first_host="gpu07",
)  # fmt: skip
# As Slurm 22.05 tells the last task: its list of nodes is sorted by name, its node ids count by group.
HETEROGENEOUS = {
    "SLURM_JOB_ID": "12", "SLURM_JOB_ID_HET_GROUP_0": "12", "SLURM_JOB_ID_HET_GROUP_1": "13", "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST": "n[2-4]", "SLURM_JOB_NODELIST_HET_GROUP_0": "n4", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[2-3]",
    "SLURM_JOB_NUM_NODES": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[2-4]", "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "1",
}  # fmt: skip
IN_HETEROGENEOUS = TaskEnvironment(
    "slurm", rank=4, local_rank=1, node_rank=2, world_size=5, local_world_size=2, num_nodes=3, job_id="12", restart_count=0,
    incarnation=(0,), first_host="n4",
)  # fmt: skip
BATCH = {"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "77",
    "SUBMITIT_LOCAL_NTASKS": "3",
    "SUBMITIT_LOCAL_GLOBALID": "2",
    "SUBMITIT_LOCAL_LOCALID": "2",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "head"}
IN_TORCHRUN = TaskEnvironment(
    "torchrun", rank=5, local_rank=1, node_rank=1, world_size=8, local_world_size=4, num_nodes=2, restart_count=0,
    incarnation=(0, 0), first_host="head",
)  # fmt: skip


def changed(task: TaskEnvironment, **values: object) -> TaskEnvironment:
    return dataclasses.replace(task, **values)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, TaskEnvironment("single"), id="nothing set"),
        pytest.param({"RANK": "3", "PATH": "/bin"}, TaskEnvironment("single"), id="RANK without WORLD_SIZE"),
        pytest.param(SRUN, IN_SRUN, id="srun, uneven nodes"),
        pytest.param(SRUN | {"SLURM_RESTART_COUNT": "2"}, changed(IN_SRUN, restart_count=2, incarnation=(2,)), id="requeued twice"),
        pytest.param(SRUN | {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}, changed(IN_SRUN, job_id="120_4"), id="array task"),
        pytest.param(SRUN | {"SLURM_STEP_ID": "3"}, changed(IN_SRUN, step_id="3"), id="a later step"),
        pytest.param(
            SRUN
            | {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "4(x4)"}
            | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[12-15]"},
            changed(IN_SRUN, first_host="gpu12"),
            id="a step smaller than its job",
        ),
        pytest.param(HETEROGENEOUS, IN_HETEROGENEOUS, id="both groups of a heterogeneous job"),
        pytest.param(
            HETEROGENEOUS
            | {"SLURM_STEP_NODELIST": "n[2-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
            | {"SLURM_NODEID": "1", "SLURM_LOCALID": "0"},
            changed(IN_HETEROGENEOUS, rank=2, local_rank=0, node_rank=1, local_world_size=2, world_size=4, num_nodes=2, first_host="n2"),
            id="one group of a heterogeneous job",
        ),
        pytest.param(
            BATCH, TaskEnvironment("slurm", job_id="9", restart_count=0, incarnation=(0,), first_host="n1"), id="batch script of one task"
        ),
        pytest.param(
            {"SLURM_JOB_ID": "9", "SLURM_TASKS_PER_NODE": "16"},
            TaskEnvironment("slurm", job_id="9", restart_count=0, incarnation=(0,)),
            id="batch script without --ntasks, where the variable counts CPUs",
        ),
        pytest.param(
            LOCAL, TaskEnvironment("local", rank=2, local_rank=2, world_size=3, local_world_size=3, job_id="77"), id="submitit local"
        ),
        pytest.param(TORCHRUN, IN_TORCHRUN, id="torchrun"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2"}, TaskEnvironment("torchrun", 1, 1, 0, 2, 2, 1, None, 0, (0, 0)), id="by hand, two numbers"
        ),
        pytest.param(
            TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"},
            changed(IN_TORCHRUN, restart_count=1, incarnation=(0, 1)),
            id="torchrun restarted",
        ),
        pytest.param(
            SRUN | TORCHRUN | {"SLURM_RESTART_COUNT": "1"},
            changed(IN_TORCHRUN, job_id="123", incarnation=(1, 0)),
            id="torchrun in a requeued job",
        ),
        pytest.param(SRUN | TORCHRUN, changed(IN_TORCHRUN, job_id="123"), id="torchrun inside of Slurm"),
        pytest.param(
            SRUN | LOCAL,
            TaskEnvironment("local", rank=2, local_rank=2, world_size=3, local_world_size=3, job_id="77"),
            id="submitit local inside of an allocation",
        ),
        pytest.param(SRUN | {"SUBMITIT_EXECUTOR": "slurm"}, IN_SRUN, id="submitit on Slurm is Slurm"),
    ],
)
def test_a_launchers_variables_give_this_ranks_place(environ: dict[str, str], expected: TaskEnvironment) -> None:
    assert TaskEnvironment.from_environ(environ) == expected


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        pytest.param(BATCH | {"SLURM_NTASKS": "2"}, "put `srun` before `python`", id="two tasks, no srun"),
        pytest.param(BATCH | {"SLURM_JOB_NUM_NODES": "2"}, "was not started by srun", id="two nodes, no srun"),
        pytest.param(
            BATCH | {"SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "4"}, "holds 4 nodes, but srun started a single task", id="one task"
        ),
        pytest.param(SRUN | {"SLURM_PROCID": "7"}, "rank 7 is outside a world of 7", id="rank too high"),
        pytest.param(SRUN | {"SLURM_PROCID": "-1"}, "rank -1 is outside", id="rank negative"),
        pytest.param(SRUN | {"SLURM_LOCALID": "2"}, "local rank 2 is outside the 2 tasks of node 2", id="local rank too high"),
        pytest.param(SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4", id="node too high"),
        pytest.param(SRUN | {"SLURM_NODEID": "-1"}, "SLURM_NODEID=-1", id="node negative"),
        pytest.param(SRUN | {"SLURM_NTASKS": "8"}, "8 tasks contradict each other", id="sum of tasks is another"),
        pytest.param(SRUN | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many' is not a whole number", id="no number"),
        pytest.param(SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID='' is not a whole number", id="empty"),
        pytest.param(SRUN | {"SLURM_PROCID": "1.0"}, "SLURM_PROCID='1.0'", id="a fraction"),
        pytest.param(SRUN | {"SLURM_TASKS_PER_NODE": "2x3"}, "SLURM_TASKS_PER_NODE='2x3' is not of the form", id="another form"),
        pytest.param(SRUN | {"SLURM_TASKS_PER_NODE": "2(x0)"}, "contradict each other", id="no node at all"),
        pytest.param(
            {key: value for key, value in LOCAL.items() if key != "SUBMITIT_LOCAL_NTASKS"}, "SUBMITIT_LOCAL_NTASKS is not set", id="missing"
        ),
        pytest.param(LOCAL | {"SUBMITIT_LOCAL_GLOBALID": "3"}, "rank 3 is outside a world of 3 (local)", id="local rank of another job"),
        pytest.param(TORCHRUN | {"RANK": "8"}, "rank 8 is outside a world of 8 (torchrun)", id="torchrun rank too high"),
        pytest.param(TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 is outside the 4 tasks", id="torchrun local rank too high"),
        pytest.param(TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "rank 0 is outside a world of 0", id="empty world"),
    ],
)
def test_a_contradiction_is_named(environ: dict[str, str], said: str) -> None:
    with pytest.raises(TaskEnvironmentError) as caught:
        TaskEnvironment.from_environ(environ)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_rank_of_an_uneven_job_has_a_place_of_its_own() -> None:
    tasks = [2, 2, 2, 1]
    places = [(node, local) for node, count in enumerate(tasks) for local in range(count)]
    for rank, (node, local) in enumerate(places):
        task = TaskEnvironment.from_environ(SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)})
        assert (task.rank, task.node_rank, task.local_rank, task.local_world_size) == (rank, node, local, tasks[node])


@pytest.mark.parametrize(("launcher", "is_checked"), [("slurm", True), ("local", True), ("torchrun", False), ("single", False)])
def test_only_launchers_that_were_told_a_size_are_held_to_it(launcher: str, is_checked: bool) -> None:
    task = TaskEnvironment(launcher, world_size=4)
    task.check_against(2, 2)
    if is_checked:
        with pytest.raises(TaskEnvironmentError, match=r"4 tasks were started, but the configuration asks for 6 \(slurm.nodes=2 x"):
            task.check_against(2, 3)
    else:
        task.check_against(2, 3)


@pytest.mark.parametrize(
    ("nodes", "tasks", "is_right"),
    [
        ("2-4", 4, True),
        ("2-4", 6, True),
        ("2-4", 8, True),
        ("2-4", 2, False),
        ("2-4", 10, False),
        ("2-4", 5, False),
        ("3-3", 6, True),
        ("3", 4, False),
    ],
)
def test_any_number_of_nodes_of_a_range_is_what_was_asked_for(nodes: str, tasks: int, is_right: bool) -> None:
    task = TaskEnvironment("slurm", world_size=tasks)
    if is_right:
        task.check_against(nodes, 2)
    else:
        text = r"4 to 8 in steps of 2 \(slurm.nodes=2-4 x slurm.tasks" if nodes == "2-4" else r"6 \(slurm.nodes=3 x slurm.tasks"
        with pytest.raises(TaskEnvironmentError, match=f"{tasks} tasks were started, but the configuration asks for {text}"):
            task.check_against(nodes, 2)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_range_of_nodes_is_read_as_sbatch_reads_it(least: int, more: int) -> None:
    assert node_range(least) == node_range(str(least)) == (least, least)
    assert node_range(f"{least}-{least + more}") == (least, least + more)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200))
def test_run_lengths_are_expanded(counts: list[int]) -> None:
    runs = [(value, len(list(group))) for value, group in itertools.groupby(counts)]
    text = ",".join(str(value) if length == 1 else f"{value}(x{length})" for value, length in runs)
    assert expand_tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "a", "2(3)", "2(x)", "2(x3", "2(x3),", "-1", "2;3", "2(x3)1"])
def test_another_form_of_run_lengths_is_refused(text: str) -> None:
    with pytest.raises(TaskEnvironmentError, match="is not of the form"):
        expand_tasks_per_node(text)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("node[3-5]", "node3 node4 node5"),
        ("node[008-011]", "node008 node009 node010 node011"),
        ("node[9-10]", "node9 node10"),
        ("node[5,1-3]", "node5 node1 node2 node3"),
        ("node[1,3],login1", "node1 node3 login1"),
        ("rack[1-2]n[03-04],login1", "rack1n03 rack1n04 rack2n03 rack2n04 login1"),
        ("rack[2,4]n[1,3],x[1-2]", "rack2n1 rack2n3 rack4n1 rack4n3 x1 x2"),
        ("n[1-2].cluster.site", "n1.cluster.site n2.cluster.site"),
        ("n[08-09]-ib,m1", "n08-ib n09-ib m1"),
        ("a-b-c[10-12]", "a-b-c10 a-b-c11 a-b-c12"),
    ],
)
def test_the_hosts_of_a_node_list(nodelist: str, hosts: str) -> None:
    assert expand_nodelist(nodelist) == hosts.split()


@pytest.mark.parametrize("nodelist", ["n[]", "n[a]", "n[1-]", "n[1,]", "n[-1]", "n[1-2-3]", "n[1" + "0" * 12 + "]"])
def test_another_form_of_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(TaskEnvironmentError, match="is not of the form"):
        expand_nodelist(nodelist)


def test_a_submission_keeps_what_the_user_and_the_site_set() -> None:
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm/other.conf", "SBATCH_PARTITION": "gpu", "SBATCH_ACCOUNT": "me", "HOME": "/root"}
    leaked = {
        "SLURM_NTASKS": "4", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "2",
        "SRUN_DEBUG": "3", "PMI_RANK": "0", "PMIX_RANK": "0", "SBATCH_SIGNAL": "B:TERM@1", "SBATCH_NO_REQUEUE": "1", "SBATCH_REQUEUE": "1",
        "SBATCH_OPEN_MODE": "truncate",
        "SBATCH_ARRAY_INX": "0-3",
    }  # fmt: skip
    before = kept | leaked
    assert submission_environ(before) == kept
    assert before == kept | leaked
