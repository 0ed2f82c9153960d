"""What Run refuses before it meets the other ranks; tests/ranks has it at work."""

import pytest

from hpcckpt import Run
from hpcckpt.errors import ConfigError


@pytest.mark.parametrize("override", ["resume.epoch=1", "resume.from=none", "resume.weights_only=true"])
def test_a_script_of_ones_own_cannot_go_back_at_every_start(tmp_path, override):
    with pytest.raises(ConfigError, match=r"resume\.\* is carried out once, by `python -m hpcckpt\.submit`"):
        Run.from_environment(tmp_path, [override])
    assert list(tmp_path.iterdir()) == []
