"""Split backbones against whole ones on four ranks: every rank compares what it gets, rank 0 saves what all found."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch
from common import arguments, save_result
from mask_rcnn_worker import CONFIG, SIDE, image
from safetensors.torch import load_file
from torch import Tensor

from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts
from permafrost.heads.build import build_head
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.model import BackboneError, SwinV2, load_backbone
from permafrost.model.spec import SwinV2Size
from permafrost.model.split.fairscale_groups import join_tensor_group
from permafrost.model.split.tensor_parallel import SplitBackbone, SplitSwinV2

# Images of ranks 0 to 3: batch and sides. Sides that fill no window and no patch, of one size or several, down to none.
BATCHES = {
    "equal": [(2, 64, 96)] * 4,
    "uneven": [(1, 70, 101), (2, 70, 101), (0, 50, 30), (1, 33, 140)],
    "counts": [(0, 64, 64), (3, 64, 64), (1, 64, 64), (0, 64, 64)],
    "one": [(0, 64, 64), (0, 32, 64), (0, 4, 7), (1, 37, 37)],
    "none": [(0, 64, 65), (0, 32, 32), (0, 64, 65), (0, 10, 10)],
}
NETWORKS = {
    "nano": {"window_size": 6},
    "extra_norms": {"window_size": (8, 8, 4, 2), "pretrained_window_size": (8, 8, 3, 2), "extra_norm_interval": 2},
}


def draw_images(group, kind: str) -> Tensor:
    batch, height, width = BATCHES[kind][group.rank]
    generator = torch.Generator().manual_seed(7 + group.rank)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def compare(found: tuple[Tensor, ...], images: Tensor, spec, expected: tuple[Tensor, ...] | None) -> float:
    """The largest relative error over the maps; what must hold exactly is asserted. `expected` is None of no images."""
    worst = 0.0
    assert len(found) == spec.num_levels
    for level, (own, channels, stride) in enumerate(zip(found, spec.channels, spec.strides)):
        sides = [-(-side // stride) for side in images.shape[2:]]
        assert own.shape == (len(images), channels, *sides)
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert not own.requires_grad
        assert not own.is_inference()
        if expected is not None:
            difference = (own.double() - expected[level].double()).norm() / expected[level].double().norm()
            worst = max(worst, float(difference))
        # Nothing of the other members' maps stays alive behind this one's.
        assert own.untyped_storage().nbytes() <= own.numel() * own.element_size()
    return worst


def forwards(group, tensor_group) -> dict:
    """{(network, dtype, batches): the largest relative error on this rank}."""
    errors = {}
    for network, fields in NETWORKS.items():
        for dtype in (torch.float32, torch.float64):
            whole = load_backbone("swinv2_nano", weights="random:3", dtype=dtype, **fields)
            split = load_backbone("swinv2_nano", weights="random:3", dtype=dtype, tensor_group=tensor_group, **fields)
            assert split.fingerprint == whole.fingerprint
            assert split.spec == whole.spec
            for kind in BATCHES:
                images = draw_images(group, kind)
                found = split(images)
                expected = whole(images) if len(images) else None
                errors[network, str(dtype), kind] = compare(found, images, split.spec, expected)
                if kind == "uneven":
                    assert all(torch.equal(one, two) for one, two in zip(found, split(images)))
    return errors


def attending(group, tensor_group) -> float:
    """The largest relative error of a split network whose own heads attend by window_attention, against the whole one by default."""
    own = {"weights": "random:3", "dtype": torch.float64, **NETWORKS["extra_norms"]}
    split = load_backbone(
        "swinv2_nano", attention="reference", residual_norm="reference", tensor_group=tensor_group, **own
    )
    assert split.describe()["attention"].startswith("reference (as asked for)")
    images = draw_images(group, "uneven")
    expected = load_backbone("swinv2_nano", **own)(images) if len(images) else None
    return compare(split(images), images, split.spec, expected)


def passes(group, tensor_group) -> dict[str, float]:
    """The largest relative error of maps that are computed in several passes, of which members need unequally many."""
    whole = load_backbone("swinv2_nano", weights="random:3", dtype=torch.float64)
    split = load_backbone("swinv2_nano", weights="random:3", dtype=torch.float64, tensor_group=tensor_group)
    split.max_images = 2
    errors = {}
    for kind in ("uneven", "counts", "none"):
        images = draw_images(group, kind)
        errors[kind] = compare(split(images), images, split.spec, whole(images) if len(images) else None)
    random = torch.Generator().manual_seed(group.rank)
    clips = torch.randint(0, 256, (group.rank % 2, 3, 3, 64, 64), dtype=torch.uint8, generator=random)
    found = split(clips)
    assert [one.shape[:2] for one in found] == [clips.shape[:2]] * 4
    if len(clips):
        frames = clips.flatten(0, 1)
        errors["clips"] = compare(tuple(one.flatten(0, 1) for one in found), frames, split.spec, whole(frames))
    return errors


def half_precision(group, tensor_group) -> dict[str, float]:
    """Measure how far the maps in bfloat16 are from those in float64, split and whole."""
    images = draw_images(group, "equal")
    exact = load_backbone("swinv2_nano", weights="random:3", dtype=torch.float64)
    errors = {}
    for kind, own in (("split", tensor_group), ("whole", None)):
        backbone = load_backbone("swinv2_nano", weights="random:3", dtype=torch.bfloat16, tensor_group=own)
        errors[kind] = compare(backbone(images), images, exact.spec, exact(images))
    return errors


def detection_losses(group, tensor_group, num_steps: int = 20) -> list[dict[str, float]]:
    """Steps of a small Mask R-CNN in float64 on the maps of a backbone in float64, one image on each rank."""
    backbone = load_backbone("swinv2_nano", weights="random", dtype=torch.float64, tensor_group=tensor_group)
    torch.manual_seed(0)
    engine = build_engine(
        build_head(CONFIG, spec=backbone.spec, classes=["circle", "square", "star"]).double(),
        optimizer=OptimizerConfig(),
        engine=EngineConfig(),
        group=group,
        global_batch=group.world_size,
    )
    engine.train()
    steps = []
    for step in range(num_steps):
        key = SampleKey(11, step, group.rank)
        images = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=key.generator("pixels"))
        _, target = image(step, group.rank, (3, 1, 2, 4)[group.rank])
        losses = engine(backbone(images), Batch(images, [target], [key]), world_mean_counts)
        engine.backward(sum(losses.values()))
        report = engine.step(1e-3)
        means = group.all_reduce_mean({name: loss.item() for name, loss in losses.items()})
        steps.append({**means, "grad_norm": report.grad_norm})
    return steps


def custom_size(group, tensor_group) -> float:
    """A network of its own size, split when it has its weights already; heads that are no power of two."""
    size = SwinV2Size(24, (1, 2, 3, 2), (1, 3, 6, 6), extra_norm_interval=2, window_size=5)
    torch.manual_seed(0)
    network = SwinV2(size).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    images = torch.randn(2, 3, 45, 83, generator=torch.Generator().manual_seed(group.rank), dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        split = SplitSwinV2(network, tensor_group)
        split.fold()
        return compare(split(images, [(2, 45, 83)] * tensor_group.degree), images, split.spec, expected)


def reassemble(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole parameters from the members' parts; a rule of its own, by the names of the layers."""
    joined = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        _, stage, *rest = name.split(".") if name.startswith("layers.") else ("", "0")
        kind = ".".join(rest[2:] if rest and rest[0] == "blocks" else rest)
        if stage not in "23" or kind.split(".")[0] in ("norm1", "norm2", "enorm"):
            kind = "whole"
        if kind == "attn.qkv.weight":
            joined[name] = torch.cat([torch.cat([part.chunk(3)[which] for part in own]) for which in range(3)])
        elif kind in ("attn.proj.weight", "mlp.fc2.weight"):
            joined[name] = torch.cat(own, dim=1)
        elif kind in ("attn.q_bias", "attn.v_bias", "attn.logit_scale", "attn.cpb_mlp.2.weight") or kind in (
            "mlp.fc1.weight",
            "mlp.fc1.bias",
            "downsample.reduction.weight",
        ):
            joined[name] = torch.cat(own)
        else:
            assert all(torch.equal(part, first) for part in own), name
            joined[name] = first
    return joined


