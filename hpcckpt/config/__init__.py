"""The configuration: a typed schema, one loader, and checks that answer a slip with the key that was meant."""

from hpcckpt.config.loader import check, dump, find_file, load, of_script, parse, resolve
from hpcckpt.config.schema import CheckpointConfig, RequeueConfig, ResumeConfig, RunConfig, SlurmConfig, all_keys

__all__ = [
    "CheckpointConfig",
    "RequeueConfig",
    "ResumeConfig",
    "RunConfig",
    "SlurmConfig",
    "all_keys",
    "check",
    "dump",
    "find_file",
    "load",
    "of_script",
    "parse",
    "resolve",
]
