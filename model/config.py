"""Which base network a run freezes, as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from permafrost.model.errors import BackboneError
from permafrost.model.spec import check_name, per_stage

if TYPE_CHECKING:
    import torch

    from permafrost.model.fairscale_groups import TensorGroup
    from permafrost.model.frozen import FrozenBackbone

OffloadMode = Literal["off", "features", "all"]

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


@dataclass
class BackboneConfig:
    """The frozen base network of a run."""

    name: str
    """swinv2_{nano,tiny,small,base,large,huge,giant_1b,giant}."""
    weights: str
    """A file, a known name, or "random" (seeded; "random:7" for another draw). There is no default: a forgotten field
    must not train for days on noise."""
    window_size: int | tuple[int, int, int, int] | None = None
    """Window, for all stages or one per stage; None takes the one the weights were trained with."""
    pretrained_window_size: int | tuple[int, int, int, int] | None = None
    """Window each stage had when the weights were trained; None reads it from the file. It is refused where it differs
    from the file, and needed to use another window than the file's on purpose."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    prefix: str | None = None
    """Takes only the tensors of the file whose names start with this, without it: "backbone.", "encoder."."""
    extra_norm_interval: int | None = None
    """Blocks between extra norms on the main branch, 0 for none; None: as the table of sizes has it."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.weights, str) or not self.weights:
            raise BackboneError(
                f"backbone.weights is {self.weights!r}: give a file, a known name, or 'random' for an untrained network"
            )
        for field in ("window_size", "pretrained_window_size"):
            value = getattr(self, field)
            if value is not None:
                values = per_stage(value, field=f"backbone.{field}")
                setattr(self, field, value if isinstance(value, int) else values)
        if self.dtype not in DTYPES:
            raise BackboneError(f"backbone.dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        if self.extra_norm_interval is not None and self.extra_norm_interval < 0:
            raise BackboneError(
                f"backbone.extra_norm_interval is {self.extra_norm_interval}: give at least 1, 0 for none, "
                "or None for the size's own"
            )

    def build(self, device: torch.device | str = "cpu", *, tensor_group: TensorGroup | None = None) -> FrozenBackbone:
        """Loads the network.

        Args:
            device: Where it is to run.
            tensor_group: Processes to split it over; None: this one has all of it. Collective over the group.

        Raises:
            BackboneError: If the values do not go together.
            WeightsError: If the weights cannot be read or belong to another network.
        """
        import torch

        from permafrost.model.frozen import load_backbone

        return load_backbone(
            self.name,
            weights=self.weights,
            window_size=self.window_size,
            pretrained_window_size=self.pretrained_window_size,
            dtype=None if self.dtype == "auto" else getattr(torch, self.dtype),
            device=device,
            tensor_group=tensor_group,
            prefix=self.prefix,
            extra_norm_interval=self.extra_norm_interval,
        )
