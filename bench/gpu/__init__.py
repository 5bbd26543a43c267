"""The GPU suite: ``python -m bench.gpu --out DIR`` on a machine with a GPU, torch, triton and this checkout.

Installs the checkout, runs the test matrix on the GPU, then measures every registered operator against its peers and
writes ``results.json``, ``results.md`` and the logs. ``--rehearse`` goes the same way on a CPU, with tiny shapes and
Triton's interpreter.
"""
