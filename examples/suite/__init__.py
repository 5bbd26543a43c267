"""Every method on the same students, seeds and batches, against labels alone: ``python -m examples.suite``."""
