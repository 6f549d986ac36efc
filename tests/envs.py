"""Small environments whose every number is known."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CountingEnv(gym.Env):
    """
    The observation counts the steps of the episode, the reward is the first action and a little noise: what is known
    exactly, a model improves on for thousands of epochs.

    :param episode_length: After how many steps the episode ends
    :param truncate: Whether it is truncated then, else terminated
    :param noise: Of the reward
    """

    def __init__(
        self,
        obs_shape=(2,),
        action_dim=1,
        episode_length=10,
        truncate=False,
        low=-1.0,
        high=1.0,
        dtype=np.float32,
        noise=0.1,
    ):
        self.observation_space = spaces.Box(-np.inf, np.inf, obs_shape, dtype)
        self.action_space = spaces.Box(low, high, (action_dim,), np.float32)
        self.episode_length, self.truncate, self.noise = episode_length, truncate, noise
        self.count = 0

    def _obs(self):
        return np.full(self.observation_space.shape, self.count, self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        over = self.count >= self.episode_length
        reward = float(action[0]) + self.noise * self.np_random.normal()
        return self._obs(), reward, over and not self.truncate, over and self.truncate, {}


class FaultyEnv(CountingEnv):
    """
    Returns ``value`` in its observation or its reward at step ``at_step`` of its life.
    """

    def __init__(self, where, value, at_step):
        super().__init__()
        self.where, self.value, self.at_step, self.steps = where, value, at_step, 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == self.at_step:
            if self.where == "observation":
                obs[1] = self.value
            else:
                reward = self.value
        return obs, reward, terminated, truncated, info


class PointEnv(gym.Env):
    """
    A point on a line is to be moved to the origin: x' = x + action / 2, reward -|x'|, 20 steps from |x| up to 3. Beyond
    |x| > 4 the episode is over, at a price.

    :param price: That price
    """

    def __init__(self, price=20):
        self.price = price
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-3, 3), 0
        return np.array([self.x], dtype=np.float32), {}

    def step(self, action):
        self.x += float(action[0]) / 2
        self.steps += 1
        terminated = abs(self.x) > 4
        reward = -abs(self.x) - self.price * terminated
        return np.array([self.x], dtype=np.float32), reward, terminated, self.steps == 20, {}

    @staticmethod
    def best_return(x):
        """Return of the best policy from a start at ``x``: half a unit at each step, then rest."""
        return -sum(max(abs(x) - 0.5 * step, 0) for step in range(1, 21))


class UnpredictableEnv(PointEnv):
    """What is observed, and what is paid, has nothing to do with what is done."""

    def __init__(self, with_clock=False):
        super().__init__(price=0)
        self.clock = 1.7e9 if with_clock else None
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def observed(self):
        if self.clock is None:
            return self.np_random.normal(0, 1, 2)
        return np.array([float(self.x), self.clock])

    def reset(self, **kwargs):
        _, info = super().reset(**kwargs)
        return self.observed(), info

    def step(self, action):
        _, reward, *others = super().step(action)
        if self.clock is not None:
            self.clock += 60
            return self.observed(), reward, *others
        return self.observed(), float(self.np_random.normal()), *others


class GoalEnv(gym.Env):
    """
    A point in the plane is to be moved to a goal: p' = p + action / 4, reward 0 within 0.2 of the goal and -1 elsewhere.

    :param episode_length: After how many steps the episode is truncated
    :param terminate: Whether it ends at the goal
    :param needs_info: Whether `compute_reward` takes the price of a step out of `info`
    """

    def __init__(self, episode_length=10, terminate=False, needs_info=False):
        def box():
            return spaces.Box(-np.inf, np.inf, (2,), np.float64)

        self.observation_space = spaces.Dict(
            achieved_goal=box(), desired_goal=box(), observation=spaces.Box(-np.inf, np.inf, (3, 1), np.float32)
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.episode_length, self.terminate, self.needs_info = episode_length, terminate, needs_info

    def _obs(self):
        return {
            # Not in the order of the space
            "observation": np.append(self.point, self.point.sum())[:, None].astype(np.float32),
            "desired_goal": self.goal.copy(),
            "achieved_goal": self.point.copy(),
        }

    def compute_reward(self, achieved_goal, desired_goal, info):
        price = np.array([each["price"] for each in info]) if self.needs_info and not isinstance(info, dict) else 1.0
        return -price * (np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.goal, self.steps = self.np_random.uniform(-1, 1, 2), self.np_random.uniform(-1, 1, 2), 0
        return self._obs(), {}

    def step(self, action):
        self.point = self.point + np.asarray(action, dtype=np.float64) / 4
        self.steps += 1
        reward = float(self.compute_reward(self.point, self.goal, {}))
        return self._obs(), reward, self.terminate and reward == 0, self.steps >= self.episode_length, {"price": 1.0}
