"""Values that cannot be meant, one row each; most would otherwise be found on a node, hours later."""

import pytest
import yaml

from hpcckpt import config
from hpcckpt.config import SlurmConfig
from hpcckpt.errors import ConfigError

BASE = {"entrypoint": "a.b:main"}


def parsed(key: str, value: object) -> config.RunConfig:
    """Return the configuration whose only other key is `key`, a dotted one for a section's."""
    section, _, name = key.rpartition(".")
    document = BASE | ({section: {name: value}} if section else {name: value})
    return config.resolve(config.parse(yaml.safe_dump(document), where="exp.yaml"))


def refused(key: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(key, value)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.startswith("exp.yaml: ")
    return message.removeprefix("exp.yaml: ")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *[
            ("slurm.nodes", nodes, "is neither a number of nodes from 1 on nor a range of them, as in 2-4")
            for nodes in (0, -1, "0", "0-2", "4-2", "2-", "-2", "2-4:2", "2,4", " 2", "2-4\n", "01", "")
        ],
        ("requeue.on_failure", -1, "must be at least 0"),
        ("slurm.tasks_per_node", 0, "must be at least 1"),
        ("slurm.cpus_per_task", 0, "must be at least 1"),
        ("slurm.time_min", 0, "must be at least 1"),
        ("slurm.gpus_per_node", -1, "must be at least 0"),
        ("slurm.mem_gb", 0.0, "must be above 0"),
        ("slurm.mem_gb", -2.5, "must be above 0"),
        ("slurm.mem_gb", float("nan"), "must be above 0"),
        ("slurm.mem_gb", float("inf"), "must be above 0"),
        ("checkpoint.keep_last", 1, "must be at least 2"),
        ("checkpoint.keep_best", -1, "must be at least 0"),
        ("checkpoint.locking", "none", "is not one of flock, off"),
        ("checkpoint.writers", "rank1", "is not one of rank0, node_leaders, all; did you mean rank0?"),
        ("checkpoint.staging", "late", "is not one of eager, lazy"),
        ("checkpoint.when_busy", "queue", "is not one of wait, skip"),
        ("checkpoint.every_epochs", 0, "must be at least 1"),
        ("checkpoint.every_steps", 0, "must be at least 1"),
        ("checkpoint.every_steps", -5, "must be at least 1"),
        ("checkpoint.keep_every_epochs", 0, "must be at least 1"),
        ("checkpoint.every_minutes", 0, "must be above 0"),
        ("checkpoint.every_minutes", float("nan"), "must be above 0"),
        ("checkpoint.mode", "minimum", "is not one of min, max; did you mean min?"),
        ("requeue.lead_time_s", 0, "must be at least 1"),
        ("requeue.max_stalled", 0, "must be at least 1"),
        ("requeue.max_requeues", -1, "must be at least 0"),
        ("requeue.signal", "SIGUSR1", "is not one of USR1, USR2; did you mean USR1?"),
        ("requeue.signal", "TERM", "is not one of USR1, USR2"),
        ("requeue.lead_time_s", 3600, "is not less than slurm.time_min (60 min)"),
        ("requeue.lead_time_s", 9999, "ask for more time or a shorter lead"),
        ("resume.epoch", -1, "must be at least 0"),
        ("resume.step", -1, "must be at least 0"),
        ("resume.from", "", "write latest, best, none or the path of a checkpoint"),
        ("cluster", "slrum", "is not one of auto, slurm, local; did you mean slurm?"),
        ("seed", -1, "must be at least 0 and below 2**64"),
        ("seed", 2**64, "must be at least 0 and below 2**64"),
        ("name", "", "must be a word without a slash"),
        ("name", "a/b", "must be a word without a slash"),
        ("name", "..", "must be a word without a slash"),
        ("name", "a\nb", "contains a control character"),
        ("run_dir", "", "must be a path without %"),
        ("run_dir", "runs/%j", "must be a path without %"),
        ("run_dir", "runs/a\nb", "contains a control character"),
        ("entrypoint", "main", "is not of the form package.module:function"),
        ("entrypoint", "a.b.main", "is not of the form"),
        ("entrypoint", "a/b.py:main", "is not of the form"),
        ("entrypoint", "a.b:main()", "is not of the form"),
        ("entrypoint", "a.b:main\n", "is not of the form"),
        ("entrypoint", ".b:main", "is not of the form"),
        ("entrypoint", "a.b:", "is not of the form"),
        ("entrypoint", "a:b:c", "is not of the form"),
        ("entrypoint", "a b:c", "is not of the form"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_key(key: str, value: object, said: str) -> None:
    message = refused(key, value)
    assert message.startswith(f"{key}: ")
    assert said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint.keep_last", 2),
        ("checkpoint.keep_best", 0),
        ("requeue.max_requeues", 0),
        ("requeue.lead_time_s", 3599),
        ("slurm.mem_gb", 0.5),
        ("resume.epoch", 0),
        ("seed", 2**64 - 1),
        ("name", "größe 1.5-b"),
        ("entrypoint", "_m:f"),
        ("slurm.comment", 'it\'s "quoted"; $(touch x) `y` ✓'),
    ],
)
def test_a_value_at_the_edge_is_taken(key: str, value: object) -> None:
    parsed(key, value)


