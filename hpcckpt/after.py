"""`python -m hpcckpt.after RUN_DIR EXIT_CODE`: what a batch script does when its `srun` has failed.

A rank that is killed, by the kernel for its memory, say, cannot ask for another attempt, and its fellows do not know why. The batch
script lives on: it notes what became of the attempt, and has it requeued where Slurm is taking the job away or
`requeue.on_failure` allows it. Where the run has decided for itself there is nothing to do.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcckpt.exits import exit_code

# What a shell reports for a process that signal 9 ended.
_KILLED = 137


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is to do behind a failed srun; returns the exit code of the job, which is srun's where no other attempt follows."""
    parser = argparse.ArgumentParser(prog="python -m hpcckpt.after", description="Behind a failed srun: requeue the run, or say why not.")
    parser.add_argument("run_dir", type=Path, help="the run directory")
    parser.add_argument("exit_code", type=int, help="of srun")
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    return exit_code(lambda: _after(options.run_dir, options.exit_code), "the end of the job", "submit again")


def _after(run_dir: Path, status: int) -> int:
    from hpcckpt import config as configuration
    from hpcckpt import policy, scheduler
    from hpcckpt.environment import TaskEnvironment, slurm_job_id
    from hpcckpt.layout import RunLayout
    from hpcckpt.requeue import Requeue
    from hpcckpt.store.checkpoints import CheckpointStore
    from hpcckpt.store.ledger import Ledger
    from hpcckpt.task import adopt

    layout = RunLayout(run_dir.absolute())
    config = configuration.of_script(layout.config, layout.root.name)
    job_id, start = slurm_job_id(os.environ), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    ledger = Ledger(layout.events)
    events = ledger.events()
    attempt, word = policy.last_attempt(events)
    began = [] if attempt is None else attempt.get("incarnation", [])[:1]
    is_same_job = attempt is not None and attempt.get("job_id") == job_id
    # Else its ranks did not get as far as that.
    is_ours = is_same_job and began == [start]
    if (is_ours and word not in (None, "failed")) or (is_same_job and began > [start]):
        return status
    if attempt is not None and not is_same_job and word is None:
        print(f"hpcckpt: {layout.root}: job {attempt.get('job_id')} is at work there, so job {job_id} is not requeued", flush=True)
        return status
    # What is said here must not be taken for a word of an attempt that is not ours.
    ledger.generation = attempt.get("generation") if attempt is not None and is_ours else 0
    fate: policy.Fate = "killed" if status == _KILLED or (is_ours and word is None) else "failure"
    lost_nodes = scheduler.unreachable_nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    if lost_nodes:
        fate = "node_failure"  # and the ranks that are left have failed of it
    elif fate == "killed" and job_id is not None and scheduler.was_out_of_memory(job_id):
        fate = "out_of_memory"
    task = TaskEnvironment("slurm", job_id=job_id, restart_count=start, incarnation=(start,))
    store = CheckpointStore.configured(layout, config.checkpoint)
    requeue = Requeue(layout, ledger, task, config.requeue, store, lambda successor: adopt(layout, str(job_id), successor))
    if is_ours and fate != "failure":
        ledger.append("lost", fate=fate, restarted=False, exit_code=status, nodes=lost_nodes)
    cause, decision = requeue.decide_failed(fate, policy.stopping(events) if is_ours else None)
    # What counts as a failure in the ledger: `requeue.on_failure`.
    noted = "failure" if cause in ("killed", "out_of_memory") else cause
    code = requeue.go_on(noted, decision, f"the attempt ended with exit code {status} ({cause.replace('_', ' ')})")
    return 0 if code == 0 else status


if __name__ == "__main__":
    raise SystemExit(main())
