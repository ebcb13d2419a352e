"""Which base network a run freezes, or fine-tunes, as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from permafrost.model.errors import BackboneError
from permafrost.model.spec import check_fields, check_name, given, per_stage
from permafrost.model.weights.known import find_public

if TYPE_CHECKING:
    import torch

    from permafrost.model.frozen import FrozenBackbone
    from permafrost.model.split.fairscale_groups import TensorGroup
    from permafrost.model.trainable import TrainableBackbone

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
ATTENTION = ("auto", "triton", "cuda", "sdpa", "reference")
RESIDUAL_NORM = ("auto", "triton", "torch", "reference")
GELU = ("auto", "epilogue", "exact")


@dataclass
class BackboneConfig:
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
    """What a Swin attends with: kernels that gather shifted windows from the map (triton, cuda: a GPU, float32 or 16 bits, frozen),
    PyTorch's scaled_dot_product_attention on copied windows (sdpa), or the plain float32 formula (reference). A kernel that
    does not run here is an error. auto: what has been verified on this GPU and dtype, else sdpa; it says which, and why."""
    residual_norm: Literal["auto", "triton", "torch", "reference"] = "auto"
    """What a SwinV2 adds its normalised branches with, and normalises the sum where it has an extra norm: one pass over the map
    (triton: a GPU, float32 or 16 bits, frozen), PyTorch's norm and sum (torch), or the plain formula in float32 (reference). auto
    and errors as of attention."""
    gelu: Literal["auto", "epilogue", "exact"] = "auto"
    """How the MLPs of a Swin compute their GELU: within the product before it (epilogue: a GPU, 16 bits, frozen; by tanh, which moves
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
        for field, values in (("attention", ATTENTION), ("residual_norm", RESIDUAL_NORM), ("gelu", GELU)):
            if getattr(self, field) not in values:
                raise BackboneError(f"backbone.{field} is {getattr(self, field)!r}: give one of {', '.join(values)}")
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
        of_some = ("window_size", "pretrained_window_size", "extra_norm_interval", "taps")
        values = {f"backbone.{field}": getattr(self, field) for field in of_some}
        values |= {f"backbone.{field}": given(getattr(self, field)) for field in ("attention", "residual_norm", "gelu")}
        check_fields(
            self.name,
            **values,
            **{
                "backbone.fp8": self.fp8 or None,
                "backbone.patch_frames": self.patch_frames if self.patch_frames > 1 else None,
            },
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
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("learning_rate_factor", "drop_path_rate", "checkpoint_activations"):
            if getattr(self, name) != defaults[name]:
                raise BackboneError(
                    f"backbone.{name} is {getattr(self, name)}, but backbone.frozen is True and nothing of the network is "
                    "trained: leave it out, or set backbone.frozen to False"
                )

    def build(
        self, device: torch.device | str = "cpu", *, tensor_group: TensorGroup | None = None
    ) -> FrozenBackbone | TrainableBackbone:
        """Loads the network.

        Args:
            device: Where it is to run.
            tensor_group: Processes to split it over; None: this one has all of it. Collective over the group.

        Raises:
            BackboneError: If the values do not go together.
            WeightsError: If the weights cannot be read or belong to another network.
        """
        import torch

        common = {
            "weights": self.weights,
            "window_size": self.window_size,
            "pretrained_window_size": self.pretrained_window_size,
            "dtype": None if self.dtype == "auto" else getattr(torch, self.dtype),
            "device": device,
            "prefix": self.prefix,
            "weights_key": self.weights_key,
            "extra_norm_interval": self.extra_norm_interval,
            "taps": self.taps,
            "attention": self.attention,
            "residual_norm": self.residual_norm,
            "gelu": self.gelu,
        }
        if self.frozen:
            from permafrost.model.frozen import load_backbone

            if self.cuda_graph:
                from permafrost.model.cuda_graph import require_graphs

                # Before it is loaded.
                require_graphs(torch.device(device))
            backbone = load_backbone(self.name, tensor_group=tensor_group, fp8=self.fp8, **common)
            backbone.max_images = self.max_images
            if self.patch_frames > 1:
                backbone.inflate_patches(self.patch_frames)
            if self.compile:
                backbone.compile_forward()
            if self.cuda_graph:
                backbone.capture_forward()
            return backbone
        if tensor_group is not None:
            raise BackboneError("A network that is trained is not split over a tensor group: ZeRO 3 shards it.")
        from permafrost.model.trainable import load_trainable

        trainable = load_trainable(
            self.name, drop_path_rate=self.drop_path_rate, checkpoint_activations=self.checkpoint_activations, **common
        )
        if self.patch_frames > 1:
            trainable.inflate_patches(self.patch_frames)
        return trainable
