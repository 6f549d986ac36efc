"""Compiling a function of tensors to one graph with ``torch.compile``, and calling it."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch as th

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")

# Graphs of one function in one process: each size of networks and batches has its own. torch alone gives up after 8.
MAX_GRAPHS = 256


@functools.cache
def compiled(function: Function, device_type: str) -> Function:
    """
    :param function: Of tensors, and of modules and named tuples with tensors in them
    :param device_type: Where the tensors will be, "cpu" for instance
    :return: The same function, which is compiled when it is first called with arguments of new shapes. That takes 10 to
        30 s and a compiler, or some seconds if torch finds the graph in its cache on disk. Call it by :func:`call_each`.
    """
    # The code between the kernels in C++ too: 5 % faster. On a GPU this would need the CUDA toolkit.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True} if device_type == "cpu" else {}
    return th.compile(function, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]


def call_each(function: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> list[Result]:
    """
    Call a compiled function several times. Whether its graph fits the arguments is checked the first time only, which
    makes updates 5 % faster.

    :param function: What :func:`compiled` returned (or any other)
    :param arguments: Of each call; all of the same shapes and types
    :return: What it returned each time
    """
    results = []
    calls = iter(arguments)
    for first in calls:
        with th._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            results.append(function(*first))
        break
    with th.compiler.set_stance(skip_guard_eval_unsafe=True):
        results.extend(function(*others) for others in calls)
    return results


def why_not(attempt: Callable[[], None]) -> str | None:
    """
    :param attempt: Calls a compiled function
    :return: Why torch cannot compile it here (no C++ compiler, for instance), None if it can
    """
    # torch takes its time to import this, so not before it is needed
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings():
            # About torch's own use of torch, on its first compilation
            warnings.simplefilter("ignore", DeprecationWarning)
            attempt()
    except TorchDynamoException as error:
        return f"torch.compile failed: {str(error).splitlines()[0]}"
    return None
