"""Measuring an agent without changing what it is going to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch as th

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC


@contextmanager
def same_exploration(agent: "ModelBasedSAC") -> Iterator[None]:
    """
    What gSDE explores with afterwards is what it explored with before.

    :param agent: Who acts inside
    """
    exploration = vars(agent.actor.action_dist).copy()
    try:
        yield
    finally:
        vars(agent.actor.action_dist).update(exploration)


@contextmanager
def undisturbed(agent: "ModelBasedSAC") -> Iterator[None]:
    """
    What is drawn inside (torch's random numbers, gSDE's exploration matrices), a training outside does not notice.

    :param agent: Who is measured
    """
    devices = [agent.device] if agent.device.type == "cuda" else []
    with th.random.fork_rng(devices=devices), same_exploration(agent):
        yield
