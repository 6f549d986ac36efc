"""
What is claimed of MBPO, measured again: ``python -m benchmarks run`` trains, ``report`` draws, ``benchmarks.speed``
times, ``benchmarks.model`` measures the model alone, and ways to train it.

``suites`` says which tasks and algorithms, ``training`` is one run from its start or its checkpoint to its end, ``engines`` is
where runs are made (processes of this machine, or a Ray cluster), ``results`` is the table of evaluations, ``report`` what is
made of it.
"""
