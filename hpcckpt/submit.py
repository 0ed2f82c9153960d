"""`python -m hpcckpt.submit conf=exp.yaml [key=value …]`: start a run, on Slurm or on this machine."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcckpt.exits import EXIT_INTERRUPTED, EXIT_OK, EXIT_RUN_FAILED, exit_code

if TYPE_CHECKING:
    from hpcckpt.launch import Submitted

_EPILOG = """\
conf= is a path, or a bare name in conf/. Everything else is key=value over that file, as in
  python -m hpcckpt.submit conf=digits args.lr=0.05 slurm.nodes=2 slurm.partition=gpu

several:    --sweep args.lr=0.1,0.01 --sweep args.seed=1,2 starts the four runs, as one array of Slurm

going on:   the same command again goes on from the newest checkpoint
            resume.epoch=5 goes on after epoch 5; resume.step=…; resume.from=latest|best|none|PATH

exit codes: 0 submitted (on this machine: finished), 1 the run failed, 2 bad input, 3 Slurm refused,
            130 Ctrl-C while watching (the run goes on)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit; returns the exit code. Prints one line on stderr, never a traceback, for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m hpcckpt.submit",
        description="Start a run described by a configuration file, on Slurm or on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="conf=FILE and overrides of its keys")
    parser.add_argument(
        "--sweep", nargs="+", action="extend", default=[], metavar="key=value,value", help="several runs: all combinations of these values"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and submit nothing")
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and submit nothing")
    options = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    return exit_code(lambda: _submit(options), "submission", "submit again")


def _submit(options: argparse.Namespace) -> int:
    from hpcckpt import config, launch
    from hpcckpt.errors import ConfigError

    # `--sweep` takes what follows it, the file as well.
    given = [*options.settings, *(setting for setting in options.sweep if setting.startswith("conf="))]
    files = [setting.removeprefix("conf=") for setting in given if setting.startswith("conf=")]
    if len(files) != 1 or not files[0]:
        raise ConfigError("give one configuration as conf=FILE, as in `python -m hpcckpt.submit conf=exp.yaml`")
    path = config.find_file(files[0], Path("conf"))
    settings, sweeps = ([setting for setting in of_kind if not setting.startswith("conf=")] for of_kind in (given, options.sweep))
    points = launch.expand(lambda overrides: config.load(path, overrides), settings, sweeps)
    if options.print_config:
        print("---\n".join(config.dump(point.merged) for point in points), end="")
        return EXIT_OK
    if options.dry_run:
        print(launch.batch_script([config.resolve(point.merged, str(path)) for point in points], str(path)), end="")
        return EXIT_OK
    runs = launch.check(points, str(path))
    for warning in dict.fromkeys(run.warning for run in runs if run.warning is not None):
        print(f"hpcckpt: {warning}", file=sys.stderr)
    if launch.choose_cluster(runs[0].config) == "slurm":
        launch.start(runs, _announce)
        return EXIT_OK
    code = EXIT_OK
    for run in runs:
        (job,) = launch.start([run], lambda jobs: _announce(jobs, is_sweep=len(runs) > 1))
        code = max(code, _watch(job))
        if code == EXIT_INTERRUPTED:
            break
    return code


def _announce(jobs: "Sequence[Submitted]", *, is_sweep: bool = False) -> None:
    """Print the job's id; of a sweep also each point's, and where it runs."""
    lines = [f"{job.job_id} {job.layout.root}" for job in jobs] if is_sweep or len(jobs) > 1 else []
    print("\n".join([jobs[0].job_id.partition("_")[0], *lines]), flush=True)


def _watch(job: "Submitted") -> int:
    from hpcckpt import launch
    from hpcckpt.signals import interrupt_raises

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        with interrupt_raises():
            ending, why = launch.follow(job, show)
    except (KeyboardInterrupt, BrokenPipeError):
        job_id, log = launch.newest_log(job)
        print(
            f"\nhpcckpt: no longer watching; job {job_id} goes on. To watch again: tail -f {log}; to end it: {launch.how_to_end(job)}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    if ending == "finished":
        return EXIT_OK
    _, log = launch.newest_log(job)
    print(f"hpcckpt: the run did not finish: {why}; see {log} and the logs of the other ranks beside it", file=sys.stderr)
    return EXIT_RUN_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
