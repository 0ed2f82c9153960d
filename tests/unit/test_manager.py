"""The checkpoint manager in one process; tests/ranks/test_manager.py has it on several."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from hpcckpt.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    FencedError,
    RunDirectoryError,
    UsageError,
)
from hpcckpt.layout import RunLayout
from hpcckpt.manager import DDPCheckpointManager
from hpcckpt.policy import Retention
from hpcckpt.store import guard
from hpcckpt.store.checkpoints import CheckpointStore


def trained(seed=0, steps=3):
    """A model, optimizer and scheduler with some state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.fixture
def manager(tmp_path):
    return DDPCheckpointManager(tmp_path / "checkpoints", 0, 1)


def test_what_was_saved_is_loaded(manager, tmp_path):
    model, optimizer, scheduler = trained()
    path = manager.save(model, optimizer, 4, {"loss": 0.5}, scheduler)
    assert path == str(tmp_path / "checkpoints" / "checkpoint_epoch0004.pt")
    other, other_optimizer, other_scheduler = trained(seed=1, steps=0)
    assert manager.load(other, other_optimizer, scheduler=other_scheduler) == (4, {"loss": 0.5})
    assert same(model, other)
    assert other_scheduler.state_dict() == scheduler.state_dict()
    saved, loaded = optimizer.state_dict(), other_optimizer.state_dict()
    assert saved["param_groups"] == loaded["param_groups"]
    assert all(torch.equal(saved["state"][key]["exp_avg"], loaded["state"][key]["exp_avg"]) for key in saved["state"])


def test_an_empty_directory_is_behind_epoch_minus_1_and_not_behind_epoch_0(manager):
    model, optimizer, _ = trained()
    assert manager.load(model, optimizer) == (-1, {})
    manager.save(model, optimizer, 0)
    assert manager.load(model, optimizer) == (0, {})


def test_the_newest_is_the_highest_epoch_also_beyond_four_digits(manager):
    model, optimizer, _ = trained()
    for epoch in (9998, 9999, 10000):
        manager.save(model, optimizer, epoch)
    assert manager.load(model, optimizer)[0] == 10000


def test_an_earlier_epoch_that_is_saved_again_is_the_newest(manager):
    model, optimizer, _ = trained()
    for epoch in (0, 1, 2, 1):
        manager.save(model, optimizer, epoch)
    assert manager.load(model, optimizer)[0] == 1


@pytest.mark.parametrize("name", ["checkpoint_epoch0000.pt", "by path", "by its name in the folder"])
def test_a_file_of_choice(manager, tmp_path, monkeypatch, name):
    model, optimizer, _ = trained()
    first = manager.save(model, optimizer, 0)
    with torch.no_grad():
        model[0].weight.add_(1)
    manager.save(model, optimizer, 1)
    monkeypatch.chdir(tmp_path)
    other, other_optimizer, _ = trained(seed=5)
    given = first if name == "by path" else "checkpoint_epoch0000.pt"
    assert manager.load(other, other_optimizer, filepath=given)[0] == 0
    assert not torch.equal(other[0].weight, model[0].weight)


def test_a_file_that_is_not_there_is_answered_with_those_that_are(manager):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 3)
    with pytest.raises(CheckpointNotFoundError, match=r"gone\.pt: there is no such file; .* has checkpoint_epoch0003\.pt"):
        manager.load(model, optimizer, filepath="gone.pt")


def test_the_best_is_the_one_that_was_said_to_be(manager):
    model, optimizer, _ = trained()
    with pytest.raises(CheckpointNotFoundError, match="there is no best checkpoint"):
        manager.load(model, optimizer, load_best=True)
    for epoch in range(4):
        manager.save(model, optimizer, epoch, {"loss": float(epoch)}, is_best=epoch in (0, 2))
    assert manager.load(model, optimizer, load_best=True) == (2, {"loss": 2.0})
    assert manager.load(model, optimizer)[0] == 3


def test_the_best_is_stored_once(manager, tmp_path):
    model, optimizer, _ = trained()
    path = manager.save(model, optimizer, 0, is_best=True)
    assert (tmp_path / "checkpoints" / "best_model.pt").samefile(path)


