"""How much memory may still be taken, from files as the kernel writes them."""

import pytest

from hpcckpt.store.memory import available_bytes

GIB = 1024**3
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"


def machine(root, files):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_of_a_machine_without_limits_it_is_what_the_kernel_says(tmp_path):
    assert available_bytes(machine(tmp_path, {"proc/self/cgroup": "0::/\n"})) == 8 * GIB


def test_nothing_known_is_not_taken_for_nothing_left(tmp_path):
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("mount", ["sys/fs/cgroup", "sys/fs/cgroup/unified"])
def test_the_least_of_all_limits_above_counts_and_cache_is_given_back(tmp_path, mount):
    files = {
        "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
        f"{mount}/slurm/job_7/step_0/memory.max": "max\n",
        f"{mount}/slurm/job_7/step_0/memory.current": f"{2 * GIB}\n",
        f"{mount}/slurm/job_7/memory.max": f"{4 * GIB}\n",
        f"{mount}/slurm/job_7/memory.current": f"{3 * GIB}\n",
        f"{mount}/slurm/job_7/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\nactive_file 0\nshmem 5\n",
        f"{mount}/slurm/memory.max": f"{7 * GIB}\n",
        f"{mount}/slurm/memory.current": f"{3 * GIB}\n",
    }
    assert available_bytes(machine(tmp_path, files)) == GIB + GIB // 2


def test_cgroups_of_the_first_version(tmp_path):
    base = "sys/fs/cgroup/memory/slurm/uid_0/job_7"
    files = {
        "proc/self/cgroup": "5:cpuset:/\n4:hugetlb,memory:/slurm/uid_0/job_7\n0::/\n",
        f"{base}/memory.limit_in_bytes": f"{GIB}\n",
        f"{base}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{base}/memory.stat": "cache 100\ntotal_inactive_file 0\ntotal_active_file 0\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 0, "more is in use than may be: nothing is left"


def test_in_a_container_the_mount_itself_is_looked_at(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/host/path/that/is/not/here\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 2 * GIB


@pytest.mark.parametrize("text", ["", "nonsense", "4:memory\n", "::\n", "0::../../..\n", "\xff\n"])
def test_what_cannot_be_read_limits_nothing(tmp_path, text):
    assert available_bytes(machine(tmp_path, {"proc/self/cgroup": text})) == 8 * GIB


def test_here_it_is_something():
    found = available_bytes()
    assert found is not None
    assert 0 < found < 2**50
