"""`permafrost doctor`: report what is here and what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import parse
from permafrost.launcher.doctor import can_run_quickstart, diagnose, format_report
from permafrost.launcher.exit_codes import DONE, FAILED


def run(argv: Sequence[str]) -> int:
    """Print the report; returns 0 if the quickstart could run here, else 1."""
    description = (
        "Show versions, devices and what is missing. The exit code is 0 if the quickstart can run here, else 1."
    )
    parse(argparse.ArgumentParser(prog="permafrost doctor", description=description), argv)
    report = diagnose()
    print(format_report(report))
    return DONE if can_run_quickstart(report) else FAILED
