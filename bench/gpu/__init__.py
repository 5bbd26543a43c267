"""The GPU suite: ``python -m bench.gpu --out DIR`` on a machine with a GPU, torch, triton and this checkout.

Installs the checkout, and goes through phases until the deadline: a report of compilation; a smoke set, under
compute-sanitizer where that is installed; the most telling case of every operator; the tests, within a hard limit;
profiles of three kernels, where ncu is; all other cases, in turns. Each case has a process and a time limit of its own
(``jobs.py``, ``worker.py``), and what it found lies in ``REPORT.md`` and ``results.json`` before the next begins.
``--autotune`` searches tiles instead. ``--rehearse`` goes the same way on a CPU, with tiny shapes and Triton's
interpreter.

An operator is a module with

* ``cases(rehearse=)``: the work, most telling first; each a dataclass with a ``name`` and ``floor_bytes``, the bytes
  that any implementation moves, or None where traffic is not the floor;
* ``Inputs(case, device)``: its tensors, with ``release()``, which drops what a step leaves behind;
* ``competitors(case, inputs)``: steps by name, kdfast first; a text in the place of a step says why there is none.
  Names that begin with "bare" are floors, not peers;
* ``gradient_errors(case, device)``: the element of the gradient that lies farthest from fp64 (``errors.worst``), of
  ``kdfast`` and ``eager``;
* ``tolerance(case)``: how far it may.
"""
