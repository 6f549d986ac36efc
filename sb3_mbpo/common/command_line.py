"""What the commands of the package and of its benchmarks have in common."""

import argparse
from collections.abc import Callable


def at_least(minimum: int) -> Callable[[str], int]:
    """
    :param minimum: Of an argument
    :return: That reads it, and raises ``argparse.ArgumentTypeError`` if it is below
    """

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, not {text}")
        return int(text)

    return number
