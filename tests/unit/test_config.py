"""The configuration: defaults, merging, what is written down again, and an answer to every slip."""

import contextlib
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcckpt import config
from hpcckpt.errors import ConfigError

ENTRY = "entrypoint: a.b:main\n"

# DESIGN.md, section 4: a contract.
CONTRACT = """
run_dir: runs/${name}
args: {}
cluster: auto
slurm: {nodes: 1, tasks_per_node: 1, gpus_per_node: 0, cpus_per_task: 1, mem_gb: null, time_min: 60, partition: null,
        account: null, qos: null, constraint: null, gres: null, reservation: null, exclude: null, dependency: null,
        comment: null, mail_type: null, mail_user: null, setup: [], python: null, extra: {}}
checkpoint: {every_epochs: 1, every_steps: null, every_minutes: null, keep_last: 3, keep_best: 1, keep_every_epochs: null,
             monitor: null, mode: min, async_save: true, staging: eager, writers: rank0}
requeue: {enabled: true, signal: USR1, lead_time_s: 120, max_requeues: 100, max_stalled: 3}
resume: {from: latest, epoch: null, step: null, weights_only: false}
seed: 0
"""


def refused(text: str, *overrides: str) -> str:
    """Return the one line that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        config.parse(text, overrides, where="exp.yaml")
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert not [character for character in message if unicodedata.category(character) == "Cc"]
    return message


def dumped(text: str, *overrides: str) -> dict[str, object]:
    return yaml.safe_load(config.dump(config.parse(text, overrides)))


def test_defaults_are_those_of_the_contract() -> None:
    given_keys = dumped(ENTRY)
    for key, value in yaml.safe_load(CONTRACT).items():
        for name, default in value.items() if isinstance(value, dict) and value else [(None, value)]:
            assert (given_keys[key] if name is None else given_keys[key][name]) == default, (key, name)


def test_the_name_is_that_of_the_file_unless_it_says_another(tmp_path: Path) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text(ENTRY)
    assert config.resolve(config.load(file)).run_dir == "runs/digits"
    file.write_text(f"{ENTRY}name: other\n")
    assert config.resolve(config.load(file)).run_dir == "runs/other"


def test_the_file_wins_over_defaults_and_the_command_line_over_both() -> None:
    text = f"{ENTRY}slurm: {{nodes: 2, time_min: 10}}\nargs: {{lr: 0.1, deep: {{a: 1, b: 2}}}}\n"
    merged = config.resolve(config.parse(text, ["slurm.nodes=4", "args.lr=0.5", "args.deep.b=3", "args.new=x", "slurm.nodes=5"]))
    assert (merged.slurm.nodes, merged.slurm.time_min, merged.slurm.cpus_per_task) == (5, 10, 1)
    assert merged.args == {"lr": 0.5, "deep": {"a": 1, "b": 3}, "new": "x"}


@pytest.mark.parametrize("key", ["args", "slurm", "checkpoint", "requeue", "resume"])
def test_a_section_whose_lines_are_all_commented_out_is_its_defaults(key: str) -> None:
    assert dumped(f"{ENTRY}{key}:\n  # nothing\n") == dumped(ENTRY)


def test_interpolations_are_resolved_for_the_run_and_kept_as_they_are_in_what_is_written_down() -> None:
    merged = config.parse(f"{ENTRY}name: x\nargs: {{out: '${{run_dir}}/out'}}\n")
    assert config.resolve(merged).args == {"out": "runs/x/out"}
    written = yaml.safe_load(config.dump(merged))
    assert (written["run_dir"], written["args"]) == ("runs/${name}", {"out": "${run_dir}/out"})
    assert config.resolve(config.parse(config.dump(merged), ["name=y"])).args == {"out": "runs/y/out"}


def test_a_secret_from_the_environment_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCKPT_TEST_TOKEN", "hunter2")
    text = f"{ENTRY}args:\n  token: ${{oc.env:HPCCKPT_TEST_TOKEN}}\n  nested: [{{deep: '${{args.token}}'}}]\n"
    merged = config.parse(text, ["slurm.comment=${oc.env:HPCCKPT_TEST_TOKEN}"])
    resolved = config.resolve(merged)
    assert (resolved.args["token"], resolved.args["nested"], resolved.slurm.comment) == ("hunter2", [{"deep": "hunter2"}], "hunter2")
    assert "hunter2" not in config.dump(merged)
    assert "HPCCKPT_TEST_TOKEN" in config.dump(merged)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="$\\"), max_size=12)
numbers = st.integers(1, 1000)
leaves = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | words
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6)
documents = st.fixed_dictionaries(
    {"entrypoint": st.sampled_from(["a:b", "package.module:main"])},
    optional={
        "name": st.text("abcXYZ-_. é", min_size=3, max_size=9),
        "args": st.dictionaries(words, trees, max_size=4),
        "cluster": st.sampled_from(["auto", "slurm", "local"]),
        "slurm": st.fixed_dictionaries(
            {},
            optional={
                "nodes": numbers,
                "mem_gb": st.floats(0.1, 1e6),
                "comment": st.none() | words.filter(lambda word: "\u2028" not in word and "\u2029" not in word),
                "setup": st.lists(st.sampled_from(["module load cuda", "export A='b c'"])),
                "extra": st.dictionaries(st.sampled_from(["switches", "nice", "exclusive"]), st.just(True) | numbers),
            },
        ),
        "checkpoint": st.fixed_dictionaries({}, optional={"keep_last": st.integers(2, 9), "every_minutes": st.none() | st.floats(0.1, 99)}),
        "resume": st.sampled_from([{"from": "best"}, {"from": "/a b/c.pt"}, {"epoch": 3}, {"step": 0}, {"weights_only": True}]),
        "seed": st.integers(0, 2**64 - 1),
    },
)


@settings(max_examples=40, deadline=None)
@given(documents)
def test_what_is_written_down_is_read_back_as_the_same(document: dict[str, object]) -> None:
    merged = config.parse(yaml.safe_dump(document, allow_unicode=True))
    text = config.dump(merged)
    again = config.parse(text, defaults={"name": "another"})
    assert config.dump(again) == text
    assert config.resolve(again) == config.resolve(merged)
    assert "from_" not in yaml.safe_load(text)["resume"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nmae: x", "unknown key nmae; did you mean name?"),
        ("nodes: 2", "unknown key nodes; did you mean slurm.nodes?"),
        ("slurm.nodes: 2", "unknown key slurm.nodes; write it in its section, as `slurm: {nodes: …}`"),
        ("slurm: {node: 2}", "unknown key slurm.node; did you mean slurm.nodes?"),
        ("checkpoint: {lead_time_s: 2}", "unknown key checkpoint.lead_time_s; did you mean requeue.lead_time_s?"),
        ("checkpoint: {keep: 2}", "unknown key checkpoint.keep; did you mean checkpoint.keep_"),
        ("requeue: {max_requeue: 2}", "unknown key requeue.max_requeue; did you mean requeue.max_requeues?"),
        ("resume: {form: best}", "unknown key resume.form; did you mean resume.from?"),
        ("resume: {from_: best}", "unknown key resume.from_; did you mean resume.from?"),
        ("qqqq: 2", "unknown key qqqq; known here: name, run_dir, entrypoint"),
        ("1: 2", "unknown key 1; known here"),
        ('"a\\nb": 2', "unknown key a\\nb; known here"),
        ("slurm: 3", "slurm: holds 3, but it has keys of its own: nodes, tasks_per_node"),
        ("slurm: gpu", "slurm: holds 'gpu', but it has keys"),
        ("resume: [best]", "resume: holds ['best'], but it has keys of its own: from, epoch, step, weights_only"),
        ("slurm: {nodes: two}", "slurm.nodes: 'two' is neither a number of nodes from 1 on nor a range of them, as in 2-4"),
        ("slurm: {nodes: 1.5}", "slurm.nodes: Value '1.5'"),
        ("slurm: {nodes: null}", "slurm.nodes: Value 'None' is incompatible"),
        ("slurm: {setup: module load x}", "slurm.setup: "),
        ("slurm: {setup: {a: 1}}", "slurm: "),
        ("slurm: {extra: {1: 2}}", "slurm.extra.1: Key 1 (int)"),
        ("args: [1]", "args: "),
        ("args: text", "args: "),
        ("args: {null: 1}", "Incompatible key type 'NoneType'"),
        ("resume: {from: null}", "resume.from: Incompatible value 'None'"),
        ("seed: true", "seed: Value 'True' of type 'bool'"),
        ("requeue: {enabled: maybe}", "requeue.enabled: Value 'maybe'"),
        ("args:\n  x: ${nowhere}", "args.x: Interpolation key 'nowhere' not found"),
        ("args:\n  x: ${oc.env:HPCCKPT_NOT_SET}", "args.x: KeyError raised while resolving interpolation"),
        ("args:\n  x: ???", "args.x is missing; add `args.x: …`"),
        ("args:\n  x: ${", "no viable alternative at input '${'"),
        ("name: ${name}", "name: Recursive interpolation"),
    ],
)
def test_a_slip_is_answered_with_the_place_and_the_key(line: str, said: str) -> None:
    assert refused(f"{ENTRY}{line}\n").startswith(f"exp.yaml: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "exp.yaml: entrypoint is missing; add `entrypoint: package.module:function`", id="empty"),
        pytest.param("# nothing\n", "exp.yaml: entrypoint is missing", id="comments only"),
        pytest.param("- a\n- b\n", "exp.yaml: a list at the top; write `key: value` lines", id="list"),
        pytest.param("3\n", "exp.yaml: a single value; write `key: value` lines", id="number"),
        pytest.param("hello\n", "exp.yaml: unknown key hello", id="word"),
        pytest.param(f"{ENTRY}name: a\nname: b\n", "exp.yaml line 3 column 1: not valid YAML (found duplicate key name)", id="key twice"),
        pytest.param(f"{ENTRY}slurm:\n\tnodes: 2\n", "exp.yaml line 3 column 1: not valid YAML (found character", id="tab"),
        pytest.param(f"{ENTRY}args: {{a: 1\n", "exp.yaml line 3 column 1: not valid YAML (", id="brace left open"),
        pytest.param(f"{ENTRY}args: !!python/object/apply:os.getcwd []\n", "exp.yaml line 2 column 7: not valid YAML (", id="object"),
        pytest.param(f"{ENTRY}args: &a {{x: *a}}\n", "exp.yaml line 2 column 7: not valid YAML (", id="alias of itself"),
        pytest.param(f"{ENTRY}---\nname: b\n", "exp.yaml line 2 column 1: not valid YAML (", id="two documents"),
        pytest.param(f"{ENTRY}name: \x01\n", "exp.yaml: not valid YAML (unacceptable character", id="control character"),
    ],
)
def test_a_text_that_is_no_configuration_is_answered_with_its_line(text: str, said: str) -> None:
    assert refused(text).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("slurm.node=2", "slurm.node=2: unknown key slurm.node; did you mean slurm.nodes?"),
        ("slurm.time_min=x", "slurm.time_min=x: slurm.time_min: Value 'x'"),
        ("slurm.nodes=", "slurm.nodes=: slurm.nodes: Value 'None' is incompatible"),
        ("slurm.ntasks=4", "slurm.ntasks=4: unknown key slurm.ntasks; did you mean slurm.tasks_per_node?"),
        ("slurm.gpus=4", "slurm.gpus=4: unknown key slurm.gpus; did you mean slurm.gpus_per_node?"),
        ("ntasks=4", "ntasks=4: unknown key ntasks; did you mean slurm.tasks_per_node?"),
        ("slurm=", "slurm=: slurm: holds None, but it has keys of its own"),
        ("slurm.setup.0=a", "slurm.setup.0=a: slurm: "),
        ("args=[1]", "args=[1]: args: "),
        ("nodes", "'nodes' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("", "'' is not of the form key=value"),
        ("args.x=[1,2", "'args.x=[1,2' cannot be read (while parsing a flow sequence); quote the value"),
        ("args.x=${", "'args.x=${' cannot be read ("),
        ("args.x=\udcff", "'args.x=\\udcff' cannot be read ("),
    ],
)
def test_a_slip_on_the_command_line_is_answered_with_what_was_typed(override: str, said: str) -> None:
    assert refused(ENTRY, override).startswith(f"command line: {said}")


def test_a_value_without_sense_names_both_places_it_may_come_from() -> None:
    assert refused(ENTRY, "slurm.time_min=0") == "exp.yaml and the command line: slurm.time_min: 0 must be at least 1"


def test_an_interpolated_value_is_checked_as_what_it_stands_for() -> None:
    assert "slurm.nodes: -3 is neither a number of nodes" in refused(f"{ENTRY}args: {{n: -3}}\nslurm: {{nodes: '${{args.n}}'}}\n")


@settings(deadline=None)
@given(st.text() | st.text("abn:-{}[]&*!|>'\"%@`#,?=~$\n\t .0123456789"))
def test_no_text_at_all_raises_anything_but_a_configuration_error(text: str) -> None:
    for document in (text, f"{ENTRY}args: {text}\n", f"{ENTRY}slurm: {text}\n"):
        with contextlib.suppress(ConfigError):
            config.dump(config.parse(document))


keys = st.sampled_from(["name", "args", "args.x", "slurm", "slurm.nodes", "slurm.setup", "slurm.extra.x", "resume.from", "resume", "seed"])


@settings(deadline=None)
@given(st.text() | st.tuples(keys, st.text() | st.text("[]{}:,-'\"${}!&*.0n1e")).map("=".join))
def test_no_override_at_all_raises_anything_but_a_configuration_error(override: str) -> None:
    with contextlib.suppress(ConfigError):
        config.dump(config.parse(ENTRY, [override]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for name, said in [("gone.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "can't decode byte 0xe9")]:
        with pytest.raises(ConfigError, match=f"{tmp_path / name}: cannot be read .*{said}.*; give a readable YAML file"):
            config.load(tmp_path / name)


def test_a_bare_name_is_looked_up_in_the_folder_and_a_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    for file in ("conf/a.yaml", "conf/b.yaml", "b.yaml"):
        Path(file).write_text(ENTRY)
    found = [config.find_file(conf, Path("conf")) for conf in ("a", "a.yaml", "b.yaml", str(tmp_path / "b.yaml"))]
    assert found == [Path("conf/a.yaml"), Path("conf/a.yaml"), Path("b.yaml"), tmp_path / "b.yaml"]


@pytest.mark.parametrize("conf", ["c", "conf", "../conf", "a/b", "x" * 300, "a\nb"])
def test_an_unknown_name_is_answered_with_those_there_are(conf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    for name in ("digits", "alpha"):
        Path("conf", f"{name}.yaml").write_text(ENTRY)
    with pytest.raises(ConfigError, match=r"^conf=.*: no such file, and conf/ holds alpha, digits; give a path or one of those names$"):
        config.find_file(conf, Path("conf"))


def test_a_scripts_own_file_needs_to_say_only_what_is_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("requeue: {on_failure: 1}\n")
    run = config.of_script(file, "mine")
    assert (run.name, run.entrypoint, run.requeue.on_failure) == ("mine", "__main__:main", 1)
    file.write_text("name: other\nentrypoint: train:main\n")
    assert (config.of_script(file, "mine").name, config.of_script(file, "mine").entrypoint) == ("other", "train:main")
