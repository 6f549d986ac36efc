"""
Everything that RL Zoo (``rl_zoo3``) needs in order to know MBPO.

RL Zoo has no plugin mechanism, so ``sb3_mbpo.pth`` and ``sb3_mbpo.start``, the two start-up files beside this one,
are installed into the root of ``site-packages``: through them every interpreter calls ``startup.install``, which
registers MBPO as soon as, and only if, RL Zoo is imported. ``python -m sb3_mbpo.zoo train ...`` does without them.
"""