def test_retention_keeps_the_last_and_the_best(tmp_path):
    manager = DDPCheckpointManager(tmp_path / "c", 0, 1, keep_last=2)
    model, optimizer, _ = trained()
    for epoch in range(6):
        manager.save(model, optimizer, epoch, is_best=epoch == 1)
    assert sorted(path.name for path in (tmp_path / "c").glob("checkpoint_*.pt")) == [
        f"checkpoint_epoch000{epoch}.pt" for epoch in (1, 4, 5)
    ]


def test_without_a_number_all_are_kept(manager, tmp_path):
    model, optimizer, _ = trained()
    for epoch in range(6):
        manager.save(model, optimizer, epoch)
    assert len(list((tmp_path / "checkpoints").glob("checkpoint_*.pt"))) == 6


def test_a_name_of_ones_own_is_kept_beside_the_others(tmp_path):
    manager = DDPCheckpointManager(tmp_path / "c", 0, 1, keep_last=2)
    model, optimizer, _ = trained()
    assert manager.save(model, optimizer, 0, filename="latest.pt") == str(tmp_path / "c" / "latest.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"under other names only \(latest\.pt\); give one of them as filepath"):
        manager.load(model, optimizer)
    for epoch in range(1, 5):
        manager.save(model, optimizer, epoch)
    assert manager.load(model, optimizer)[0] == 4
    assert manager.load(model, optimizer, filepath="latest.pt")[0] == 0
    damaged = tmp_path / "c" / "latest.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match="were committed; choose another one"):
        manager.load(model, optimizer, filepath="latest.pt")


def test_a_name_of_ones_own_may_be_the_best(manager):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0, filename="winner.pt", is_best=True)
    manager.save(model, optimizer, 1)
    assert manager.load(model, optimizer, load_best=True)[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x.pt",
        "a/b.pt",
        "/x.pt",
        ".hidden.pt",
        "latest.json",
        "best_model.pt",
        "superseded",
        "x.json",
        "x.lock",
        "latest",
        "generation",
        "checkpoint_epoch0003",
        "a\nb.pt",
        "a\0b.pt",
        "checkpoint_epoch0007.pt",
    ],
)
def test_a_name_that_would_leave_the_folder_or_take_a_place_in_it_is_refused(manager, tmp_path, name):
    model, optimizer, _ = trained()
    with pytest.raises(UsageError, match="cannot be a checkpoint's name"):
        manager.save(model, optimizer, 3, filename=name)
    assert list(tmp_path.rglob("*.pt")) == []


def test_a_damaged_newest_is_passed_over_with_a_warning_and_not_moved(manager, caplog):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    path = manager.checkpoint_dir / "checkpoint_epoch0001.pt"
    manager.save(model, optimizer, 1)
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING, "hpcckpt"):
        assert manager.load(model, optimizer)[0] == 0
    assert "were committed" in caplog.text
    assert path.exists()


def test_loading_alone_interferes_with_no_run(manager, tmp_path):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    before = (tmp_path / "checkpoints" / "generation.json").read_text()
    DDPCheckpointManager(tmp_path / "checkpoints", 0, 1).load(model, optimizer)
    assert (tmp_path / "checkpoints" / "generation.json").read_text() == before
    manager.save(model, optimizer, 1)


def test_two_managers_of_one_process_share_a_directory(manager, tmp_path):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    second = DDPCheckpointManager(tmp_path / "checkpoints", 0, 1)
    second.save(model, optimizer, 1)
    manager.save(model, optimizer, 2)
    assert second.load(model, optimizer)[0] == 2


def test_a_manager_within_a_run_leaves_the_run_its_directory(manager, tmp_path):
    run = CheckpointStore(RunLayout(tmp_path), Retention())
    run.claim("7", (0,))
    manager.save(*trained()[:2], 0, filename="ema.pt")
    run.refuse_if_fenced()


def test_a_newer_attempt_of_another_process_fences_it_off(manager, tmp_path, environ):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    code = "import sys; from pathlib import Path; from hpcckpt.layout import RunLayout; from hpcckpt.policy import Retention; "
    code += "from hpcckpt.store.checkpoints import CheckpointStore as S; S(RunLayout(Path(sys.argv[1])), Retention(), 'off').claim(None)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environ(), check=True)
    with pytest.raises(FencedError, match="took over"):
        manager.save(model, optimizer, 1)


SAVE = """
import sys
import torch
from hpcckpt import DDPCheckpointManager
manager = DDPCheckpointManager(sys.argv[1], 0, 1)
manager.save(torch.nn.Linear(1, 1), None, 0)
print("saved", flush=True)
sys.stdin.read()
"""


