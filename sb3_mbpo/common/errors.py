"""What can go wrong in a way of its own. Whatever else is wrong with arguments or data is a plain ``ValueError``."""


class UnsupportedSpaceError(ValueError, AssertionError):
    """A space that the model cannot work with. (SB3 itself raises an ``AssertionError`` here.)"""


class DivergenceError(ValueError):
    """Weights or losses that are not finite any more. (RL Zoo prunes a trial at a ``ValueError``.)"""
