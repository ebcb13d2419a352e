"""Rows 1 to 4: a run whose ranks are killed, and a run that moves, against one that nothing disturbs.

`python tests/faults/stress.py FOLDER --random 20` does the same at random moments.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # dozens of ranks are started

SCRIPT = Path(__file__).with_name("stress.py")
_spec = importlib.util.spec_from_file_location("faults_stress", SCRIPT)
stress = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stress)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, dict]]:
    """outcomes(*options): what the script prints, by name; each set of options is run once."""
    kept: dict[tuple[str, ...], dict[str, dict]] = {}

    def get(*options: str) -> dict[str, dict]:
        if options not in kept:
            command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("stress")), *options]
            result = subprocess.run(command, capture_output=True, text=True, timeout=500)
            assert result.stdout, result.stderr
            kept[options] = {line["name"]: line for line in map(json.loads, result.stdout.splitlines())}
            assert (result.returncode == 0) == (not any(line["problem"] for line in kept[options].values()))
        return kept[options]

    return get


@pytest.mark.parametrize("moment", stress.FIXED)
def test_the_same_command_gives_the_same_run(outcomes, moment) -> None:
    """Rows 1, 2, 3. Losses, gradient norms, weights, moments, evaluations: every bit."""
    outcome = outcomes()[moment]
    assert not outcome["problem"], outcome
    assert all(any(codes) for codes in outcome["codes"][:-1])


@pytest.mark.parametrize("layout", stress.ELASTIC)
def test_it_goes_on_elsewhere(outcomes, layout) -> None:
    """Row 4. The samples of a run that goes on undisturbed, in the same order, and its next loss to 1e-6."""
    outcome = outcomes("--elastic")[layout]
    assert not outcome["problem"], outcome


def test_moments_that_nobody_chose(outcomes) -> None:
    """Row 2, in small: three random moments. Every start goes on from the newest checkpoint that the one before has left."""
    found = outcomes("--random", "3", "--seed", "1")
    assert len(found) == 3
    assert not [line for line in found.values() if line["problem"]], found
    for index in (0, 2):
        assert max(found[f"random_{index}"]["starts"]) >= 2, "killed after a save, so resumed"


def test_a_silent_restart_is_noticed(outcomes) -> None:
    """Row 2. It gives the same bits in the end, so the stress looks at where each start begins."""
    outcome = outcomes("--forgetful")["forgetful"]
    assert outcome["difference"] == ""
    assert outcome["problem"] == "begins at step [0] and has the checkpoint of 4"
