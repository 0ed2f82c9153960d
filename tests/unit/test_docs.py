"""Documentation and configurations are held to the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcckpt import config, errors, policy
from hpcckpt.layout import RunLayout

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
CONFIGURATIONS = sorted(REPOSITORY.glob("conf/*.yaml"))


def reference(page: str) -> str:
    return (REPOSITORY / "docs" / "reference" / page).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("key", [key for key in config.all_keys() if key not in ("slurm", "checkpoint", "requeue", "resume")])
def test_every_configuration_key_is_documented(key):
    assert f"`{key}`" in reference("configuration.md")


def test_no_other_key_is_documented():
    documented = set(re.findall(r"`((?:slurm|checkpoint|requeue|resume)\.[a-z_]+)`", reference("configuration.md")))
    assert documented <= set(config.all_keys())


@pytest.mark.parametrize("name", [name for name, value in vars(RunLayout).items() if isinstance(value, property)])
def test_every_file_of_a_run_is_documented(name, tmp_path):
    path = getattr(RunLayout(tmp_path), name)
    if path.suffix != ".lock":
        assert path.name in reference("files.md")


@pytest.mark.parametrize("code", [value for name, value in vars(policy).items() if name.startswith("EXIT_")])
def test_every_exit_code_is_documented(code):
    assert f"| {code} |" in reference("commands.md")


def test_every_error_is_in_the_tree_of_its_module():
    assert all(name in (errors.__doc__ or "") for name, value in vars(errors).items() if isinstance(value, type))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_all_python_on_a_page_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(code)


def test_the_readmes_configuration_is_one():
    (text,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert config.resolve(config.parse(text)).slurm.nodes == 4


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_in_conf_loads_and_its_entrypoint_is_there(path):
    loaded = config.resolve(config.load(path))
    code = f"from hpcckpt.task import import_entrypoint as f; f({loaded.entrypoint!r})"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
