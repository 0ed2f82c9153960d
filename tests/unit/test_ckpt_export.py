"""`hpcckpt ckpt export`: weights out of a run, or out of any file; a mistake is one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpcckpt.cli.main import main
from hpcckpt.layout import RunLayout
from support.checkpoints import claimed
from support.hostile import as_zip, pickles

TO = "x.safetensors"


def content(epoch):
    weight = torch.full((2, 3), float(epoch))
    optimizer = {"state": {}, "param_groups": []}
    return {
        "format_version": 1,
        "epoch": epoch,
        "step": (epoch + 1) * 10,
        "optimizer_state_dict": optimizer,
        "model_state_dict": {"w": weight, "tied": weight},
        "teacher_state_dict": {"w": weight + 100},
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with epochs 0 to 2, of which 1 is the best; the working directory is another one."""
    layout = RunLayout(tmp_path / "run")
    store = claimed(layout)
    for epoch, loss in enumerate((3.0, 1.0, 2.0)):
        store.commit(
            epoch,
            (epoch + 1) * 10,
            epoch_finished=True,
            write=lambda file, epoch=epoch: torch.save(content(epoch), file),
            manifest={"metrics": {"loss": loss}},
        )
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return layout


def export(*arguments):
    return main(["ckpt", "export", *map(str, arguments)])


def failed(capsys, *arguments):
    assert export(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("hpcckpt: ")
    return said.err


@pytest.mark.parametrize(
    ("which", "epoch"),
    [([], 2), (["--which", "latest"], 2), (["--which", "best"], 1), (["--which", "epoch=1"], 1), (["--which", "step=30"], 2)],
)
def test_the_checkpoint_that_is_asked_for_is_exported(run, which, epoch, capsys):
    assert export(run.root, "--to", TO, *which) == 0
    loaded = load_file(TO)
    assert torch.equal(loaded["w"], torch.full((2, 3), float(epoch)))
    said = capsys.readouterr().out
    assert said.startswith(f"{TO}: 2 tensors, ")
    assert f"epoch {epoch}, step {(epoch + 1) * 10}, from {run.checkpoints}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_plain_state_dict_is_what_load_state_dict_takes(run, suffix):
    assert export(run.root, "--to", f"x{suffix}") == 0
    loaded = torch.load(f"x{suffix}", weights_only=True)
    assert list(loaded) == ["w", "tied"]
    assert loaded["w"].data_ptr() == loaded["tied"].data_ptr()


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/checkpoint_epoch0002.pt", "checkpoints/best_model.pt"])
def test_the_folder_and_a_file_in_it_do_as_well(run, where):
    assert export(run.root / where, "--to", TO) == 0
    assert load_file(TO)["w"][0, 0] == (1 if "best" in where else 2)


@pytest.mark.usefixtures("run")
def test_any_other_file_is_converted(capsys):
    torch.save({"state_dict": {"model.w": torch.ones(2)}, "epoch": 5}, "lightning.ckpt")
    assert export("lightning.ckpt", "--to", TO) == 0
    assert list(load_file(TO)) == ["model.w"]
    assert "1 tensor, " in (said := capsys.readouterr().out)
    assert "epoch 5, from lightning.ckpt" in said
    assert export(TO, "--to", "back.pt") == 0
    assert torch.load("back.pt", weights_only=True).keys() == {"model.w"}


def test_another_tracked_object_is_exported_by_name(run, capsys):
    assert export(run.root, "--to", TO, "--name", "teacher") == 0
    capsys.readouterr()
    assert load_file(TO)["w"][0, 0] == 102
    assert "--name may be optimizer, model, teacher" in failed(capsys, run.root, "--to", "y.pt", "--name", "student")
    assert "state is a dict, and safetensors files hold dense tensors" in failed(
        capsys, run.root, "--to", "y.safetensors", "--name", "optimizer"
    )


def test_what_is_there_is_written_over_only_if_that_is_said(run, capsys):
    (run.root.parent / "out" / TO).write_bytes(b"mine")
    assert f"--to {TO}: is there already" in failed(capsys, run.root, "--to", TO)
    assert (run.root.parent / "out" / TO).read_bytes() == b"mine"
    assert export(run.root, "--to", TO, "--force") == 0
    assert len(load_file(TO)) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone", "--to", TO], "gone: there is no such file"),
        ([".", "--to", TO], "is no run directory: it has no checkpoints"),
        (["RUN", "--to", "x.onnx"], "the suffix says what is written; give one of .safetensors, .pt, .pth, .bin"),
        (["RUN", "--to", "RUN/checkpoints/x.pt", "--force"], "that folder holds a run's checkpoints and nothing else"),
        (["RUN", "--to", "gone/x.pt"], "there is no folder gone; make it"),
        (["RUN", "--to", "folder.pt", "--force"], "is a directory; give a file's path"),
        (["RUN", "--to", TO, "--which", "epoch=7"], "has no such checkpoint; there are the epochs 1, 2"),
        (["RUN", "--to", TO, "--which", "step=1"], "has no such checkpoint; there are the steps 20, 30"),
        (["RUN/checkpoints/checkpoint_epoch0001.pt", "--to", TO, "--which", "best"], "--which chooses within a run directory"),
        (["evil.pt", "--to", TO], "nothing in it was executed"),
        (["numbers.pt", "--to", TO], "numbers.pt: it has no model state"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, arguments, said, capsys, tmp_path):
    (tmp_path / "out" / "folder.pt").mkdir()
    (tmp_path / "out" / "evil.pt").write_bytes(as_zip(pickles(tmp_path / "mark")["builtins.eval"]))
    torch.save({"epoch": 3}, "numbers.pt")
    before = sorted((tmp_path / "out").iterdir())
    assert said in failed(capsys, *[part.replace("RUN", str(run.root)) for part in arguments])
    assert sorted((tmp_path / "out").iterdir()) == before
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("arguments", [[], ["export"], ["export", "x"], ["export", "x", "--to", TO, "--which", "epoch=x"], ["other"]])
def test_what_cannot_be_meant_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["ckpt", *arguments])
    assert caught.value.code == 2
    assert "usage: hpcckpt ckpt" in capsys.readouterr().err


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # best_model.pt may be the same file
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_never_exported(run, capsys):
    newest = run.checkpoints / "checkpoint_epoch0002.pt"
    damage(newest)
    assert "is damaged" in failed(capsys, newest, "--to", TO)
    assert "is damaged" in failed(capsys, run.root, "--to", TO, "--which", "epoch=2")
    assert export(run.root, "--to", TO) == 0
    said = capsys.readouterr()
    assert "is damaged: its digest is not the one that was committed; taking an older one" in said.err
    assert "epoch 1" in said.out


