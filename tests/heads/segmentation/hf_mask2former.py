"""Transformers' Mask2Former with a head's weights, and its losses at points of our choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from transformers import Mask2FormerConfig as TheirConfig
from transformers.models.mask2former import modeling_mask2former as theirs


def their_config(config, num_classes) -> TheirConfig:
    """Transformers' configuration of the same head."""
    pixel, decoder, loss = config.pixel_decoder, config.transformer_decoder, config.loss
    assert pixel.num_heads == decoder.num_heads
    made = TheirConfig(
        feature_size=pixel.channels,
        mask_feature_size=pixel.channels,
        hidden_dim=pixel.channels,
        encoder_layers=pixel.num_blocks,
        encoder_feedforward_dim=pixel.ffn_channels,
        decoder_layers=decoder.num_blocks + 1,
        num_attention_heads=decoder.num_heads,
        dim_feedforward=decoder.ffn_channels,
        num_queries=decoder.num_queries,
        dropout=0.0,
        num_labels=num_classes,
        class_weight=loss.class_weight,
        mask_weight=loss.mask_weight,
        dice_weight=loss.dice_weight,
        no_object_weight=loss.no_object_weight,
        train_num_points=loss.num_points,
        oversample_ratio=loss.oversample,
        importance_sample_ratio=loss.importance,
    )
    return made


class TheirHead(nn.Module):
    """Their pixel decoder, transformer decoder and classifier, as Mask2FormerForUniversalSegmentation joins them."""

    def __init__(self, config, spec, num_classes):
        super().__init__()
        own = their_config(config, num_classes)
        self.pixel_decoder = theirs.Mask2FormerPixelDecoder(own, feature_channels=list(spec.channels))
        self.transformer = theirs.Mask2FormerTransformerModule(own.feature_size, own)
        self.class_predictor = nn.Linear(own.hidden_dim, num_classes + 1)

    def forward(self, features) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(class logits, mask logits) of every prediction."""
        pixels = self.pixel_decoder(list(features), output_hidden_states=False, return_dict=True)
        out = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(x.transpose(0, 1)) for x in out.intermediate_hidden_states]
        return list(zip(classes, out.masks_queries_logits))


def load(model, head) -> None:
    """Give their modules the weights of our head; every one of ours but the level norms is used, every one of theirs set."""
    names = {}
    for ours in head.state_dict():
        if ours.startswith("level_norms"):
            continue
        name = ours
        for old, new in (
            ("pixel_decoder.input_proj", "pixel_decoder.input_projections"),
            ("pixel_decoder.transformer.level_embed", "pixel_decoder.level_embed"),
            ("pixel_decoder.transformer.encoder.", "pixel_decoder.encoder."),
            ("self_attn.norm", "self_attn.norm"),
            ("pixel_decoder.mask_features", "pixel_decoder.mask_projection"),
            ("adapter_1.norm", "adapter_1.1"),
            ("adapter_1.weight", "adapter_1.0.weight"),
            ("layer_1.norm", "layer_1.1"),
            ("layer_1.weight", "layer_1.0.weight"),
            ("predictor.class_embed", "class_predictor"),
            ("predictor.query_feat", "transformer.queries_features"),
            ("predictor.query_embed", "transformer.queries_embedder"),
            ("predictor.level_embed", "transformer.level_embed"),
            ("predictor.decoder_norm", "transformer.decoder.layernorm"),
        ):
            name = name.replace(old, new)
        if name.startswith("pixel_decoder.encoder."):
            for old, new in (
                ("norm1", "self_attn_layer_norm"),
                ("norm2", "final_layer_norm"),
                ("linear1", "fc1"),
                ("linear2", "fc2"),
            ):
                name = name.replace(old, new)
        if name.startswith("predictor.mask_embed.layers."):
            number, kind = name.split(".")[-2:]
            name = f"transformer.decoder.mask_predictor.mask_embedder.{number}.0.{kind}"
        if name.startswith("predictor.transformer_"):
            kind, number, rest = name.removeprefix("predictor.transformer_").split(".", 2)
            rest = {
                "cross_attention_layers": rest.replace("multihead_attn", "cross_attn").replace(
                    "norm", "cross_attn_layer_norm"
                ),
                "self_attention_layers": rest.replace("norm", "self_attn_layer_norm"),
                "ffn_layers": rest.replace("norm", "final_layer_norm").replace("linear", "fc"),
            }[kind]
            name = f"transformer.decoder.layers.{number}.{rest}"
        names[ours] = name
    state = {}
    for ours, tensor in head.state_dict().items():
        name = names.get(ours)
        if name is None:
            continue
        if ".self_attn.in_proj_" in name and "transformer.decoder" in name:
            for part, own in zip("qkv", tensor.chunk(3)):
                state[name.replace("in_proj_", f"{part}_proj.")] = own
        else:
            state[name] = tensor
    model.load_state_dict(state, strict=True)


@contextmanager
def points_from(draws) -> Iterator[list[torch.Tensor]]:
    """torch.rand, as transformers calls it for points, gives these tensors in turn, repeated over the masks asked for."""
    queue = list(draws)

    def rand(*shape, device=None) -> torch.Tensor:
        own = queue.pop(0)
        assert own.shape == tuple(shape[1:]), (own.shape, shape)
        return own.expand(shape[0], -1, -1).clone()

    with mock.patch.object(theirs.torch, "rand", rand):
        yield queue


def their_loss(config, num_classes, dtype) -> theirs.Mask2FormerLoss:
    """Their criterion with deep supervision."""
    own = their_config(config, num_classes)
    criterion = theirs.Mask2FormerLoss(config=own, weight_dict={}).to(dtype)
    # Made in float32, where 0.1 is off by 1.5e-8.
    criterion.empty_weight[-1] = own.no_object_weight
    return criterion


def weighted(config, losses, suffix="") -> torch.Tensor:
    """(class, mask, dice) of one prediction, with the weights that their get_loss_dict applies."""
    return torch.stack(
        [
            config.loss.class_weight * losses[f"loss_cross_entropy{suffix}"],
            config.loss.mask_weight * losses[f"loss_mask{suffix}"],
            config.loss.dice_weight * losses[f"loss_dice{suffix}"],
        ]
    )
