"""The checkpoint manager in one process; tests/ranks/test_manager.py has it on several."""

import json
import logging
import random
import subprocess
import sys

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
    with pytest.raises(CheckpointNotFoundError, match=r"names of your own only \(latest\.pt\); give one of them as filepath"):
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


def test_a_newer_manager_fences_off_the_older_one(manager, tmp_path):
    model, optimizer, _ = trained()
    manager.save(model, optimizer, 0)
    DDPCheckpointManager(tmp_path / "checkpoints", 0, 1).save(model, optimizer, 1)
    with pytest.raises(FencedError, match="took over"):
        manager.save(model, optimizer, 2)


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
