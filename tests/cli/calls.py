"""The command line, called in a process of this one's."""

import sys

from basin_lens.cli import app as cli


def call(*arguments: str, capsys=None) -> tuple[int, str, str]:
    sys.argv = ["basin-lens", *arguments]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err