def test_a_long_lead_is_fine_where_nothing_is_requeued() -> None:
    config.parse("entrypoint: a:b\nrequeue: {enabled: false, lead_time_s: 9999}\n")


@pytest.mark.parametrize(
    ("resume", "said"),
    [
        ({"epoch": 1, "step": 2}, "resume.epoch and resume.step are both set; give one"),
        ({"from": "best", "epoch": 1}, "resume.from=best contradicts resume.epoch and resume.step; give one"),
        ({"from": "none", "step": 1}, "resume.from=none contradicts"),
        ({"from": "a.pt", "epoch": 0}, "resume.from=a.pt contradicts"),
    ],
)
def test_two_places_to_go_on_from_contradict_each_other(resume: dict[str, object], said: str) -> None:
    assert refused("resume", resume).startswith(said)


TEXTS = [name for name, hint in SlurmConfig.__annotations__.items() if hint == (str | None)]
CONTROL = ["\n", "\r", "\x00", "\t", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029"]


def test_every_text_of_the_slurm_section_is_in_the_table() -> None:
    assert {"partition", "comment", "python", "mail_user", "reservation"} <= set(TEXTS)


@pytest.mark.parametrize("key", TEXTS)
def test_no_text_of_the_slurm_section_may_become_a_line_of_the_script(key: str) -> None:
    assert refused(f"slurm.{key}", "a\n#SBATCH --wrap=id").startswith(f"slurm.{key}: 'a\\n#SBATCH --wrap=id' contains a control character")


@pytest.mark.parametrize("character", CONTROL, ids=ascii)
def test_no_control_character_reaches_the_script(character: str) -> None:
    for key, value, place in [
        ("slurm.comment", f"a{character}b", "slurm.comment"),
        ("slurm.setup", ["true", f"a{character}b"], "slurm.setup[1]"),
        ("slurm.extra", {"switches": f"a{character}b"}, "slurm.extra.switches"),
        ("slurm.extra", {f"a{character}b": 1}, "slurm.extra.a"),
    ]:
        message = refused(key, value)
        assert message.startswith(place)
        assert "contains a control character" in message
        assert character not in message


@pytest.mark.parametrize(
    ("option", "owner"),
    [
        ("signal", "requeue.signal and requeue.lead_time_s"),
        ("requeue", "requeue.enabled"),
        ("no-requeue", "requeue.enabled"),
        ("no_requeue", "requeue.enabled"),
        ("open-mode", "nothing: logs always append"),
        ("open_mode", "nothing: logs always append"),
        ("output", "nothing: logs are in <run_dir>/logs"),
        ("error", "nothing: logs are in <run_dir>/logs"),
        ("array", "--sweep; without it a run is one job"),
        ("job-name", "name"),
        ("nodes", "slurm.nodes"),
        ("ntasks", "slurm.nodes and slurm.tasks_per_node"),
        ("ntasks_per_node", "slurm.tasks_per_node"),
        ("gpus_per_node", "slurm.gpus_per_node"),
        ("cpus-per-task", "slurm.cpus_per_task"),
        ("mem", "slurm.mem_gb"),
        ("time", "slurm.time_min"),
        ("partition", "slurm.partition"),
        ("mail-type", "slurm.mail_type"),
        ("parsable", "nothing: the job id is read"),
        ("quiet", "nothing: the job id is read"),
        ("sig", "requeue.signal"),
        ("no-req", "requeue.enabled"),
        ("tim", "slurm.time_min"),
    ],
)
def test_an_option_that_another_key_sets_is_refused_also_where_sbatch_takes_its_beginning(option: str, owner: str) -> None:
    assert refused("slurm.extra", {option: "1"}).startswith(f"slurm.extra.{option}: is set by {owner}")


@pytest.mark.parametrize("option", ["gpus", "switches", "exclusive", "nodelist", "gpus-per-task", "time-min", "mem-per-cpu", "gpu-bind"])
def test_an_option_that_nothing_else_sets_is_taken(option: str) -> None:
    assert parsed("slurm.extra", {option: "1"}).slurm.extra == {option: "1"}


@pytest.mark.parametrize("option", ["--switches", "-J", "J", "a b", "a=b", "", "a;b", "switches ", "ünïcode"])
def test_what_is_no_long_option_is_refused(option: str) -> None:
    assert "is no long option of sbatch; write it without the dashes" in refused("slurm.extra", {option: "1"})


@pytest.mark.parametrize("value", [None, False, [1], {"a": 1}], ids=repr)
def test_what_is_no_value_of_an_option_is_refused(value: object) -> None:
    assert refused("slurm.extra", {"exclusive": value}).startswith(f"slurm.extra.exclusive: {value!r} is no option's value; write text")


@pytest.mark.parametrize("value", [True, 0, 1.5, "", "user"], ids=repr)
def test_text_numbers_and_true_are_values_of_an_option(value: object) -> None:
    assert parsed("slurm.extra", {"exclusive": value}).slurm.extra == {"exclusive": value}


def test_a_monitor_without_a_best_one_to_keep_is_refused() -> None:
    assert refused("checkpoint", {"monitor": "loss", "keep_best": 0}).startswith("checkpoint.keep_best: 0 would delete")


def test_a_part_of_the_weights_is_no_place_to_go_on_from() -> None:
    assert refused("resume", {"strict": False}).startswith("resume.strict=false goes with resume.weights_only=true")
