"""The variables that reach other nodes, and the way they go."""

from __future__ import annotations

import os

import pytest

from permafrost.launcher.cluster.environment import forwarded, shell_exports
from permafrost.launcher.cluster.rank_main import decode, encode
from permafrost.launcher.errors import LaunchError


def test_what_is_forwarded() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "HOME": "/root",
        "RANK": "3",
        "PERMAFROST_CACHE": "/c",
        "PERMAFROST_LAUNCH_ID": "x",
        "MINE": "m",
    }
    assert forwarded(environ, []) == {"NCCL_DEBUG": "INFO", "PERMAFROST_CACHE": "/c"}
    found = forwarded(environ, ["MINE", "NCCL_DEBUG=a=b c", "EMPTY="])
    assert found == {"NCCL_DEBUG": "a=b c", "PERMAFROST_CACHE": "/c", "MINE": "m", "EMPTY": ""}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("ABSENT", "ABSENT: it is not set here: export it, or give ABSENT=VALUE"),
        ("1A=x", "'1A' is not a variable's name"),
        ("A B=x", "is not a variable's name"),
        ("=x", "'' is not a variable's name"),
        ("RANK=0", "--export RANK: the launcher sets it"),
        ("MASTER_ADDR=a", "the launcher sets it"),
    ],
)
def test_what_is_refused(request_, message) -> None:
    with pytest.raises(LaunchError, match=message):
        forwarded({}, [request_])


@pytest.mark.parametrize("value", ["/a b", "$HOME", "`id`", "a;b", "a'b", 'a"b', "%n", "é", "a\nb", "*", "~/x", "a\\b"])
def test_values_that_a_shell_would_change(value) -> None:
    assert shell_exports({"PATH": "/usr/bin:/opt/c++/x_1,2@3=4", "OTHER": value}) == {
        "PATH": "/usr/bin:/opt/c++/x_1,2@3=4"
    }
    with pytest.raises(LaunchError, match="PYTHONPATH holds"):
        shell_exports({"PYTHONPATH": value})


def test_word() -> None:
    """Any folder, in letters that no shell knows."""
    folders = ["/tmp/a b", os.fsdecode(b"/tmp/\xff$(id)'\"\n")]
    word = encode(folders)
    assert decode(word) == folders
    assert all(character.isalnum() or character in "-_=" for character in word)