def test_a_directory_in_which_another_process_is_saving_is_refused(tmp_path, monkeypatch, environ):
    monkeypatch.setattr(guard, "ATTEMPT_TIMEOUT_S", 0.2)
    command = [sys.executable, "-c", SAVE, str(tmp_path / "c")]
    with subprocess.Popen(command, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "saved\n"
        with pytest.raises(RunDirectoryError, match=rf"process {other.pid} on .* is running in this directory"):
            DDPCheckpointManager(tmp_path / "c", 0, 1).save(nn.Linear(1, 1), None, 1)
        other.kill()
        other.wait()
    assert DDPCheckpointManager(tmp_path / "c", 0, 1).save(nn.Linear(1, 1), None, 1)


def test_random_numbers_go_on_where_they_were_saved(manager):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    expected = torch.rand(3), random.random()
    torch.manual_seed(77)
    random.seed(77)
    manager.load(model, optimizer)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


@pytest.mark.parametrize("how", [{"load_best": True}, {"optimizer": None}], ids=str)
def test_random_numbers_stay_where_weights_are_only_looked_at(manager, how):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0, is_best=True)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    manager.load(**{"model": model, "optimizer": optimizer, **how})
    assert torch.equal(torch.rand(3), expected)


def test_any_wrapper_on_either_side(manager):
    model, optimizer, _ = trained()
    manager.save(DataParallel(model), optimizer, 0)
    content = torch.load(manager.checkpoint_dir / "checkpoint_epoch0000.pt", weights_only=True)
    assert list(content["model_state_dict"]) == list(model.state_dict())
    for wrap in (lambda module: module, DataParallel, lambda module: torch.compile(DataParallel(module), backend="eager")):
        other, _, _ = trained(seed=9, steps=0)
        manager.load(wrap(other))
        assert same(model, other)


def test_files_of_other_scripts_under_these_names_are_read(tmp_path, caplog):
    model, optimizer, _ = trained()
    (tmp_path / "old").mkdir()
    for epoch in (2, 11):
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        content = {"epoch": epoch, "model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(), "metrics": {"loss": 1.0}}
        torch.save(content, tmp_path / "old" / f"checkpoint_epoch{epoch:04d}.pt")
    other, other_optimizer, _ = trained(seed=3, steps=0)
    with caplog.at_level(logging.WARNING, "hpcckpt"):
        loaded = DDPCheckpointManager(tmp_path / "old", 0, 1).load(other, other_optimizer)
    assert loaded == (11, {"loss": 1.0})
    assert same(model, other)
    assert "has no manifest" in caplog.text
    assert "not bit-exact" in caplog.text


def test_what_does_not_fit_is_named(manager):
    model, optimizer, scheduler = trained()
    manager.save(model, optimizer, 0)
    wider = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(CheckpointMismatchError, match=r"shapes differ: 0\.weight \(8, 4\) for \(9, 4\)"):
        manager.load(wider)
    with pytest.raises(CheckpointMismatchError, match="no state for 'scheduler'"):
        manager.load(model, optimizer, scheduler=scheduler)


def test_a_world_without_a_process_group_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"rank 1 of 2: there is no process group"):
        DDPCheckpointManager(tmp_path, 1, 2)


def test_the_manifest_says_what_is_in_the_file(manager):
    model, optimizer, _ = trained()
    manager.save(DataParallel(model), optimizer, 0, {"loss": 0.25}, is_best=True)
    manifest = json.loads((manager.checkpoint_dir / "checkpoint_epoch0000.json").read_text())
    assert manifest["metrics"] == {"loss": 0.25}
    assert manifest["is_best"] is True
    assert manifest["saved_with_wrapper"] == "DataParallel"
    assert manifest["world_size"] == 1


def test_the_store_of_a_run_reads_its_folder(manager, tmp_path):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 7)
    assert CheckpointStore(RunLayout(tmp_path), Retention()).find("epoch 7", epoch=7).name == "checkpoint_epoch0007.pt"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.mean([0.25, 0.75]), 0.5),
        (np.float32(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], requires_grad=True), 0.5),
        (3, 3.0),
        (True, 1.0),
    ],
    ids=str,
)
def test_what_is_a_number_is_a_plain_one_in_the_file(manager, given, kept):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0, {"loss": given})
    assert manager.load(model, optimizer) == (0, {"loss": kept})
    assert type(torch.load(manager.checkpoint_dir / "checkpoint_epoch0000.pt", weights_only=True)["metrics"]["loss"]) is float


