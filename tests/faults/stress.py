"""Kills trainings and runs the same command again: the losses and the head must be those of a run that nothing disturbed.

    python tests/faults/stress.py FOLDER                  the fixed moments that the tests use
    python tests/faults/stress.py FOLDER --random 20      SIGKILL of a random rank at random moments
    python tests/faults/stress.py FOLDER --elastic        resumed on other numbers of ranks, engines and ZeRO stages
    python tests/faults/stress.py FOLDER --forgetful      a start that forgets its checkpoints, which must be noticed

Prints a line of JSON for each and exits with 1 if any has gone wrong. Ranks are forked from this process, which has
imported everything, and are otherwise the processes that a launcher starts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parent / "recipe.py"
STEPS = 8
LIMIT = 180.0
"""Seconds that one start may take."""

FIXED: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    # Three steps make an epoch, every second one is saved: (faults of the starts before the last one, where all begin).
    "mid-epoch": ([{"do": "kill", "rank": 1, "at": "step", "number": 5}], [0, 4]),
    "twice in an epoch": (
        [
            {"do": "kill", "rank": 1, "at": "step", "number": 5},
            {"do": "kill", "rank": 0, "at": "step", "number": 2},
        ],
        [0, 4, 4],
    ),
    "before a save": ([{"do": "kill", "rank": 0, "at": "save_begins", "number": 2}], [0, 2]),
    "tensors written": ([{"do": "kill", "rank": 0, "at": "save_tensors", "number": 2}], [0, 2]),
    "before the rename": ([{"do": "kill", "rank": 0, "at": "save_complete", "number": 2}], [0, 2]),
    "after the rename": ([{"do": "kill", "rank": 0, "at": "save_renamed", "number": 4}], [0, 4]),
}

ZERO = {stage: ["--engine.kind", "deepspeed", "--engine.zero-stage", str(stage)] for stage in (1, 2, 3)}
ELASTIC: dict[str, tuple[int, list[str]]] = {
    "2 ranks, ZeRO 2": (2, ZERO[2]),
    "1 rank, Accelerate": (1, []),
    "4 ranks, ZeRO 3": (4, ZERO[3]),
    "2 ranks, ZeRO 1": (2, ZERO[1]),
    "1 rank, ZeRO 3": (1, ZERO[3]),
    "4 ranks, Accelerate": (4, []),
}
"""Where a run that 2 ranks began under ZeRO 2 goes on; the first is its own layout."""
TOLERANCE = 1e-6
"""Of the first loss there, relative: the layouts add in another order. About 1e-7 is found."""


def start(
    arguments: list[str],
    *,
    ranks: int,
    log: Path,
    recipe: str = "tiny",
    fault: dict[str, Any] | None = None,
    kill: tuple[int, float, Path | None] | None = None,
    variables: dict[str, str] | None = None,
) -> list[int]:
    """One start of the command; returns the ranks' exit codes as `subprocess` gives them.

    Args:
        arguments: after the recipe.
        ranks: how many.
        log: what they print is appended to it.
        recipe: a function of recipe.py.
        fault: see recipe.py.
        kill: (rank, seconds, file) of a SIGKILL from outside: so long after the start or, where a file is given, after that is
            there.
        variables: of the environment.
    """
    environ = {"OMP_NUM_THREADS": "1", **(variables or {})}
    if fault is not None:
        environ["FAULT"] = json.dumps(fault)
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        pid = os.fork()
        if not pid:
            _be_rank([f"{RECIPE}:{recipe}", *arguments], {**environ, **own}, log)
        pids.append(pid)
    codes: dict[int, int] = {}
    began = armed = time.monotonic()
    while len(codes) < ranks:
        now = time.monotonic()
        if kill is not None and kill[2] is not None and not kill[2].exists():
            armed = now
        if now - began > LIMIT or (kill is not None and now - armed > kill[1]):
            for pid in pids if now - began > LIMIT else [pids[kill[0]]]:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            kill = None
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _be_rank(command: list[str], environ: dict[str, str], log: Path) -> None:
    """Do what a forked child does, without returning."""
    os.setsid()
    os.environ.update(environ)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["train", *command]
    try:
        from permafrost.launcher.cli import main as permafrost
        from permafrost.launcher.ranks.exit import run_and_leave

        run_and_leave(lambda: permafrost(["train", *command]))
    finally:
        os._exit(70)


def losses(run: Path) -> list[dict[str, Any]]:
    """Every logged step with its losses and the norm of its gradient."""
    kept = ("loss", "grad_norm")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data/epoch" in line]
    return [{tag: line[tag] for tag in line if tag == "step" or any(word in tag for word in kept)} for line in lines]


def state(run: Path) -> dict[str, Any]:
    """Return what the last checkpoint holds: the hash of every tensor, and its counters."""
    from safetensors.numpy import load_file

    folder = run / f"checkpoints/step_{STEPS:08d}"
    content = json.loads((folder / "state.json").read_text())
    # The files themselves differ: the notes in their headers come in any order.
    tensors = {
        f"{path.stem}.{name}": hashlib.sha256(tensor.tobytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in sorted(load_file(path).items())
    }
    return {"tensors": tensors, **{name: content[name] for name in ("loop", "heads", "step", "epoch")}}


def start_steps(run: Path) -> list[int]:
    """At which step each start that came so far began."""
    file = run / "provenance.jsonl"
    return [json.loads(line)["start_step"] for line in file.read_text().splitlines()] if file.exists() else []


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint that lies there complete; 0 if none does."""
    return max((int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*")), default=0)


def difference(run: Path, whole: Path) -> str:
    """Return what is not bitwise the same in two runs that have ended; "" if all is."""
    for what in (losses, state):
        found, expected = what(run), what(whole)
        if found != expected:
            pairs = zip(found, expected) if what is losses else [(found["tensors"], expected["tensors"])]
            names = [
                f"{name} of {one.get('step', 'the last step')}"
                for one, two in pairs
                for name in two
                if one.get(name) != two[name]
            ]
            return f"{what.__name__}: {', '.join(names[:5])} differ"
    for file in ("evaluations.jsonl", "final.json"):
        if (run / file).read_text() != (whole / file).read_text():
            return file
    return ""


class Stress:
    """Runs below one folder.

    Args:
        folder: made if it is missing.
        ranks: of every run but the elastic ones.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("PERMAFROST_CACHE", str(folder / "cache"))
        self.seconds = 0.0

    def run(self, name: str, faults: list[Any], *, arguments: list[str] = [], **options: Any) -> list[list[int]]:  # noqa: B006
        """Starts with these faults (None: without), one after the other: exit codes of each."""
        own = ["--output", str(self.folder / name), "--loop.num-steps", str(STEPS), *arguments]
        log = self.folder / f"{name}.log"
        return [
            start(own, log=log, **{"ranks": self.ranks, **options, **({"fault": fault} if fault else {})})
            for fault in faults
        ]

    def once(self, name: str, **options: Any) -> tuple[list[int], str]:
        """One start: exit codes, and what is wrong with the step at which it began.

        A run that silently begins anew ends with the right bits, too.
        """
        run = self.folder / name
        earlier, newest = start_steps(run), newest_step(run)
        (codes,) = self.run(name, [None], **options)
        # One that was killed early has not said where it begins.
        begun = start_steps(run)[len(earlier) :]
        return codes, "" if begun in ([], [newest]) else f"begins at step {begun} and has the checkpoint of {newest}"

    def whole(self) -> Path:
        """The run that nothing disturbs."""
        path = self.folder / "whole"
        if not path.exists():
            began = time.monotonic()
            codes = self.run("whole", [None])
            self.seconds = time.monotonic() - began
            assert codes == [[0] * self.ranks], (self.folder / "whole.log").read_text()
        return path

    def fixed(self) -> Iterator[dict[str, Any]]:
        """The fixed moments."""
        whole = self.whole()
        for name, (faults, begins) in FIXED.items():
            slug = name.replace(" ", "_")
            codes = self.run(slug, [*faults, None])
            run = self.folder / slug
            problem = ""
            for fault, found in zip(faults, codes):
                others = [code for rank, code in enumerate(found) if rank != fault["rank"]]
                if found[fault["rank"]] != -signal.SIGKILL or any(code != 1 for code in others):
                    problem = f"exit codes {found} of the start that was killed"
            if codes[-1] != [0] * self.ranks:
                problem = f"exit codes {codes[-1]} of the last start"
            elif start_steps(run) != begins:
                problem = f"starts at the steps {start_steps(run)} instead of {begins}"
            yield {"name": name, "codes": codes, "problem": problem or difference(run, whole)}

    def random(self, number: int, seed: int) -> Iterator[dict[str, Any]]:
        """SIGKILL of a random rank at a random moment, of some a second and third one.

        Of every second run the first moment comes after its first checkpoint; the others lie anywhere in the run's duration.
        """
        whole, generator = self.whole(), random.Random(seed)
        for index in range(number):
            name, problem = f"random_{index}", ""
            run = self.folder / name
            moments: list[tuple[int, float, Path | None]] = []
            while True:
                kill = None
                if not moments or (len(moments) < 3 and generator.random() < 0.4):
                    rank, latest = generator.randrange(self.ranks), run / "latest"
                    is_late = index % 2 == 0 and not moments
                    # The start takes most of so short a run.
                    seconds = generator.uniform(0, 0.3 * self.seconds if is_late else 1.1 * self.seconds)
                    kill = (rank, seconds, latest if is_late else None)
                codes, found = self.once(name, kill=kill)
                problem = problem or found
                if kill is None or (moments and not any(codes)):
                    break
                if not any(codes):
                    # It came too late: once more from the beginning.
                    shutil.rmtree(run)
                    continue
                moments.append(kill)
            if any(codes):
                problem = f"exit codes {codes} of the last start"
            shown = [[rank, round(seconds, 2), "after a save" if file else ""] for rank, seconds, file in moments]
            problem = problem or difference(run, whole)
            yield {"name": name, "killed": shown, "starts": start_steps(run), "problem": problem}

    def forgetful(self) -> Iterator[dict[str, Any]]:
        """A start that passes over its checkpoints: `once` has to say so, though everything else is in order."""
        whole, run = self.whole(), self.folder / "forgetful"
        self.once("forgetful", fault={"do": "kill", "rank": 1, "at": "step", "number": 5})
        codes, problem = self.once("forgetful", variables={"FORGET": "1"})
        problem = f"exit codes {codes}" if any(codes) else problem
        yield {"name": "forgetful", "difference": difference(run, whole), "problem": problem}

    def elastic(self) -> Iterator[dict[str, Any]]:
        """Two ranks under ZeRO 2, killed in step 7 after the checkpoint of step 4, resumed elsewhere: step 5 is as it was."""
        from permafrost.data.stream.sampler import GlobalStream

        settings = ["--loop.checkpoint-every", "4"]
        fault = {"do": "kill", "rank": 1, "at": "step", "number": 7}
        (codes,) = self.run("begun", [fault], arguments=[*settings, *ZERO[2]], ranks=2)
        assert codes == [1, -signal.SIGKILL], (self.folder / "begun.log").read_text()
        wanted = losses(self.folder / "begun")[4]
        # What an uninterrupted run sees: 4 of 12 images in each step.
        stream = GlobalStream(12, 0)
        keys = [[stream.key(4 * step + place) for place in range(4)] for step in range(4, STEPS)]
        expected = [[[key.epoch, key.index] for key in step] for step in keys]
        for name, (ranks, engine) in ELASTIC.items():
            slug = name.replace(",", "").replace(" ", "_")
            shutil.copytree(self.folder / "begun", self.folder / slug)
            seen = self.folder / f"samples_{slug}"
            seen.mkdir()
            variables = {"SAMPLES": str(seen)}
            (codes,) = self.run(slug, [None], arguments=[*settings, *engine], ranks=ranks, variables=variables)
            if codes != [0] * ranks:
                yield {
                    "name": name,
                    "problem": f"exit codes {codes}: {(self.folder / f'{slug}.log').read_text()[-3000:]}",
                }
                continue
            run = self.folder / slug
            found, first = samples(seen, ranks), losses(run)[4]
            error = max(abs(first[tag] - wanted[tag]) / abs(wanted[tag]) for tag in wanted if "loss" in tag)
            problem = "" if error < TOLERANCE else f"the first loss is off by {error:.1e}"
            if start_steps(run) != [0, 4] or first["step"] != 5 or wanted["step"] != 5:
                problem = f"starts at the steps {start_steps(run)}"
            if found != expected:
                problem = f"samples {found} instead of {expected}"
            yield {"name": name, "first_loss_error": error, "problem": problem}


def samples(folder: Path, ranks: int) -> list[list[list[int]]]:
    """(epoch, index) of every sample of every step, in the order of the global batch."""
    own = [[json.loads(line) for line in (folder / f"rank_{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [list(itertools.chain(*parts)) for parts in zip(*own, strict=True)]


def main() -> int:
    """Run rounds of faults, as the module says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--forgetful", action="store_true")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with contextlib.suppress(ImportError):
        import tensorboard.compat.proto.event_pb2  # noqa: F401

    import permafrost.launcher.engines.accelerate
    import permafrost.launcher.train  # noqa: F401 - imported once, for all ranks

    stress = Stress(options.folder, options.ranks)
    if options.elastic:
        import deepspeed  # noqa: F401

        outcomes = stress.elastic()
    elif options.forgetful:
        outcomes = stress.forgetful()
    else:
        outcomes = stress.random(options.random, options.seed) if options.random else stress.fixed()
    failed = 0
    for outcome in outcomes:
        failed += bool(outcome["problem"])
        print(json.dumps(outcome), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
