"""One head, one global batch: every engine, every ZeRO stage and every number of ranks take the same steps.

Three launches make all results: one rank, two ranks that also continue the one rank's states, and one rank that
continues the two ranks'. The yardstick is a float64 re-derivation in this file: one process, the whole batch at once,
AdamW written out.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
KINDS = ("accelerate", "zero1", "zero2", "zero3")
SIZES = (1, 2)
OFFLOAD = '{"zero_optimization": {"stage": %d, "reduce_bucket_size": 50000, "offload_optimizer": {"device": "cpu"}}}'

spec = importlib.util.spec_from_file_location("distributed_common", HERE / "common.py")
common = importlib.util.module_from_spec(spec)
spec.loader.exec_module(common)


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory) -> dict[int, dict[str, Any]]:
    """{number of ranks: result}, the results of one rank completed with its continuation of two ranks' states."""
    folder = tmp_path_factory.mktemp("engines")
    for stage in (1, 2, 3):
        (folder / f"offload{stage}.json").write_text(OFFLOAD % stage)
    arguments = {"folder": str(folder)}
    one = run_ranks("engines_worker.py", 1, arguments)
    torch.save({(1, kind): one["runs"][kind]["middle"] for kind in KINDS}, folder / "one.pt")
    two = run_ranks("engines_worker.py", 2, {**arguments, "sources": str(folder / "one.pt")})
    torch.save({(2, kind): two["runs"][kind]["middle"] for kind in KINDS}, folder / "two.pt")
    again = run_ranks("engines_worker.py", 1, {"sources": str(folder / "two.pt"), "only_continue": True})
    one["continued"] |= again["continued"]
    return {1: one, 2: two}


class Reference:
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2) written out: float64, one process, the whole batch at once."""

    def __init__(self, clip_norm: float | None = None) -> None:
        self.head = common.SmoothHead().double()
        self.clip_norm = clip_norm
        self.first = {name: torch.zeros_like(p) for name, p in self.head.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in self.head.named_parameters()}
        self.num_steps = 0

    def step(self) -> dict:
        ((features, batch, counts),) = common.micro_batches(self.num_steps, 0, 1, 1)
        losses = self.head(features, batch, counts)
        named = dict(self.head.named_parameters())
        gradients = dict(zip(named, torch.autograd.grad(sum(losses.values()), named.values())))
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
        scale = min(1.0, self.clip_norm / (norm + 1e-6)) if self.clip_norm else 1.0
        self.num_steps += 1
        with torch.no_grad():
            for name, p in named.items():
                g = gradients[name] * scale
                self.first[name] = 0.9 * self.first[name] + 0.1 * g
                self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
                corrected = self.first[name] / (1 - 0.9**self.num_steps)
                spread = (self.second[name] / (1 - 0.999**self.num_steps)).sqrt() + 1e-8
                # Decayed are the weights of convolutions and linear layers: not norms, biases, or the scale of one
                # element.
                decay = 0.05 if name.startswith(("convs", "mlp")) and name.endswith("weight") else 0.0
                p.mul_(1 - common.LEARNING_RATE * decay).sub_(common.LEARNING_RATE * corrected / spread)
        return {**{name: value.item() for name, value in losses.items()}, "grad_norm": norm}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The steps of the float64 re-derivation, and its parameters and first moments after one and after all of them."""
    derived = Reference()
    steps = [derived.step()]
    first = {name: p.clone() for name, p in derived.first.items()}
    parameters = {name: p.detach().clone() for name, p in derived.head.named_parameters()}
    steps += [derived.step() for _ in range(19)]
    end = {name: p.detach().clone() for name, p in derived.head.named_parameters()}
    return {"steps": steps, "exp_avg": first, "parameters": parameters, "end": end}


def largest_difference(found: list[dict], wanted: list[dict]) -> float:
    """Largest relative difference of any loss or gradient norm of any step."""
    assert len(found) == len(wanted)
    return max(abs(f[key] - w[key]) / max(abs(w[key]), 1e-3) for f, w in zip(found, wanted) for key in w)