@pytest.mark.parametrize("value", [None, "low", [0.1, 0.2], {"a": 1}, torch.zeros(2)], ids=str)
def test_a_metric_that_is_no_number_is_refused_before_anything_is_written(manager, value):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 1, {"loss": 1.0})
    with pytest.raises(UsageError, match=r"metrics: loss is a .*, not a number"):
        manager.save(model, optimizer, 0, {"loss": value})
    assert manager.load(model, optimizer)[0] == 1


def test_metrics_by_number_are_found_again(manager):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0, {number: float(number) for number in range(12)})
    assert manager.load(model, optimizer)[1]["11"] == 11.0


@pytest.mark.parametrize("epoch", [np.int64(3), torch.tensor(3)], ids=repr)
def test_a_whole_number_of_any_kind_is_an_epoch(manager, epoch):
    manager.save(*trained()[:2], epoch)
    assert manager.load(*trained()[:2])[0] == 3


@pytest.mark.parametrize("epoch", [-1, 3.0, "3", None, True], ids=repr)
def test_what_is_no_epoch_is_refused(manager, epoch):
    with pytest.raises(UsageError, match="epoch="):
        manager.save(*trained()[:2], epoch)


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 1), (5, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(tmp_path, rank, world_size):
    with pytest.raises(UsageError, match="ranks count from 0 to world_size - 1"):
        DDPCheckpointManager(tmp_path, rank, world_size)


@pytest.mark.parametrize("arguments", [{"keep_last": 1}, {"keep_last": 0}, {"locking": "none"}], ids=str)
def test_an_argument_that_cannot_be_meant_is_refused(tmp_path, arguments):
    with pytest.raises(UsageError, match="|".join(arguments)):
        DDPCheckpointManager(tmp_path, 0, 1, **arguments)


def test_the_best_stays_until_another_one_is_said_to_be(manager):
    model, optimizer, _ = trained()
    for epoch in range(3):
        manager.save(model, optimizer, epoch, {"loss": float(epoch)}, is_best=epoch == 2)
    manager.save(model, optimizer, 2, {"loss": 9.0})
    assert manager.load(model, optimizer, load_best=True) == (2, {"loss": 2.0})
    manager.save(model, optimizer, 1, {"loss": 0.5}, is_best=True)
    assert manager.load(model, optimizer, load_best=True) == (1, {"loss": 0.5})


def test_a_damaged_best_one_is_refused(manager):
    manager.save(*trained()[:2], 0, is_best=True)
    best = manager.checkpoint_dir / "best_model.pt"
    content = best.read_bytes()
    best.unlink()
    best.write_bytes(content[:-1])
    with pytest.raises(CheckpointCorruptError, match="damaged"):
        manager.load(trained()[0], load_best=True)


def test_going_back_moves_what_came_later_away(manager, caplog):
    model, optimizer, _ = trained()
    for epoch in range(4):
        manager.save(model, optimizer, epoch)
    manager.load(model, optimizer, filepath="checkpoint_epoch0001.pt")
    with caplog.at_level(logging.WARNING, "hpcckpt"):
        manager.save(model, optimizer, 2)
    assert "went back to epoch 2; moved to" in caplog.text
    assert sorted(path.name for path in manager.checkpoint_dir.glob("checkpoint_*.pt")) == [
        "checkpoint_epoch0000.pt",
        "checkpoint_epoch0001.pt",
        "checkpoint_epoch0002.pt",
    ]
    assert (manager.checkpoint_dir / "superseded" / "checkpoint_epoch0003.pt").exists()


def test_a_best_model_of_another_script_stays(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "best_model.pt").write_bytes(b"precious")
    manager = DDPCheckpointManager(tmp_path / "c", 0, 1)
    manager.save(*trained()[:2], 0)
    assert (tmp_path / "c" / "best_model.pt").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["checkpoint_epoch_3.pt", "model.pth", "last.ckpt", "best_model.pt"])
def test_a_directory_of_files_that_are_not_understood_is_not_taken_to_be_empty(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointNotFoundError, match=f"under other names only .{name}"):
        DDPCheckpointManager(tmp_path, 0, 1).load(*trained()[:2])


