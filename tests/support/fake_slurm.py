"""Slurm's commands for one job, 7, as shell scripts: for what a real Slurm cannot be made to say."""

from pathlib import Path

SCRIPT = "#!/bin/bash\nsrun python train.py\n"


class FakeSlurm:
    """Commands on a PATH of their own that answer as told, and write down what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / "script").write_text(SCRIPT)
        (folder / "queue").touch()
        self.scontrol()
        self.write("squeue", 'case "$*" in *--me*) cat {folder}/queue;; *) echo "gpu|lab|(null)|2:00:00|/home/me/work|my run";; esac')
        self.sbatch("cat > {folder}/submitted; echo 8")

    def write(self, name: str, body: str) -> None:
        script = self.bin / name
        script.write_text(
            f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "{name} $*" >> {self.folder}/calls\n' + body.replace("{folder}", str(self.folder))
        )
        script.chmod(0o700)

    def scontrol(
        self, requeue: str = "exit 0", state: str = "RUNNING", restarts: int = 0, preempted: str = "None", node: str = "", grace_s: int = 0
    ) -> None:
        """Have scontrol answer: to `requeue` with a command of the shell, to `show` with the job, or a node's line."""
        job = f"JobId=7 JobName=x\\n   Requeue=1 Restarts=%s BatchFlag=1\\n   JobState={state} Reason=None\\n"
        times = "   RunTime=00:00:04 TimeLimit=01:00:00\\n   StartTime=2999-01-01T10:00:00 EndTime=2999-01-01T11:00:00\\n"
        show = f"printf '{job}{times}   PreemptEligibleTime=None PreemptTime={preempted}\\n' $(cat {{folder}}/restarts)"
        (self.folder / "restarts").write_text(str(restarts))
        answers = (
            f"*'show partition'*) echo 'PartitionName=low GraceTime={grace_s}'",
            f"*'show node'*) echo '{node}'", "*'show config'*) echo 'SlurmdPort = 6818'", f"show*) {show}",
            f"requeue*) {requeue}", "write*) cat {folder}/script",
        )  # fmt: skip
        self.write("scontrol", f'case "$*" in {";; ".join(answers)};; esac')

    def sbatch(self, body: str) -> None:
        self.write("sbatch", body)

    def asked(self, name: str) -> list[str]:
        """Return what a command was asked, other than to show the job."""
        calls = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [call for call in calls if call.startswith(name) and not call.startswith("scontrol show")]
