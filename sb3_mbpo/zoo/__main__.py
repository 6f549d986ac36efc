"""``python -m sb3_mbpo.zoo train ...``: a script of RL Zoo with MBPO registered, independent of the start-up files."""

import argparse
import importlib.util
import runpy
import sys

# Those with --algo, but for record_training: it starts further interpreters, which only the start-up files can reach
SCRIPTS = ("train", "enjoy", "record_video", "load_from_hub", "push_to_hub")


def main() -> None:
    """Run the script of RL Zoo that the first command line argument names."""
    parser = argparse.ArgumentParser(
        prog="python -m sb3_mbpo.zoo",
        usage="%(prog)s script [arguments of the script]",
        description="Run a script of RL Zoo (rl_zoo3) that knows the algorithms mbpo and dhmbpo.",
        epilog="example: python -m sb3_mbpo.zoo train --algo mbpo --env Hopper-v5",
    )
    parser.add_argument("script", choices=SCRIPTS, help=", ".join(SCRIPTS), metavar="script")
    script = parser.parse_args(sys.argv[1:2]).script
    if importlib.util.find_spec("rl_zoo3") is None:
        parser.exit(1, 'RL Zoo is not installed, please install it with: pip install "sb3-mbpo[zoo]"\n')

    from sb3_mbpo.zoo.registration import register

    register()
    del sys.argv[1]
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
