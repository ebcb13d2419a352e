"""Run each test that failed once more, by itself: what passes then is flaky, printed with its first failure, and ends nothing.

    python .ci/rerun_failed.py JUNIT_XML

It reads the list of failures from pytest's cache and their texts from the JUnit file of the same run. A test that fails again, an
error outside of a test, or more failures than MOST end with 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MOST = 5
"""More failures than that are no accidents."""


def main(junit: str) -> int:
    """Return 0 if every test that failed passes by itself."""
    failed = list(json.loads(Path(".pytest_cache/v/cache/lastfailed").read_text()))
    if not failed or len(failed) > MOST or any("::" not in test for test in failed):
        print(f"{len(failed)} failure(s), not run again: {' '.join(failed)}")
        return 1
    texts = {
        case.get("name"): (case.find("failure") if case.find("failure") is not None else case.find("error"))
        for case in ElementTree.parse(junit).iter("testcase")
    }
    for test in failed:
        print(f"== once more by itself: {test}", flush=True)
        # Whatever its marks: the list decides.
        again = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", test]
        )
        if again.returncode:
            return 1
    for test in failed:
        first = texts.get(test.rpartition("::")[2])
        print(f"\nFLAKY {test}: it failed in the run and passed by itself; the first failure:\n")
        print("(not on record)" if first is None else first.text or first.get("message"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
