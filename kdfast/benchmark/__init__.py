"""Benchmarks of the dense loss: what `kdfast bench` and the tests in bench/ measure, and how.

:mod:`~kdfast.benchmark.cases` declares the shapes, :mod:`~kdfast.benchmark.competitors` what is measured on them; each
once. :mod:`~kdfast.benchmark.measure` times all competitors of a case interleaved, :mod:`~kdfast.benchmark.results` is
the JSON, :mod:`~kdfast.benchmark.compare` the gate over its ratios.
"""
