import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The networks of the tests are small: more threads only wait for each other, and sums depend on their number."""
    th.set_num_threads(1)
