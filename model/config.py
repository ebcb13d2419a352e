"""Configure the base network that a run freezes, or fine-tunes, in plain values. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from permafrost._configuration import Configuration
from permafrost.model.errors import BackboneError
from permafrost.model.spec import SWIN_V1_SIZES, TIMM_PREFIX, check_name, per_stage
from permafrost.model.weights.known import find_public

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
ATTENTION = ("auto", "triton", "cuda", "sdpa", "reference")
RESIDUAL_NORM = ("auto", "triton", "torch", "reference")
GELU = ("auto", "epilogue", "exact")

OF_SOME = (
    *("window_size", "pretrained_window_size", "extra_norm_interval", "taps"),
    *("attention", "residual_norm", "gelu", "fp8", "patch_frames"),
)
"""Fields that mean something for some networks only: all but `taps` for Swins, `taps` for timm models."""
OF_SWIN_V2 = {"extra_norm_interval": "has extra norms", "residual_norm": "normalises a branch at its end"}
OF_TRAINING = ("learning_rate_factor", "drop_path_rate", "checkpoint_activations")
NOT_SPLIT = {
    "compile": "a backbone that is split over a tensor group is not compiled: its forward waits for the other processes in every "
    "block. Set backbone.compile to False, or mesh.tensor to 1",
    "cuda_graph": "a forward that waits for other processes is not captured. Set backbone.cuda_graph to False, or mesh.tensor to 1",
    "fp8": "a backbone that is split over a tensor group is not quantised. Set backbone.fp8 to False, or mesh.tensor to 1",
}
"""Fields that a backbone cannot have which is split over a tensor group, and why."""


@dataclass
class BackboneConfig(Configuration):
    """The base network of a run: frozen, unless `frozen` says otherwise."""

    name: str
    """swinv2_{nano,tiny,small,base,large,huge,giant_1b,giant}, swin_{tiny,small,base,large} (Swin V1), or timm/ and any
    timm model that gives feature maps."""
    weights: str
    """A file or folder, a known name (downloaded once), or "random" (seeded; "random:7" for another draw); for a timm/
    model also "pretrained", the weights timm has for it. There is no default: a forgotten field must not train for days
    on noise."""
    window_size: int | tuple[int, int, int, int] | None = None
    """Window, for all stages or one per stage; None takes the one the weights were trained with."""
    pretrained_window_size: int | tuple[int, int, int, int] | None = None
    """Window each stage had when the weights were trained; None reads it from the file. It is refused where it differs
    from the file, and needed to use another window than the file's on purpose (of a Swin V1 the position tables are
    then resampled)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere; float32 everywhere if it is not frozen."""
    prefix: str | None = None
    """Takes only the tensors of the file whose names start with this, without it: "my_net.". None finds the prefix."""
    weights_key: str | None = None
    """The entry of a PyTorch checkpoint that holds the weights: "student". None finds it (model, state_dict, teacher)."""
    extra_norm_interval: int | None = None
    """SwinV2: blocks between extra norms on the main branch, 0 for none; None: as the table of sizes has it."""
    taps: tuple[int, ...] | None = None
    """Layers of a timm/ model whose maps are given out, rising, from the end if negative: stages of a hierarchical model,
    blocks of a plain one; taps of one stride become one map, joined along the channels. None: the last of each stride
    from 4 up, so every stage, or the last block."""
    attention: Literal["auto", "triton", "cuda", "sdpa", "reference"] = "auto"
    """A Swin's attention: kernels that gather shifted windows from the map (triton, cuda: a GPU, float32 or 16 bits, frozen),
    PyTorch's scaled_dot_product_attention on copied windows (sdpa), or the plain float32 formula (reference). A kernel that
    does not run here is an error. auto: what has been verified on this GPU and dtype, else sdpa; it says which, and why."""
    residual_norm: Literal["auto", "triton", "torch", "reference"] = "auto"
    """A SwinV2's sum with a normalised branch, and its norm where there is an extra one: one pass over the map
    (triton: a GPU, float32 or 16 bits, frozen), PyTorch's norm and sum (torch), or the plain formula in float32 (reference). auto
    and errors as of attention."""
    gelu: Literal["auto", "epilogue", "exact"] = "auto"
    """The GELU of a Swin's MLPs: within the product before it (epilogue: a GPU, 16 bits, frozen; by tanh, which moves
    features by 1e-4 to 3e-4), or as it is defined, in a pass of its own (exact). auto and errors as of attention."""
    compile: bool = False
    """Runs the frozen forward through torch.compile: a program for each size of images, made when it first comes, which takes
    up to minutes on a CPU. Needs a C++ compiler there, Triton on a GPU, and mesh.tensor 1."""
    cuda_graph: bool = False
    """Replays the frozen forward as a CUDA graph, recorded for each size of images when it first comes: for small images, whose
    launches take the CPU longer than the GPU. Each size keeps its memory. Needs a GPU, and mesh.tensor 1."""
    fp8: bool = False
    """Multiplies in 8-bit floating point (E4M3, a scale per row; weights quantised once, when they are loaded) in the linear layers
    of a frozen Swin: features change by a few percent. Needs a GPU of compute capability 9.0, bfloat16, and mesh.tensor 1; pays
    together with compile, which joins the quantising of activations with what comes before."""
    max_images: int | None = None
    """Most images in one pass through the frozen network; more are taken in several. A clip has as many as frames. None: all
    of a micro-batch at once."""
    patch_frames: int = 1
    """Frames of a clip that a Swin's patch embedding takes together: 1 sees each by itself; 2 is Video-Swin's, whose weights are the
    file's repeated over both and halved. Clips then have half as many maps as frames."""
    frozen: bool = True
    """False trains all of the network with its one head. The fields below are for that, and mean nothing while frozen."""
    learning_rate_factor: float = 1.0
    """The network's learning rate as a multiple of the head's (detection: 1; Mask2Former and Video Swin: 0.1)."""
    drop_path_rate: float = 0.0
    """Probability of dropping a residual branch of the last block for a sample, rising linearly from 0 in the first."""
    checkpoint_activations: bool = False
    """Keeps the input of each block only, and computes the rest again in the backward: less memory, a third more
    compute. The same gradients but for rounding."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.weights, str) or not self.weights:
            raise BackboneError(
                f"backbone.weights is {self.weights!r}: give a file, a known name, or 'random' for an untrained network"
            )
        public = find_public(self.weights)
        if public is not None and public.backbone != self.name and not Path(self.weights).expanduser().exists():
            # Before it is downloaded.
            raise BackboneError(
                f"backbone.weights is {self.weights!r}, which are weights of {public.backbone}, but backbone.name is "
                f"{self.name!r}"
            )
        for field in ("window_size", "pretrained_window_size"):
            value = getattr(self, field)
            if value is not None:
                values = per_stage(value, field=f"backbone.{field}")
                setattr(self, field, value if isinstance(value, int) else values)
        if self.dtype not in DTYPES:
            raise BackboneError(f"backbone.dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        for field, choices in (("attention", ATTENTION), ("residual_norm", RESIDUAL_NORM), ("gelu", GELU)):
            if getattr(self, field) not in choices:
                raise BackboneError(f"backbone.{field} is {getattr(self, field)!r}: give one of {', '.join(choices)}")
        if self.extra_norm_interval is not None and self.extra_norm_interval < 0:
            raise BackboneError(
                f"backbone.extra_norm_interval is {self.extra_norm_interval}: give at least 1, 0 for none, "
                "or None for the size's own"
            )
        if self.taps is not None:
            valid = isinstance(self.taps, (tuple, list)) and len(self.taps) > 0
            if not valid or any(isinstance(tap, bool) or not isinstance(tap, int) for tap in self.taps):
                raise BackboneError(f"backbone.taps is {self.taps!r}: give at least one number of a layer, or None")
            self.taps = tuple(self.taps)
        if self.max_images is not None and self.max_images < 1:
            raise BackboneError(f"backbone.max_images is {self.max_images}: give at least 1, or None for all at once")
        if self.patch_frames < 1:
            raise BackboneError(f"backbone.patch_frames is {self.patch_frames}: give 1 for each frame by itself, or 2")
        self._check_training()
        self._check_kind()

    @property
    def random_seed(self) -> int | None:
        """Return the seed that the weights are drawn with; None: they are read."""
        drawn = re.fullmatch(r"random(?::(\d+))?", self.weights)
        return int(drawn[1] or 0) if drawn else None

    @property
    def file_options(self) -> dict[str, str | None]:
        """Return how the file of the weights is read, as `read_weights` takes it."""
        return {"prefix": self.prefix, "weights_key": self.weights_key}

    def _given(self, names: Iterable[str]) -> list[str]:
        """Return those of the fields that are not at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _check_kind(self) -> None:
        """Refuse what means nothing for this kind of network."""
        given = self._given(OF_SOME)
        if self.name in SWIN_V1_SIZES:
            for field in (field for field in given if field in OF_SWIN_V2 and getattr(self, field)):
                raise BackboneError(
                    f"backbone.{field} is {getattr(self, field)!r}, but {self.name} is a Swin V1, and only SwinV2 "
                    f"{OF_SWIN_V2[field]}; leave it out."
                )
        is_timm = self.name.startswith(TIMM_PREFIX)
        wrong = [field for field in given if (field == "taps") != is_timm]
        if wrong:
            reason = f"the layers of a {TIMM_PREFIX} backbone can be chosen, {self.name} always gives all its stages"
            if is_timm:
                reason = f"{self.name} is built as timm defines it, windows and norms included"
            raise BackboneError(
                f"backbone.{wrong[0]} is {getattr(self, wrong[0])!r}, but {reason}: leave "
                f"{' and '.join(f'backbone.{field}' for field in wrong)} out."
            )

    def _check_training(self) -> None:
        if not self.learning_rate_factor > 0 or self.learning_rate_factor == float("inf"):
            raise BackboneError(
                f"backbone.learning_rate_factor is {self.learning_rate_factor}: give a number above 0; to keep the network "
                "as it is, leave backbone.frozen at True"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise BackboneError(
                f"backbone.drop_path_rate is {self.drop_path_rate}: give a probability of at least 0 and below 1"
            )
        if not self.frozen:
            if self.max_images is not None:
                raise BackboneError(
                    f"backbone.max_images is {self.max_images}, but backbone.frozen is False: a network that learns keeps what all "
                    "images leave behind, in however many passes. Leave it out; more engine.accumulation takes less memory"
                )
            for field, done in (("compile", "compiled"), ("cuda_graph", "captured"), ("fp8", "quantised")):
                if getattr(self, field):
                    raise BackboneError(
                        f"backbone.{field} is True, but backbone.frozen is False: only a frozen forward is {done}. Leave it out"
                    )
            if self.dtype not in ("auto", "float32", "float64"):
                raise BackboneError(
                    f"backbone.dtype is {self.dtype!r}, but backbone.frozen is False: trained parameters are float32, or small "
                    "updates would be lost. Leave it at auto; engine.precision decides in what the network computes"
                )
            return
        for name in self._given(OF_TRAINING):
            raise BackboneError(
                f"backbone.{name} is {getattr(self, name)}, but backbone.frozen is True and nothing of the network is "
                "trained: leave it out, or set backbone.frozen to False"
            )
