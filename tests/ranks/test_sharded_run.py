"""A run whose parameters are spread over its ranks (FSDP2): the same files, the same bits."""

import json
from pathlib import Path

import pytest
import torch

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "exact.py")
pytestmark = pytest.mark.timeout(400)


def newest(run_dir):
    pointer = json.loads((run_dir / "checkpoints" / "latest.json").read_text())
    return torch.load(run_dir / "checkpoints" / pointer["file"], weights_only=True)


def test_an_interrupted_sharded_run_ends_bit_identical_to_an_uninterrupted_one(ranks, same_state, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ranks.run([SCRIPT, str(whole), "args.wrap=fsdp2"], 2).codes == [0, 0]
    attempts = ranks.run_to_the_end([SCRIPT, str(broken), "args.wrap=fsdp2"], 2, {"HPCCKPT_TEST_STOPS": "1@2 0@9"})
    assert len(attempts) == 3
    same_state(whole, broken)
    content = newest(whole)
    assert {key: tuple(value.shape) for key, value in content["model_state_dict"].items()} == {
        "0.weight": (33, 8),
        "0.bias": (33,),
        "3.weight": (17, 33),
        "3.bias": (17,),
        "5.weight": (3, 17),
        "5.bias": (3,),
    }
    assert content["optimizer_state_dict"]["state"][0]["momentum_buffer"].shape == (33, 8)


def test_a_run_goes_on_with_another_wrapper_and_number_of_ranks(ranks, tmp_path):
    folder = tmp_path / "run"
    saved = []
    for wrap, world_size, epochs in (("ddp", 2, 1), ("fsdp2", 3, 2), ("ddp", 1, 3)):
        attempt = ranks.run([SCRIPT, str(folder), f"args.wrap={wrap}", f"args.epochs={epochs}"], world_size)
        assert attempt.codes == [0] * world_size, attempt.outputs
        content = newest(folder)
        saved.append((content["epoch"], content["world_size"], len(content["optimizer_state_dict"]["state"])))
    assert saved == [(0, 2, 6), (1, 3, 6), (2, 1, 6)]
