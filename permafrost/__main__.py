"""`python -m permafrost` is the `permafrost` command."""

from permafrost.launcher.cli import program

if __name__ == "__main__":
    program()