def assert_same_state(found, wanted) -> None:
    assert found.step == wanted.step
    for part in ("parameters", "exp_avg", "exp_avg_sq", "buffers"):
        a, b = getattr(found, part), getattr(wanted, part)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), (part, name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_first_step(results, reference, kind, size) -> None:
    run = results[size]["runs"][kind]
    assert largest_difference(run["steps"][:1], reference["steps"][:1]) < 1e-6
    state = run["first"]
    assert state.step == 1
    for name, wanted in reference["exp_avg"].items():
        # A tenth of the gradient, of every parameter.
        assert (state.exp_avg[name].double() - wanted).norm() <= 1e-5 * wanted.norm(), name
        assert torch.allclose(state.exp_avg_sq[name].double(), 0.1 * wanted**2, rtol=2e-5, atol=1e-12), name
    for name, wanted in reference["parameters"].items():
        assert torch.allclose(state.parameters[name].double(), wanted, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps(results, reference, kind, size) -> None:
    run = results[size]["runs"][kind]
    assert len(run["steps"]) == 20
    assert largest_difference(run["steps"], reference["steps"]) < 5e-6
    assert run["end"].step == 20


@pytest.mark.parametrize("size", SIZES)
def test_twenty_steps_in_float64(results, reference, size) -> None:
    run = results[size]["float64"]
    assert largest_difference(run["steps"], reference["steps"]) < 1e-9
    for name, wanted in reference["end"].items():
        assert run["end"].parameters[name].dtype == torch.float64
        assert torch.allclose(run["end"].parameters[name], wanted, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_exported(results, kind, size) -> None:
    state = results[size]["runs"][kind]["start"]
    assert state.step == 0
    head = common.SmoothHead()
    assert list(state.parameters) == [name for name, _ in head.named_parameters()]
    for name, parameter in head.named_parameters():
        assert torch.equal(state.parameters[name], parameter.detach())
        assert not state.exp_avg[name].any()
        assert not state.exp_avg_sq[name].any()
    assert list(state.buffers) == ["num_forwards"]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=lambda sizes: f"{sizes[0]}to{sizes[1]}")
def test_continuation(results, source, target, sizes) -> None:
    """A state goes from any engine and number of ranks into any other, unchanged, and training goes on as before."""
    origin = results[sizes[0]]["runs"][source]
    continued = results[sizes[1]]["continued"][(sizes[0], source), target]
    assert_same_state(continued["imported"], origin["middle"])
    assert largest_difference(continued["steps"], origin["steps"][10:]) < 1e-6


def test_continuation_would_notice(reference) -> None:
    """The tolerance above is far below what a lost moment or step count does."""
    derived = Reference()
    for _ in range(10):
        derived.step()
    derived.first = {name: torch.zeros_like(value) for name, value in derived.first.items()}
    steps = [derived.step() for _ in range(10)]
    assert largest_difference(steps, reference["steps"][10:]) > 1e-2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(results, reference, kind, size) -> None:
    assert largest_difference(results[size]["accumulated"][kind], reference["steps"][:4]) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_without_gradients_between(results, reference, kind, size) -> None:
    assert largest_difference(results[size]["counting"][kind], reference["steps"][:4]) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_clipping(results, kind, size) -> None:
    derived = Reference(clip_norm=0.05)
    steps = [derived.step() for _ in range(4)]
    # The norm that is reported is the one before clipping.
    assert min(step["grad_norm"] for step in steps) > 0.5
    assert largest_difference(results[size]["clipped"][kind], steps) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_steps_leave_no_trace(results, reference, kind, size) -> None:
    skipped = results[size]["skipping"][kind]
    assert_same_state(skipped["after"], skipped["before"])
    assert all(report.skipped and not math.isfinite(report.grad_norm) for report in skipped["reports"])
    assert largest_difference(skipped["steps"], reference["steps"][:4]) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_engines_side_by_side(results, kind, size) -> None:
    found = results[size]["side_by_side"][kind]
    assert found["together"] == found["alone"]
    assert found["alone"][1] != found["alone"][2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_between_steps(results, reference, kind, size) -> None:
    found = results[size]["evaluating"][kind]
    assert largest_difference(found["steps"], reference["steps"][:4]) < 1e-5
    derived = Reference()
    for _ in range(2):
        derived.step()
    derived.head.eval()
    ((features, batch, counts),) = common.micro_batches(99, 0, 1, 1)
    with torch.no_grad():
        wanted = torch.stack(derived.head(features, batch, counts))
    assert torch.allclose(found["results"], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_autocast(results, reference, kind, size) -> None:
    found = results[size]["bfloat16"][kind]
    assert found["dtypes"] == {torch.float32}
    difference = largest_difference(
        [{"fit": step["fit"]} for step in found["steps"]], [{"fit": step["fit"]} for step in reference["steps"][:5]]
    )
    # Really computed in bfloat16 (8 bits), and still the same problem.
    assert 1e-5 < difference < 5e-2
    plain = results[size]["bfloat16"]["accelerate"]
    assert torch.allclose(found["results"], plain["results"], atol=2e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer(results, reference, stage, size) -> None:
    found = results[size]["offloading"][stage]
    assert "optimizer on the CPU" in found["name"]
    assert largest_difference(found["steps"], reference["steps"][:4]) < 1e-5
    skipped = found["skipping"]
    assert_same_state(skipped["after"], skipped["before"])
    assert largest_difference(skipped["steps"], reference["steps"][:4]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_second_run_in_one_process(results, reference, kind) -> None:
    assert largest_difference(results[1]["reopened"][kind], reference["steps"][:4]) < 1e-5


def test_world(results) -> None:
    one, two = results[1]["mesh"], results[2]["mesh"]
    assert two["mean"] == {"a": 5e8 + 1e-9, "b": 0.5}
    assert one["mean"] == {"a": 1e-9, "b": 0.0}
    assert two["any"] == [True, False]
    assert one["any"] == [False, False]
    assert two["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert two["broadcast"] == "from 0"
    assert "gloo" in two["describe"]
    assert "ranks average different values" in two["disagreement"]
    assert one["disagreement"] is None


def test_engine_names(results) -> None:
    names = {size: {kind: run["name"] for kind, run in result["runs"].items()} for size, result in results.items()}
    assert "single process" in names[1]["accelerate"]
    assert "DDP over 2 processes" in names[2]["accelerate"]
    assert "ZeRO 3 over 2 process(es)" in names[2]["zero3"]


def test_deepspeed_is_quiet(results) -> None:
    """Nothing but its own warnings about the non-finite gradients that the worker makes."""
    for result in results.values():
        lines = [line for line in result["output"].splitlines() if line.strip()]
        assert not [line for line in lines if "OVERFLOW! Skipping step" not in line]
