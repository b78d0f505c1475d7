"""The command line: `basin-lens`, one module per group of commands."""