@pytest.mark.parametrize("generators", [torch.zeros(5056, dtype=torch.uint8), None, {"a": 1}, [torch.zeros(3)], "x"], ids=type)
def test_generators_of_other_scripts_are_left_alone(tmp_path, caplog, generators):
    model, optimizer, _ = trained()
    content = {"epoch": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "rng_state": generators}
    torch.save(content, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING, "hpcckpt"):
        assert DDPCheckpointManager(tmp_path, 0, 1).load(model, optimizer, filepath=tmp_path / "x.pt") == (1, {})
    assert "of 0 ranks, and there are 1" in caplog.text


@pytest.mark.parametrize("epoch", ["3", 3.0, [1]], ids=repr)
def test_a_file_whose_epoch_is_none_is_refused_before_anything_is_loaded(tmp_path, epoch):
    model, _, _ = trained()
    torch.save({"epoch": epoch, "model_state_dict": model.state_dict()}, tmp_path / "x.pt")
    other, _, _ = trained(seed=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="its epoch is"):
        DDPCheckpointManager(tmp_path, 0, 1).load(other, filepath=tmp_path / "x.pt")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_a_later_format_is_refused(tmp_path):
    torch.save({"format_version": 2, "epoch": 1, "model_state_dict": trained()[0].state_dict()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match="written in format 2, this version reads up to 1"):
        DDPCheckpointManager(tmp_path, 0, 1).load(trained()[0], filepath=tmp_path / "x.pt")


def test_an_epoch_that_was_not_finished_begins_anew(manager):
    model, optimizer, _ = trained()
    path = Path(manager.save(model, optimizer, 5))
    content = torch.load(path, weights_only=True)
    content["data_state"]["epoch_finished"] = False
    torch.save(content, path.with_name("within.pt"))
    assert manager.load(model, optimizer, filepath="within.pt")[0] == 4


def test_a_damaged_pointer_does_not_keep_a_save_from_writing_it_anew(manager):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    (manager.checkpoint_dir / "latest.json").write_text("{")
    manager.save(model, optimizer, 1)
    assert manager.load(model, optimizer)[0] == 1


def test_a_directory_may_be_a_symlink_of_the_users_own(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "scratch")
    manager = DDPCheckpointManager(tmp_path / "c", 0, 1)
    manager.save(*trained()[:2], 0)
    assert (tmp_path / "scratch" / "latest.json").exists()


def test_a_bare_name_is_that_of_the_directory_and_not_of_where_the_script_runs(tmp_path, monkeypatch):
    for name in ("a", "b"):
        DDPCheckpointManager(tmp_path / name, 0, 1).save(*trained()[:2], 0, {"is_a": name == "a"})
    monkeypatch.chdir(tmp_path / "b")
    assert DDPCheckpointManager(tmp_path / "a", 0, 1).load(trained()[0], filepath="checkpoint_epoch0000.pt")[1] == {"is_a": 1.0}


def test_what_was_gone_on_from_stays(tmp_path):
    model, optimizer, _ = trained()
    DDPCheckpointManager(tmp_path / "c", 0, 1).save(model, optimizer, 0)
    manager = DDPCheckpointManager(tmp_path / "c", 0, 1, keep_last=2)
    manager.load(model, optimizer)
    for epoch in range(1, 5):
        manager.save(model, optimizer, epoch)
    assert sorted(path.name for path in (tmp_path / "c").glob("checkpoint_*.pt")) == [
        "checkpoint_epoch0000.pt",
        "checkpoint_epoch0003.pt",
        "checkpoint_epoch0004.pt",
    ]


def test_a_file_that_a_run_deletes_while_it_is_chosen_is_replaced_by_the_newer_one(tmp_path, monkeypatch):
    model, optimizer, _ = trained()
    run = DDPCheckpointManager(tmp_path / "c", 0, 1, keep_last=2)
    run.save(model, optimizer, 0)
    watcher = DDPCheckpointManager(tmp_path / "c", 0, 1)
    candidate = watcher._candidate

    def overtaken(*arguments, **options):
        found = candidate(*arguments, **options)
        if found.name == "checkpoint_epoch0000.pt":
            for epoch in (1, 2, 3):
                run.save(model, optimizer, epoch)
        return found

    monkeypatch.setattr(watcher, "_candidate", overtaken)
    assert watcher.load(model)[0] == 3
