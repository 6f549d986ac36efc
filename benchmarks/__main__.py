"""``python -m benchmarks run``: train what is missing. ``python -m benchmarks report``: curves and tables of what there is."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import engines, suites

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """
    :return: Of the command line
    """
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="train, evaluate every 1,000 steps, go on where a run was interrupted",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("--suite", choices=suites.SUITES, default="paper", help="tasks and their numbers of steps")
    run.add_argument("--envs", nargs="+", help="tasks of the suite (default: all)")
    run.add_argument("--algos", nargs="+", default=["mbpo", "sac"], help=f"of RL Zoo, or {', '.join(suites.VARIANTS)}")
    run.add_argument("--seeds", nargs="+", type=int, default=[0])
    run.add_argument("--steps", type=int, help="environment steps of each run (default: the suite's)")
    run.add_argument("--eval-every", type=int, default=1_000, help="environment steps between two evaluations")
    run.add_argument("--jobs", type=int, default=1, help="runs at the same time (engine local)")
    run.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="threads of each run")
    run.add_argument("--engine", choices=["local", "ray"], default="local", help="processes of this machine, or Ray")
    run.add_argument("--address", help="of the Ray cluster (default: one is started here)")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables of evaluations")
    run.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints and logs")
    return result


def main() -> None:
    """Command line."""
    command_line = parser()
    args = command_line.parse_args()
    try:
        runs = suites.runs(
            args.suite, args.envs, args.algos, args.seeds, args.steps, args.eval_every, args.threads, args.runs, args.results
        )
    except ValueError as error:
        command_line.error(str(error))
    missing = [run for run in runs if not run.is_finished]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    results = engines.local(missing, args.jobs) if args.engine == "local" else engines.ray(missing, args.address)
    failures = {run.name: reason for run, reason in zip(missing, results, strict=True) if reason is not None}
    for name, reason in failures.items():
        print(f"{name} failed:\n{reason}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
