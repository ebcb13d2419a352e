"""Make any timm model that gives feature maps a network to freeze: plain ViTs (one map) and hierarchical ones (several)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.hiera import Hiera, Reroll, Unroll
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._nearest import nearest
from permafrost.model.errors import BackboneError, WeightsError
from permafrost.model.network import Network
from permafrost.model.spec import TIMM_PREFIX, FeatureSpec
from permafrost.model.swin.drop_path import DropPath, Generators, draw_kept
from permafrost.model.swin.parts import NO_DECAY
from permafrost.model.timm.weights import TimmModel, fill, find_weights, tables_can_be_rebuilt
from permafrost.model.weights.tensor_map import fingerprint

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

# Finer maps than this (the stem of a ResNet) are tapped only when a recipe asks for them.
FINEST_DEFAULT_STRIDE = 4
# How timm's models are asked to take images of any size: with the first of these that a model knows.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "strict_img_size": False},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


class TimmNetwork(Network):
    """A timm model up to its last tapped layer, for images of any size.

    Maps are raw: what the layer hands on, without the model's final norm, as for every backbone here and as in ViTDet (Li
    et al., ECCV 2022), which takes the last block's. A plain ViT's final norm is a LayerNorm over the channels, and the one
    that a head trains on each level takes its place.

    Images are padded at the bottom and right to whole patches (and to whole cells of the coarsest map) with zeros, which is
    the mean colour after normalisation; maps are cropped to ceil(H / stride). Learned position embeddings are resampled to
    each image's grid by timm (dynamic_img_size), rotary ones are computed for it; Hiera's too, see _hiera_maps. Class and
    register tokens are dropped. Windows of timm's Swins stay as timm makes them for the model's own image size.

    Args:
        name: timm/ and a model's name, with or without a tag.
        taps: indices into timm's `feature_info`, rising; negative ones count from the end. None: the last of each stride
            from 4 up. Maps of one stride are joined along the channels.

    Raises:
        BackboneError: if timm has no such model, it gives no maps, or has no such layers.
    """

    def __init__(self, name: str, *, taps: Sequence[int] | None = None) -> None:
        super().__init__()
        self.name = check_known(name)
        model = build_model(self.name)
        channels = [int(info["num_chs"]) for info in model.feature_info]
        strides = [int(info["reduction"]) for info in model.feature_info]
        self.taps = _chosen_taps(name, strides, taps)
        tapped: dict[int, list[int]] = {}
        for place, tap in enumerate(self.taps):
            tapped.setdefault(strides[tap], []).append(place)
        # Stride of each level, finest first, and which of the tapped maps make it up.
        self.levels = dict(sorted(tapped.items()))
        self.spec = FeatureSpec(
            channels=tuple(sum(channels[self.taps[place]] for place in places) for places in self.levels.values()),
            strides=tuple(self.levels),
        )
        self.min_image_size = min(strides)
        self.multiple = math.lcm(*self.spec.strides)
        if isinstance(model, Hiera):
            units = [stride * side for stride, side in zip(model.patch_stride, model.mask_unit_size)]
            self.multiple = math.lcm(self.multiple, *units)
        settings = model.pretrained_cfg
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        model.prune_intermediate_layers(list(self.taps), prune_norm=True, prune_head=True)
        if isinstance(getattr(model, "head", None), nn.Module):
            # Some versions of timm leave the classifier's norm there: unused, but it would count in the fingerprint.
            model.head = nn.Identity()
        self.model = model
        # Each place where a branch may be dropped, with its rate; see set_training.
        self.drop_paths: list[tuple[DropPath, float]] = []

    def fold(self) -> None:
        """Do nothing: timm computes what depends on the parameters alone in every forward."""

    def set_training(self, config: BackboneConfig) -> dict[str, Any]:
        """Set drop path and recomputation, as permafrost.model.network.Network says.

        timm's blocks have an identity where a branch may be dropped, or a module of timm's own that draws from the global
        generator (its Swins drop branches by default); both are replaced.

        Raises:
            BackboneError: if the model cannot do it.
        """
        drop_path_rate, checkpoint_activations = config.drop_path_rate, config.checkpoint_activations
        if checkpoint_activations:
            if isinstance(self.model, Hiera) or not hasattr(self.model, "set_grad_checkpointing"):
                raise BackboneError(
                    f"backbone.checkpoint_activations is True, but {TIMM_PREFIX}{self.name} cannot compute its blocks "
                    "twice: leave it out."
                )
            self.model.set_grad_checkpointing(True)
        blocks = []
        for block in self.model.modules():
            places = [key for key, child in block.named_children() if _is_drop_path(key, child)]
            if places:
                blocks.append((block, places))
        if drop_path_rate and not blocks:
            raise BackboneError(
                f"backbone.drop_path_rate is {drop_path_rate}, but the blocks of {TIMM_PREFIX}{self.name} have no place "
                "for drop path: leave it out."
            )
        self.drop_paths.clear()
        for (block, places), rate in zip(blocks, torch.linspace(0.0, drop_path_rate, len(blocks)).tolist()):
            for key in places:
                module = DropPath()
                setattr(block, key, module)
                self.drop_paths.append((module, rate))
        return {"drop_path_rate": drop_path_rate, "checkpoint_activations": checkpoint_activations}

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Parts of the names of parameters that timm does not decay, norms and biases aside."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return tuple(sorted({*names, *NO_DECAY}))

    def describe(self) -> dict[str, Any]:
        """Return which layers are tapped, and what is done to images and positions."""
        return {
            "timm": timm.__version__,
            "taps": self.taps,
            "strides": self.spec.strides,
            "channels": self.spec.channels,
            "images_padded_to_multiples_of": self.multiple,
            "position_embedding": self._position_embedding(),
        }

    def forward(self, images: Tensor, *, generator: Generators = None) -> tuple[Tensor, ...]:
        """Return feature maps, finest first.

        Args:
            images: (B, 3, H, W), normalised, in the parameters' dtype.
            generator: what drop path draws from, in training, as draw_kept takes it.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) as `spec` says, channels_last.
        """
        self._draw_branch_scales(images, generator)
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple:
            images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        if isinstance(self.model, Hiera):
            maps = _hiera_maps(self.model, images, self.taps)
        else:
            maps = self.model.forward_intermediates(images, indices=list(self.taps), intermediates_only=True)
        levels = []
        for stride, places in self.levels.items():
            level = maps[places[0]] if len(places) == 1 else torch.cat([maps[place] for place in places], dim=1)
            level = level[..., : -(-height // stride), : -(-width // stride)]
            levels.append(level.contiguous(memory_format=torch.channels_last))
        return tuple(levels)

    def _draw_branch_scales(self, images: Tensor, generator: Generators) -> None:
        rates = [rate for _, rate in self.drop_paths]
        scales: list[Tensor | None] = [None] * len(rates)
        if self.training and any(rates):
            keep = 1.0 - torch.tensor(rates)[:, None]
            scales = list((draw_kept(keep, len(images), generator) / keep).to(images.device, non_blocking=True))
        for (module, _), scale in zip(self.drop_paths, scales):
            module.scales = scale

    @torch.no_grad()
    def check(self) -> None:
        """Run it once on a small image, since timm's own account of a model is not checked anywhere else.

        Raises:
            BackboneError: if the model does not take images of any size, or its maps are not what it says.
        """
        parameter = next(self.model.parameters())
        sides = (2 * self.multiple, 3 * self.multiple)
        images = torch.zeros(1, 3, *sides, dtype=parameter.dtype, device=parameter.device)
        expected = [(1, c, sides[0] // s, sides[1] // s) for c, s in zip(self.spec.channels, self.spec.strides)]
        try:
            found = [tuple(level.shape) for level in self.eval()(images)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Assertions, shapes, indices: whatever a model's layers object to.
            reason = (str(error).splitlines() or [""])[0]
            raise BackboneError(
                f"{TIMM_PREFIX}{self.name} does not take images of any size: it fails on {sides[0]} x {sides[1]} pixels "
                f"({type(error).__name__}: {reason}). Choose a model that does."
            ) from error
        if found != expected:
            raise BackboneError(
                f"{TIMM_PREFIX}{self.name}: its maps of {sides[0]} x {sides[1]} pixels are {found}, but timm's feature_info "
                f"says {expected}. Choose another model, or other taps."
            )

    def _position_embedding(self) -> str:
        if isinstance(self.model, Hiera) and self.model.pos_embed_win is not None:
            return "learned, of the image and of each window; the image's is resampled to each image's grid"
        grid = getattr(self.model, "tokens_spatial_shape", None)
        if grid is None:
            grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        kinds = []
        if isinstance(getattr(self.model, "pos_embed", None), Tensor) and grid is not None:
            kinds.append(f"learned on {grid[0]} x {grid[1]} cells, resampled to each image's grid")
        if getattr(self.model, "rope", None) is not None:
            kinds.append("rotary")
        return " and ".join(kinds) or "as in timm"


def check_known(name: str) -> str:
    """Return the name as timm spells it, without the prefix.

    Raises:
        BackboneError: if timm has no such model, or no such tag of it, with the nearest.
    """
    own_name = name.removeprefix(TIMM_PREFIX)
    architecture, _, tag = own_name.partition(".")
    if not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models(), cutoff=0.6)
        hint = f" Did you mean {TIMM_PREFIX + close[0]!r}?" if close else " `timm.list_models()` lists them."
        raise BackboneError(f"timm {timm.__version__} has no model {architecture!r} ({name!r}).{hint}")
    tags = [other.partition(".")[2] for other in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        close = nearest(tag, tags, cutoff=0.0)
        hint = f" Did you mean {TIMM_PREFIX}{architecture}.{close[0]}?" if close else " It has none: leave it out."
        raise BackboneError(f"timm {timm.__version__} knows no tag {tag!r} of {architecture!r} ({name!r}).{hint}")
    return own_name


def build_model(name: str) -> TimmModel:
    """Build timm's model for images of any size, whole, without memory for its weights.

    Args:
        name: as timm spells it.

    Returns:
        The model on the meta device where timm allows it; on the CPU where a module keeps tables that it cannot compute
        later, or reads values while it is built (timm 1.0.20 does so for every model).

    Raises:
        BackboneError: if it gives no feature maps.
    """
    try:
        with torch.device("meta"):
            model = _created(name)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        model = None
    if model is None or not tables_can_be_rebuilt(model):
        model = _created(name)
    for method in ("forward_intermediates", "prune_intermediate_layers"):
        if not hasattr(model, method):
            raise BackboneError(
                f"{TIMM_PREFIX}{name} cannot be a backbone: in timm {timm.__version__} it has no {method}, so it gives no "
                "feature maps by layer. Choose another model."
            )
    return model


def load_timm(
    config: BackboneConfig, *, dtype: torch.dtype, device: torch.device
) -> tuple[TimmNetwork, dict[str, Any]]:
    """Load a timm model with its weights.

    Returns:
        The network, and where it comes from: `weights`, `mean`, `std`, `fingerprint`, and `choices` for `describe`.

    Raises:
        BackboneError: as of TimmNetwork, or if the model does not run on images of any size.
        WeightsError: if the weights cannot be had, or belong to another network.
    """
    network = TimmNetwork(config.name, taps=config.taps)
    file = find_weights(network.name, config, model=network.model, build=lambda: build_model(network.name))
    used = sorted(network.model.state_dict().keys() & file.tensors.keys())
    fill(network.model, file.tensors, dtype=dtype)
    if dtype == torch.float16:
        overflowing = [key for key, tensor in network.model.state_dict().items() if not torch.isfinite(tensor).all()]
        if overflowing:
            raise WeightsError(f"{file.source}: {overflowing[0]} overflows in float16; use bfloat16 or float32.")
    network.to(device)
    network.check()
    return network, {
        "weights": file.source,
        "mean": network.mean,
        "std": network.std,
        "fingerprint": fingerprint(file.source_tensors(used)),
        "choices": {
            "resampled": sorted(file.originals.keys() & set(used)),
            "left_out": sorted(file.tensors.keys() - set(used)),
        },
    }


def _created(name: str) -> TimmModel:
    """Return the model, asked to take images of any size where it can be asked."""
    for options in _ANY_SIZE:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            if not any(option in str(error) for option in options):
                raise
    raise AssertionError("the last of the options is none")


def _is_drop_path(name: str, module: nn.Module) -> bool:
    return name.startswith("drop_path") and isinstance(module, (nn.Identity, timm.layers.DropPath, DropPath))


def _chosen_taps(name: str, strides: Sequence[int], taps: Sequence[int] | None) -> tuple[int, ...]:
    if taps is None:
        last = {stride: tap for tap, stride in enumerate(strides) if stride >= FINEST_DEFAULT_STRIDE}
        if not last:
            raise BackboneError(
                f"{name}: none of its {len(strides)} layers has a stride of {FINEST_DEFAULT_STRIDE} or more; choose taps."
            )
        return tuple(sorted(last.values()))
    count = len(strides)
    if any(not -count <= tap < count for tap in taps):
        raise BackboneError(f"taps is {tuple(taps)}, but {name} has {count} layers to tap: 0 to {count - 1}.")
    chosen = tuple(tap % count for tap in taps)
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise BackboneError(f"taps is {tuple(taps)}: name layers of {name} in rising order, each once.")
    return chosen


def _hiera_maps(model: Hiera, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Compute Hiera's stages for an image of any size in whole mask units; timm's own forward is tied to one size.

    The order of the tokens follows from the image's size. Position embeddings of the whole image are resampled to its
    grid. Where they were trained without a part for each window, that blurs what they learned about the windows, and
    features suffer (Bolya et al., "Window Attention is Bugged: How not to Interpolate Position Embeddings", ICLR 2024):
    the abswin models have that part, and it is repeated exactly.

    Args:
        model: up to its last tapped stage.
        images: (B, 3, H, W) with sides in multiples of 32.
        taps: Stages.

    Returns:
        One (B, C, H / s, W / s) map per tap.
    """
    size = tuple(images.shape[-2:])
    grid = [side // stride for side, stride in zip(size, model.patch_stride)]
    tokens = model.patch_embed(images) + _hiera_positions(model, grid)
    schedule = [model.q_stride] * (len(model.stage_ends) - 1)
    tokens = Unroll(size, model.patch_stride, schedule)(tokens)
    reroll = Reroll(size, model.patch_stride, schedule, model.stage_ends, model.q_pool)
    ends = {model.stage_ends[tap] for tap in taps}
    maps = []
    for number, block in enumerate(model.blocks):
        tokens = block(tokens)
        if number in ends:
            maps.append(reroll(tokens, number).permute(0, 3, 1, 2))
    return maps


def _hiera_positions(model: Hiera, grid: Sequence[int]) -> Tensor:
    """Return (1, H' W', C) embeddings of the places of a grid."""
    positions = model.pos_embed
    assert positions is not None
    if model.pos_embed_win is None:
        if list(grid) == list(model.tokens_spatial_shape):
            return positions
        return resample_abs_pos_embed(
            positions, new_size=list(grid), old_size=list(model.tokens_spatial_shape), num_prefix_tokens=0
        )
    windows = model.pos_embed_win.tile([side // unit for side, unit in zip(grid, model.mask_unit_size)])
    # PyTorch has no antialiased bicubic resampling in half precision on every device.
    whole = F.interpolate(positions.float(), size=windows.shape[-2:], mode="bicubic", antialias=True)
    return (whole.to(windows.dtype) + windows).flatten(2).transpose(1, 2)
