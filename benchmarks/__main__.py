"""``python -m benchmarks run``: train what is missing. ``python -m benchmarks report``: curves and tables of what there is."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rl_zoo3.utils import StoreDict

from benchmarks import engines, report, suites
from benchmarks.results import read_all
from sb3_mbpo.common.command_line import at_least

RESULTS = Path(__file__).parent / "results"


class Hyperparams(StoreDict):
    """RL Zoo's, with an error of the command line where its evaluation ends in one of Python."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """:raises argparse.ArgumentError: for what is no ``KEY:VALUE`` with a Python value"""
        try:
            super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]
        except Exception as error:
            example = "tau:0.01 or \"rollout_schedule:'auto'\""
            message = f"{' '.join(values)}: must be KEY:VALUE with values in Python, such as {example} ({error})"
            raise argparse.ArgumentError(self, message) from error


def parser() -> argparse.ArgumentParser:
    """
    :return: Of the command line
    """
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "run",
        help="train, evaluate every 1,000 steps, go on where a run was interrupted",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--suite", choices=suites.SUITES, default="paper", help="tasks and their numbers of steps")
    train.add_argument("--envs", nargs="+", help="tasks of the suite (default: all)")
    train.add_argument("--algos", nargs="+", default=["mbpo", "sac"], help=f"of RL Zoo, or {', '.join(suites.VARIANTS)}")
    train.add_argument(
        "--hyperparams",
        nargs="+",
        action=Hyperparams,
        metavar="KEY:VALUE",
        help="what to change of the zoo's for one algorithm, as of `rl_zoo3.train`; together with --label",
    )
    train.add_argument("--label", help="name of the changed algorithm in tables and figures")
    train.add_argument("--seeds", nargs="+", type=int, default=[0])
    train.add_argument("--steps", type=at_least(1), help="environment steps of each run (default: the suite's)")
    train.add_argument("--eval-every", type=at_least(1), default=1_000, help="environment steps between two evaluations")
    train.add_argument("--jobs", type=at_least(1), default=1, help="runs at the same time (engine local)")
    train.add_argument("--threads", type=at_least(1), default=max(1, (os.cpu_count() or 1) // 2), help="threads of each run")
    train.add_argument("--engine", choices=["local", "ray"], default="local", help="processes of this machine, or Ray")
    train.add_argument("--address", help="of the Ray cluster (default: one is started here)")
    train.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables of evaluations")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints and logs")
    draw = commands.add_parser(
        "report", help="learning curves and tables", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    draw.add_argument("--results", type=Path, default=RESULTS, help="folder with the tables of evaluations")
    draw.add_argument("--reference", type=Path, help="folder with published mean curves, drawn beside ours")
    draw.add_argument("--out", type=Path, default=Path("report"), help="folder for PNG, SVG and Markdown")
    return result


def run(args: argparse.Namespace, command_line: argparse.ArgumentParser) -> int:
    """
    :param args: Of ``run``
    :param command_line: That they come from
    :return: Exit code: whether a run failed
    """
    try:
        runs = suites.runs(
            args.suite,
            args.envs,
            suites.algorithms(args.algos, args.label, args.hyperparams),
            args.seeds,
            args.steps,
            args.eval_every,
            args.threads,
            args.runs,
            args.results,
        )
    except ValueError as error:
        command_line.error(str(error))
    missing = [run for run in runs if not run.is_finished]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished in {args.results}", flush=True)
    results = engines.local(missing, args.jobs) if args.engine == "local" else engines.ray(missing, args.address)
    failures = {run.name: reason for run, reason in zip(missing, results, strict=True) if reason is not None}
    for name, reason in failures.items():
        print(f"{name} failed:\n{reason}", file=sys.stderr)
    return 1 if failures else 0


def main() -> None:
    """Command line."""
    command_line = parser()
    args = command_line.parse_args()
    if args.command == "run":
        sys.exit(run(args, command_line))
    if args.reference is not None and not args.reference.is_dir():
        command_line.error(f"There is no folder {args.reference}")
    try:
        table = read_all(args.results)
    except FileNotFoundError as error:
        command_line.error(str(error))
    for file in report.write(table, args.out, args.reference):
        print(file)


if __name__ == "__main__":
    main()
