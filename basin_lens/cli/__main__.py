"""`python -m basin_lens.cli`."""

from basin_lens.cli.main import main

main()
