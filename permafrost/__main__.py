"""Run the `permafrost` command as `python -m permafrost`."""

from permafrost.launcher.cli import program

if __name__ == "__main__":
    program()
