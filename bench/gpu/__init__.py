"""The GPU suite: ``python -m bench.gpu --out DIR`` on a machine with a GPU, torch, triton and this checkout.

Installs the checkout, runs the test matrix on the GPU, then measures every registered operator against its peers and
writes ``results.json``, ``results.md`` and the logs. Operators take turns, each with its most telling case first, so
that a run which stops at its deadline has something of all. ``--rehearse`` goes the same way on a CPU, with tiny shapes
and Triton's interpreter.

An operator is a module with

* ``cases(rehearse=)``: the work, most telling first; each a dataclass with a ``name`` and ``floor_bytes``, the bytes
  that any implementation moves, or None where traffic is not the floor;
* ``Inputs(case, device)``: its tensors, with ``release()``, which drops what a step leaves behind;
* ``competitors(case, inputs)``: steps by name, kdfast first; a text in the place of a step says why there is none.
  Names that begin with "bare" are floors, not peers;
* ``gradient_errors(case, device)``: largest error of the gradient over its largest element, against fp64, of
  ``kdfast`` and ``eager``; empty where a case is not checked.
"""
