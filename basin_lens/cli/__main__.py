"""`python -m basin_lens.cli`."""

from basin_lens.cli.app import main

main()
