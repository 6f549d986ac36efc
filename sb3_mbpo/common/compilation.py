"""Compiling functions of tensors to one graph each with ``torch.compile``, and deciding whether it is worth it."""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_mbpo.dynamics.training import train_step, try_step

if TYPE_CHECKING:
    from sb3_mbpo.common.model_based import ModelBasedSAC

Function = TypeVar("Function", bound=Callable[..., Any])

# Graphs of one function in one process: each size of networks and batches has its own. torch gives up after 8.
MAX_GRAPHS = 256


@functools.cache
def compiled(function: Function, device_type: str) -> Function:
    """
    :param function: Of tensors, and of modules and named tuples with tensors in them
    :param device_type: Where the tensors will be, "cpu" for instance
    :return: The same function, which is compiled when it is called with arguments of new shapes, other types, or with
        another number of threads. That takes 10 to 30 s and a compiler, or some seconds if torch finds the graph in its cache
        on disk.
    """
    th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, MAX_GRAPHS)
    # The code between the kernels in C++ too: 5 % faster. On a GPU this would need the CUDA toolkit.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True} if device_type == "cpu" else {}
    return th.compile(function, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]


def why_not(attempt: Callable[[], None]) -> str | None:
    """
    :param attempt: Calls a compiled function
    :return: Why torch cannot compile it here (no C++ compiler, for instance), None if it can
    """
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(switch) == "1":
            return f"{switch} is set"
    if threading.current_thread() is not threading.main_thread():
        return "torch.compile does not work in threads"
    try:
        with warnings.catch_warnings():
            # About torch's own use of torch, on its first compilation
            warnings.simplefilter("ignore", DeprecationWarning)
            attempt()
    # Whatever stops the compiler (a missing header, a full disk, a version of Python): the uncompiled way does not need it
    except Exception as error:
        return f"torch.compile failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def planned_steps(agent: "ModelBasedSAC", total_timesteps: int) -> int:
    """
    :param agent: Before or amid training
    :param total_timesteps: At which ``num_timesteps`` training ends
    :return: How many environment steps there will be until then: whole rollouts of ``train_freq`` steps. How long one of
        episodes is, is not known
    """
    assert isinstance(agent.train_freq, TrainFreq)
    is_in_steps = agent.train_freq.unit is TrainFrequencyUnit.STEP
    at_once = agent.n_envs * (agent.train_freq.frequency if is_in_steps else 1)
    return -(-max(total_timesteps - agent.num_timesteps, 0) // at_once) * at_once


def planned_updates(agent: "ModelBasedSAC", steps: int) -> float:
    """
    :param agent: Before or amid training
    :param steps: Environment steps that are to come
    :return: How many gradient updates there will be; where it depends on the length of episodes, one for each step
    """
    warm_up = max(agent.learning_starts - agent.lifetime_timesteps, 0)
    return max(steps - warm_up, 0) * updates_per_step(agent)


def updates_per_step(agent: "ModelBasedSAC") -> float:
    """
    :param agent: Any
    :return: Gradient updates for each environment step; 1 where it depends on the length of episodes
    """
    assert isinstance(agent.train_freq, TrainFreq)
    if agent.gradient_steps < 0 or agent.train_freq.unit is TrainFrequencyUnit.EPISODE:
        # How long episodes are is not known
        return 1.0
    return agent.gradient_steps / (agent.train_freq.frequency * agent.n_envs)


def compile_all(agent: "ModelBasedSAC", n_updates: float) -> dict[str, str | None]:
    """
    Compile now what will be used compiled: what cannot be done shows early.

    :param agent: Whose argument ``compile`` says whether; not changed
    :param n_updates: That are planned
    :return: For "updates", and for "model" if the agent uses one: why it is not compiled, None if it is
    """
    reason = None
    if not agent.compile:
        reason = "`compile` is False"
    elif agent.compile == "auto" and n_updates < agent.min_updates_to_compile:
        reason = f"{n_updates:,.0f} updates would not repay compiling, {agent.min_updates_to_compile:,} would"
    if reason is None and agent.verbose >= 1:
        # Nothing else is printed meanwhile
        print("Compiling: up to two minutes, some seconds if this was done here before. `compile=False` leaves it out.")
    reasons = {"updates": reason or agent.why_not_compiled() or why_not(agent.try_updates)}
    if agent.uses_model:
        reasons["model"] = reason or why_not(lambda: try_step(agent.dynamics, compiled(train_step, agent.device.type)))
    return reasons


def report_compilation(agent: "ModelBasedSAC", reasons: dict[str, str | None]) -> None:
    """
    Print what is compiled if the agent is verbose, and warn if the user asked for more.

    :param agent: About to learn, called from what ``learn()`` calls
    :param reasons: From :func:`compile_all`
    """
    names = {"updates": "gradient updates", "model": "model training"}
    for reason in dict.fromkeys(reasons.values()):
        which = " and ".join(names[what] for what in reasons if reasons[what] == reason)
        if reason is None:
            message = f"Compiled: {which}, in {agent.seconds['compile']:.0f} s"
        else:
            which = which.replace(names["updates"], names["updates"] + agent.instead_of_compiled)
            message = f"Not compiled: {which}, because {reason}"
            if agent.compile is True:
                warnings.warn(message, stacklevel=5)
                continue
        if agent.verbose >= 1:
            print(message)