def test_the_best_one_is_checked_as_well(run, capsys):
    damage(run.best)
    assert "is damaged" in failed(capsys, run.root, "--to", TO, "--which", "best")


def test_what_a_rewind_moved_away_is_checked_as_well(run, capsys):
    claimed(run).rewind("checkpoint_epoch0001.pt")
    moved = run.superseded / "checkpoint_epoch0002.pt"
    assert export(moved, "--to", TO) == 0
    capsys.readouterr()
    damage(moved)
    assert "is damaged" in failed(capsys, moved, "--to", "y.pt")


def test_a_run_without_checkpoints_says_so(tmp_path, capsys):
    claimed(RunLayout(tmp_path))
    assert "there is no checkpoint yet" in failed(capsys, tmp_path, "--to", tmp_path / TO)
    assert "there is no best checkpoint" in failed(capsys, tmp_path, "--to", tmp_path / TO, "--which", "best")


@pytest.mark.parametrize("arguments", [["--help"], ["ckpt", "--help"], ["ckpt", "export", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = "import sys, hpcckpt.cli.main as m\ntry: m.main(sys.argv[1:])\nexcept SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "False\n"
    assert "ckpt" in done.stdout


def test_an_interruption_is_an_exit_code(run, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hpcckpt.reading.read_content", interrupted)
    assert export(run.root, "--to", TO) == 130
    assert capsys.readouterr().err == "hpcckpt: interrupted\n"


@pytest.mark.usefixtures("run")
def test_what_is_no_tensor_is_left_out_of_safetensors_and_said(capsys):
    torch.save({"w": torch.zeros(1), "part._extra_state": {"version": 1}}, "x.pt")
    assert export("x.pt", "--to", TO) == 0
    assert "1 tensor, without part._extra_state (no tensor), " in capsys.readouterr().out
    assert load_file(TO).keys() == {"w"}
    assert export("x.pt", "--to", "y.pt") == 0
    assert torch.load("y.pt", weights_only=True)["part._extra_state"] == {"version": 1}


@pytest.mark.parametrize(("state", "said"), [({}, "holds no tensors"), ({"w": torch.zeros(1, device="meta")}, "w is on the meta device")])
@pytest.mark.parametrize("target", [TO, "y.bin"])
@pytest.mark.usefixtures("run")
def test_where_there_is_nothing_to_export_it_says_so(capsys, state, said, target):
    torch.save(state, "x.pt")
    assert said in failed(capsys, "x.pt", "--to", target)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_is_one_line(run, monkeypatch, capsys, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("hpcckpt.weights.save_safetensors", failing)
    assert "there is not enough memory" in failed(capsys, run.root, "--to", TO)


@pytest.mark.usefixtures("run")
def test_a_view_is_exported_without_what_it_does_not_show():
    torch.save({"w": torch.randn(1_000_000)[:3]}, "x.pt")
    assert export("x.pt", "--to", "y.pt") == 0
    assert Path("y.pt").stat().st_size < 5000
