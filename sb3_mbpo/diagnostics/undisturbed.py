"""Measuring an agent without changing what it is going to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch as th

if TYPE_CHECKING:
    from sb3_mbpo.mbpo import MBPO


@contextmanager
def undisturbed(agent: "MBPO") -> Iterator[None]:
    """
    What is drawn inside (torch's random numbers, gSDE's exploration matrices), a training outside does not notice.

    :param agent: Who is measured
    """
    exploration = vars(agent.actor.action_dist).copy()
    with th.random.fork_rng(devices=[agent.device] if agent.device.type == "cuda" else []):
        try:
            yield
        finally:
            vars(agent.actor.action_dist).update(exploration)
