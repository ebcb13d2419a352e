"""Processes that the tests of the kernels talk to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a job of interpreter_worker.py and gives its outcome."""
    messages = tmp_path_factory.mktemp("interpreter") / "stderr"
    with messages.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, FOLDER / "interpreter_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )

    def run(job: str, **fields: Any) -> dict[str, Any]:
        if worker.poll() is None:
            worker.stdin.write(json.dumps({"job": job, "fields": fields}) + "\n")
            worker.stdin.flush()
        answer = worker.stdout.readline()
        assert answer, f"The interpreter ended: {messages.read_text()[-4000:]}"
        return json.loads(answer)

    yield run
    worker.stdin.close()
    worker.stdout.close()
    worker.wait(timeout=60)
