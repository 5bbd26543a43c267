"""`python -m kdfast` is the `kdfast` command."""

from kdfast.cli import main

main()
