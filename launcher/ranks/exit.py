"""End a program of ours with everything written, and then at once.

gloo's threads outlive their process group as long as anything holds it, and much does: torch.distributed.nn.functional
as a default argument, DDP, DeepSpeed's parameters. One of them that frees its last message while the interpreter takes
itself down aborts the process after all its work (`terminate called without an active exception`, exit code -6). A
process that does not take its interpreter down cannot be caught by that.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from permafrost.launcher.exit_codes import FAILED, INTERRUPTED
from permafrost.launcher.streams import keep_working


def run_and_leave(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and end the process with what it returns: None is DONE, an exception FAILED after its traceback.

    Exit functions run and streams are flushed as ever; where torch was imported, the interpreter is not taken down.
    """
    keep_working()
    try:
        code = main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = FAILED if isinstance(error.code, str) else error.code
    except BaseException as error:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
        sys.excepthook(type(error), error, error.__traceback__)
    if "torch" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)
