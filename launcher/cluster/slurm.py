"""Write the same run as a batch script in which srun starts the ranks: `permafrost launch --slurm`. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from permafrost.launcher.exit_codes import LOST, SAVED, USAGE_ERROR


def batch_script(
    *,
    name: str,
    arguments: Sequence[str],
    exports: Mapping[str, str],
    output: str,
    num_nodes: int,
    num_procs: int,
    uses_gpus: bool,
    max_restarts: int,
) -> str:
    """Return the script.

    Args:
        name: of the job.
        arguments: of `permafrost train`.
        exports: variables that the ranks get besides what Slurm hands on.
        output: the run folder.
        num_nodes: nodes of the job.
        num_procs: ranks on each node.
        uses_gpus: whether each rank has a GPU.
        max_restarts: further starts after a failed one, from the last checkpoint.
    """
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9_.-]', '_', name)}",
        f"#SBATCH --nodes={num_nodes}",
        f"#SBATCH --ntasks-per-node={num_procs}",
        *([f"#SBATCH --gpus-per-node={num_procs}"] if uses_gpus else []),
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "# Add what your cluster asks for: --partition, --account, --time, --cpus-per-task. With --signal=USR1@120 the ranks",
        f"# save and end before the time is up, with code {SAVED}: the same script, submitted again, goes on from there.",
        "",
        "set -u",
        f"cd {shlex.quote(os.getcwd())} || exit {USAGE_ERROR}",
        *(f"export {variable}={shlex.quote(value)}" for variable, value in exports.items()),
        "",
        f"final={shlex.quote(os.path.join(output, 'final.json'))}",
        f"for attempt in $(seq 0 {max_restarts}); do",
        "    # One rank's end is the end of all.",
        f"    srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -u -m permafrost.launcher.train \\",
        f"        {shlex.join(arguments)}",
        "    code=$?",
        f"    # Code {USAGE_ERROR} is a mistake, {SAVED} a signal that asked to end, and with its final.json a run has ended.",
        f'    if [ "$code" -eq {USAGE_ERROR} ] || [ "$code" -eq {SAVED} ] || [ -e "$final" ]; then break; fi',
        "done",
        "# Without its final.json the run has not ended, whatever the ranks said.",
        f'if [ "$code" -eq 0 ] && [ ! -e "$final" ]; then exit {LOST}; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"
