"""The states from which DHMBPO's training rollouts start."""

import torch as th


class StateBuffer:
    """
    The newest states, in a ring.

    :param capacity: Most states
    :param obs_dim: Size of a flat observation
    :param device: Where they are
    """

    def __init__(self, capacity: int, obs_dim: int, device: th.device) -> None:
        self.states = th.zeros(capacity, obs_dim, device=device)
        self.position, self.n = 0, 0

    def size(self) -> int:
        """
        :return: How many states there are
        """
        return self.n

    def extend(self, states: th.Tensor) -> None:
        """
        :param states: ``(n, obs_dim)``; of more than fit, the last ones are kept
        """
        capacity = len(self.states)
        states = states[-capacity:]
        rows = (self.position + th.arange(len(states), device=states.device)) % capacity
        self.states[rows] = states
        self.position = (self.position + len(states)) % capacity
        self.n = min(self.n + len(states), capacity)

    def sample(self, n: int) -> th.Tensor:
        """
        :param n: How many
        :return: States drawn with replacement, ``(n, obs_dim)``
        """
        return self.states[th.randint(self.n, (n,), device=self.states.device)]