def resident_kib() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """Watches `resident_kib` from beside."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.kib = resident_kib()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.kib = max(self.kib, resident_kib())

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()


def loading(group, tensor_group, files: list[str]) -> dict:
    """Measure what a file leaves in memory, in each format, and check that the parts make up the file."""
    found = {}
    tensors = load_file(next(file for file in files if file.endswith(".safetensors")))
    names = [name for name in tensors if not name.startswith(("norm.", "head."))]
    for file in files:
        with Peak() as peak:
            split = load_backbone(
                "swinv2_tiny", weights=file, window_size=8, pretrained_window_size=8, tensor_group=tensor_group
            )
        grown = (resident_kib() - peak.before) * 1024
        state = split.network.network.state_dict()
        resident = sum(parameter.numel() * parameter.element_size() for parameter in state.values())
        # No part keeps the whole that it was cut from.
        assert sum(parameter.untyped_storage().nbytes() for parameter in state.values()) == resident
        described = split.describe()
        assert described["resident_parameters"] == sum(parameter.numel() for parameter in split.parameters())
        parts = tensor_group.gather_objects(state)
        joined = reassemble(parts)
        assert joined.keys() == set(names)
        assert all(torch.equal(joined[name], tensors[name]) for name in names)
        found[Path(file).suffix] = {
            "grown": grown,
            "peak": (peak.kib - peak.before) * 1024,
            "resident": resident,
            "fingerprint": split.fingerprint,
            "described": described,
        }
        del split, state, parts, joined
    return found


def refusal(load) -> str:
    try:
        load()
    except BackboneError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def faults(group, tensor_group, files: dict[str, str]) -> dict:
    """Find what each rank is told when one of its group has other files or images; everybody goes on afterwards."""

    def load(own: str, others: str = "good", **fields) -> SplitBackbone:
        weights = files[own if group.rank == 1 else others]
        return load_backbone("swinv2_nano", weights=weights, tensor_group=tensor_group, **fields)

    told = {
        "truncated": refusal(lambda: load("truncated")),
        "missing": refusal(lambda: load("missing")),
        "other": refusal(lambda: load("other")),
        "not_finite": refusal(lambda: load("not_finite", "not_finite")),
        "half": refusal(lambda: load("large", "large", dtype=torch.float16)),
    }
    split = load("good")
    wrong = torch.zeros(1, 4, 64, 64) if group.rank == 1 else torch.zeros(1, 3, 64, 64)
    told["images"] = refusal(lambda: split(wrong))
    assert [len(feature) for feature in split(torch.zeros(1, 3, 64, 64))] == [1] * 4
    return told


def main() -> None:
    args = arguments()
    if "load" in args:
        # Nothing is caught here: what becomes of the processes is looked at from outside.
        group = join_process_group("cpu", timeout=60)
        try:
            tensor_group = join_tensor_group(group.world_size)
            load_backbone("swinv2_nano", weights=args["load"][group.rank], tensor_group=tensor_group)
        finally:
            group.close()
        return
    # Freed memory of more than 64 KiB goes back to the system at once (M_MMAP_THRESHOLD): what is left is in use.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    group = join_process_group("cpu", timeout=180)
    result: dict = {"errors": {}, "custom": {}, "loading": {}}
    old = None
    for degree in (2, 4):
        tensor_group = join_tensor_group(degree)
        assert join_tensor_group(degree) is tensor_group
        assert (tensor_group.rank, tensor_group.degree) == (group.rank % degree, degree)
        if old is not None:
            result["left"] = refusal(lambda: old(torch.zeros(1, 3, 64, 64)))  # noqa: B023 - called at once
        result["errors"][degree] = group.gather_objects(forwards(group, tensor_group))
        result["loading"][degree] = group.gather_objects(loading(group, tensor_group, args["files"]))
        if degree == 2:
            result["passes"] = group.gather_objects(passes(group, tensor_group))
            result["half"] = group.gather_objects(half_precision(group, tensor_group))
            result["steps"] = {
                kind: detection_losses(group, own) for kind, own in (("split", tensor_group), ("whole", None))
            }
            result["attending"] = group.gather_objects(attending(group, tensor_group))
            result["custom"] = group.gather_objects(custom_size(group, tensor_group))
            result["faults"] = group.gather_objects(faults(group, tensor_group, args["faults"]))
            old = load_backbone("swinv2_nano", weights="random", tensor_group=tensor_group)
        else:
            result["heads"] = group.gather_objects(refusal(lambda: custom_size(group, tensor_group)))  # noqa: B023
    result["world"] = group.gather_objects(refusal(lambda: join_tensor_group(3)))
    save_result(group, args["result"], result)
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
