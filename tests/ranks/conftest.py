"""Comparing what runs ended with."""

import json
from pathlib import Path

import pytest
import torch

from support.forked_ranks import ForkedRanks


def final_state(run_dir: Path) -> dict[str, object]:
    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text())
    content: dict[str, object] = torch.load(run_dir / "checkpoints" / pointer["file"], weights_only=True)
    return content


def assert_equal(first: object, second: object, where: str) -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where  # type: ignore[arg-type]
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where  # type: ignore[attr-defined]
        for key, value in first.items():
            assert_equal(value, second[key], f"{where}.{key}")  # type: ignore[index]
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where  # type: ignore[arg-type]
        for index, value in enumerate(first):
            assert_equal(value, second[index], f"{where}[{index}]")  # type: ignore[index]
    else:
        assert first == second, where


@pytest.fixture(scope="session")
def same_state():
    """A function that asserts that the newest checkpoints of two runs are equal, bit for bit, in everything."""

    def check(first: Path, second: Path) -> None:
        assert_equal(final_state(first), final_state(second), "checkpoint")

    return check


@pytest.fixture(scope="session")
def forked_ranks(environ):
    """Real ranks, each a fork of a process that has torch imported."""
    server = ForkedRanks(environ())
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
