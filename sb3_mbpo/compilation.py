"""Compiling a function of tensors to one graph with ``torch.compile``."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

Function = TypeVar("Function", bound=Callable[..., Any])

# Graphs of one function in one process: each size of networks and batches has its own. torch gives up after 8.
MAX_GRAPHS = 256


@functools.cache
def compiled(function: Function) -> Function:
    """
    :param function: Of tensors, and of modules and named tuples with tensors in them
    :return: The same function, which is compiled when it is first called with arguments of new shapes. That takes 10 to
        30 s and a C++ compiler, or some seconds if torch finds the graph in its cache on disk
    """
    graph = th.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with th._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return graph(*args)

    return call  # type: ignore[return-value]


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
