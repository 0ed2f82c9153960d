"""The command as a user types it: exit codes, one line on stderr, and nothing left behind by what was refused."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.store.checkpoints import CheckpointStore
from support.submitting import Submit, contents, make_folder, refusal, submit_from, write_program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


@pytest.fixture
def submit(folder: Path) -> Submit:
    return submit_from(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], "give one configuration as conf=FILE", id="no conf"),
        pytest.param(["args.x=1"], "give one configuration as conf=FILE", id="settings but no conf"),
        pytest.param(["conf="], "give one configuration as conf=FILE", id="empty conf"),
        pytest.param(["conf=exp", "conf=exp"], "give one configuration as conf=FILE", id="conf twice"),
        pytest.param(["conf=exq"], "conf=exq: no such file, and conf/ holds exp; give a path", id="unknown conf"),
        pytest.param(["conf=" + "x" * 300], "no such file, and conf/ holds exp", id="conf too long for a file"),
        pytest.param(
            ["conf=exp", "slurm.node=2"], "command line: slurm.node=2: unknown key slurm.node; did you mean slurm.nodes?", id="key"
        ),
        pytest.param(["conf=exp", "slurm.nodes=x"], "slurm.nodes: 'x' is neither a number of nodes from 1 on nor", id="wrong type"),
        pytest.param(["conf=exp", "nonsense"], "command line: 'nonsense' is not of the form key=value", id="no ="),
        pytest.param(["conf=exp", "na\nm\re=1"], "command line: na\\nm\\re=1: unknown key na\\nm\\re", id="newlines"),
        pytest.param(
            ["conf=exp", "entrypoint=tranning:main"], "entrypoint: tranning:main: there is no module tranning in ", id="no module"
        ),
        pytest.param(["conf=exp", "entrypoint=training:mian"], "training.py has no function mian", id="no function"),
        pytest.param(["conf=exp", "entrypoint=training:number"], "number is a int, which cannot be called", id="not callable"),
        pytest.param(["conf=exp", "slurm.nodes=2", "cluster=local"], "conf/exp.yaml: slurm.nodes: 2 nodes need Slurm", id="nodes, local"),
        pytest.param(["conf=exp", "resume.epoch=5"], "resume.epoch=5: ", id="no such epoch"),
        pytest.param(["conf=exp", "resume.from=best"], "resume.from=best: ", id="no best one"),
        pytest.param(["conf=exp", "resume.from=gone.pt"], "resume.from=gone.pt: there is no such file", id="no such checkpoint"),
        pytest.param(["conf=exp", "slurm.python='it"], "slurm.python", id="quotes left open"),
        pytest.param(["conf=exp", 'slurm.python="a \'b"'], 'slurm.python: "a \'b" is not a command (No closing quotation)', id="quotes"),
        pytest.param(["conf=exp", "slurm.python=''"], "slurm.python: is empty", id="no command"),
        pytest.param(["conf=exp", "run_dir=" + "x" * 300], "File name too long", id="run_dir too long"),
    ],
)
def test_a_slip_is_one_line_and_leaves_nothing_behind(submit: Submit, folder: Path, arguments: list[str], said: str) -> None:
    before = contents(folder).keys()
    assert said in refusal(submit(*arguments), 2)
    assert contents(folder).keys() <= before | {"__pycache__", f"__pycache__/training.{sys.implementation.cache_tag}.pyc"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("raise ValueError('no data at /x')", "ValueError: no data at /x", id="raises"),
        pytest.param("import nosuchlibrary", "ModuleNotFoundError: No module named 'nosuchlibrary'", id="imports what is not there"),
        pytest.param("def main(run) pass", "SyntaxError: ", id="does not parse"),
        pytest.param("import sys; sys.exit('usage: training')", "usage: training", id="ends with a message"),
        pytest.param("import sys; sys.exit(0)", "python ended with 0 while importing it", id="ends as if all were well"),
        pytest.param("import os; os.kill(os.getpid(), 9)", "python ended with -9 while importing it", id="is killed"),
    ],
)
def test_a_training_module_that_cannot_be_imported_says_so_itself(submit: Submit, folder: Path, text: str, said: str) -> None:
    (folder / "training.py").write_text(f"{text}\ndef main(run): pass\n")
    message = refusal(submit("conf=exp"), 2)
    assert message.startswith(f"conf/exp.yaml: entrypoint: {said}")
    assert message.endswith(f"(tried from {folder}); mend entrypoint or the module")
    assert not (folder / "runs").exists()


def test_a_module_that_never_finishes_importing_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcckpt import config, launch
    from hpcckpt.errors import ConfigError

    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "IMPORT_TIMEOUT_S", 0.5)
    (folder / "training.py").write_text("import time\ntime.sleep(100)\n")
    with pytest.raises(ConfigError, match=r"x.yaml: entrypoint: training:main took more than 0.5 s to import"):
        launch.check_entrypoint(config.resolve(config.parse("entrypoint: training:main")), "x.yaml")


def test_a_module_is_found_beside_the_user_also_where_python_is_told_not_to(submit: Submit) -> None:
    assert submit("conf=exp", PYTHONSAFEPATH="1").returncode == 0


@pytest.mark.parametrize("run_dir", ["file", "file/run", "file/a/b/run"])
def test_a_file_in_the_way_of_the_run_directory_is_named(submit: Submit, folder: Path, run_dir: str) -> None:
    (folder / "file").write_text("mine")
    message = refusal(submit("conf=exp", f"run_dir={run_dir}"), 2)
    assert message == f"{folder / run_dir}: {folder / 'file'} is no directory; choose another run_dir"
    assert (folder / "file").read_text() == "mine"


def test_a_dangling_link_in_the_way_of_the_run_directory_is_named(submit: Submit, folder: Path) -> None:
    (folder / "link").symlink_to("nowhere")
    assert f"{folder / 'link'} is no directory" in refusal(submit("conf=exp", "run_dir=link/run"), 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_run_directory_of_somebody_else_is_refused(submit: Submit, folder: Path) -> None:
    (folder / "theirs").mkdir()
    os.chown(folder / "theirs", 12345, 12345)
    assert refusal(submit("conf=exp", "run_dir=theirs"), 2) == f"{folder}/theirs: belongs to user 12345, not to you; choose another run_dir"
    assert not list((folder / "theirs").iterdir())


@pytest.mark.parametrize("missing", ["sbatch", "srun"])
@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["submitted", "dry run"])
def test_slurm_without_its_commands_is_refused(submit: Submit, folder: Path, missing: str, option: list[str]) -> None:
    (folder / "bin" / missing).unlink()
    message = refusal(submit("conf=exp", *option), 2)
    assert message.startswith("conf/exp.yaml: cluster: slurm is asked for, but sbatch and srun are not on PATH; submit from a login node")
    assert not (folder / "runs").exists()


def test_auto_is_this_machine_where_there_is_no_slurm(submit: Submit, folder: Path) -> None:
    assert "#SBATCH" in submit("conf=exp", "cluster=auto", "--dry-run").stdout
    (folder / "bin" / "sbatch").unlink()
    assert "#SBATCH" not in submit("conf=exp", "cluster=auto", "--dry-run").stdout


def test_the_epochs_there_are_are_listed_to_who_asks_for_another(submit: Submit, folder: Path) -> None:
    (folder / "runs" / "exp").mkdir(parents=True, mode=0o700)
    store = CheckpointStore(RunLayout(folder / "runs" / "exp"), Retention(keep_last=9))
    store.claim("1")
    for epoch in (0, 1, 3):
        store.commit(epoch, 10 * epoch + 10, epoch_finished=True, write=lambda file: file.write(b"x"), manifest={"metrics": {}})
    before = contents(folder / "runs")
    assert refusal(submit("conf=exp", "resume.epoch=2"), 2).endswith("there are the epochs 0, 1, 3")
    assert refusal(submit("conf=exp", "resume.step=30"), 2).endswith("there are the steps 10, 20, 40")
    assert contents(folder / "runs") == before
    assert submit("conf=exp", "resume.epoch=1").returncode == 0


def test_what_sbatch_refuses_as_a_test_is_refused_in_its_words_with_nothing_written(submit: Submit, folder: Path) -> None:
    write_program(folder, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert refusal(submit("conf=exp"), 3) == "sbatch refused the job: sbatch: error: invalid partition specified: x"
    assert not (folder / "runs").exists()


def test_an_sbatch_that_refuses_after_its_test_leaves_the_run_as_it_was(submit: Submit, folder: Path) -> None:
    assert submit("conf=exp", "args.lr=1").returncode == 0
    root = folder / "runs" / "exp"
    before = {name: data for name, data in contents(root).items() if not name.startswith("logs/")}
    write_program(folder, "sbatch", "case $1 in --test-only) ;; *) echo 'sbatch: error: QOSMaxSubmitJobLimit' >&2; exit 1;; esac")
    message = refusal(submit("conf=exp", "args.lr=2", "resume.from=none"), 3)
    assert message == "sbatch refused the job: sbatch: error: QOSMaxSubmitJobLimit"
    assert {name: data for name, data in contents(root).items() if not name.startswith("logs/")} == before
    assert b"lr: 1" in before["config.yaml"]


def test_a_first_submission_that_is_refused_leaves_no_configuration(submit: Submit, folder: Path) -> None:
    write_program(folder, "sbatch", "case $1 in --test-only) ;; *) echo 'sbatch: error: no' >&2; exit 1;; esac")
    refusal(submit("conf=exp"), 3)
    assert not [name for name in contents(folder / "runs" / "exp") if name in ("config.yaml", "resume.json", "events.jsonl")]


def test_a_run_directory_in_which_a_job_still_waits_is_refused(submit: Submit, folder: Path) -> None:
    assert submit("conf=exp").returncode == 0
    before = contents(folder / "runs")
    write_program(folder, "scontrol", "printf 'JobId=7 JobName=x\\n   JobState=PENDING Reason=None\\n'")
    message = refusal(submit("conf=exp"), 2)
    assert "job 7 still waits or runs in this run directory; wait, end it with `scancel 7`, or set another run_dir" in message
    assert contents(folder / "runs") == before


def test_a_controller_that_does_not_answer_is_no_bad_input(submit: Submit, folder: Path) -> None:
    assert submit("conf=exp").returncode == 0
    write_program(folder, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact slurm controller; is Slurm's controller up?" in refusal(submit("conf=exp"), 3)


def test_an_accepted_job_is_one_line_with_its_id_and_a_private_directory(submit: Submit, folder: Path) -> None:
    done = submit("conf=exp", "args.lr=0.5", "resume.from=none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")
    root = folder / "runs" / "exp"
    assert [oct(path.stat().st_mode & 0o777) for path in (root, root / "logs", root / "config.yaml")] == ["0o700", "0o700", "0o600"]
    stored = yaml.safe_load((root / "config.yaml").read_text())
    assert (stored["args"], stored["run_dir"], stored["resume"]["from"]) == ({"lr": 0.5}, "runs/${name}", "latest")
    assert '"event": "submitted", "job_id": "7"' in (root / "events.jsonl").read_text()


def test_a_stop_file_that_is_left_from_before_does_not_stop_the_new_run(submit: Submit, folder: Path) -> None:
    root = folder / "runs" / "exp"
    root.mkdir(parents=True)
    (root / "stop").touch()
    assert submit("conf=exp").returncode == 0
    assert not (root / "stop").exists()


def test_the_printed_configuration_is_one_that_can_be_submitted(submit: Submit, folder: Path) -> None:
    printed = submit("conf=exp", "args.lr=0.5", "slurm.setup=[module load x]", "--print-config")
    (folder / "again.yaml").write_text(printed.stdout)
    assert submit("conf=again.yaml", "--print-config").stdout == printed.stdout
    assert yaml.safe_load(printed.stdout)["args"] == {"lr": 0.5}
    assert not (folder / "runs").exists()
