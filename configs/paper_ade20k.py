"""Train the paper's rows on ADE20K ("Could Giant Pretrained Image Models Extract Universal Representations?", NeurIPS 2022).

Table 1: pretraining tasks; 3: head networks; 5: sizes of the base network. Every row is two recipes, the frozen backbone and,
`_full`, its full fine-tuning twin; where two rows are one run, both tables are named.

    deepspeed --num_gpus 8 --module permafrost.launcher.train paper_ade20k:NAME --data.root /path/to/ADEChallengeData2016

Protocol of all: trained on the training split, mIoU on the validation split. Whether the published numbers are of one scale or
of several is not said beside them; Figure 1 says multi-scale of ADE20K, and 55.5 of the fine-tuned SwinV2-B is the public
Mask2Former's multi-scale 55.1 rather than its single-scale 53.9, so every one is probably multi-scale. Runs are scored at one scale
while they train; `permafrost evaluate RUN --scales 0.5 0.75 1 1.25 1.5 1.75 --flip` is the one to compare.
Image size, learning rate and schedule are not published either: those are `ade20k:swinv2_base_mask2former`'s. The fine-tuned twins
train the backbone at a tenth of the head's rate, as the public recipe does. Table 1's numbers of SUP-22K are those of Table 3's
(9 + 1) row, so its other rows take that head too, although the text says (3 + 1). Table 5 has the best head of each network: six
pixel-decoder blocks and (9 + 1) predictions, the published B-22K's.
GPU plan of all, not measured: 8 GPUs, 2 images each; 40 GB frozen and 80 GB fine-tuned, where activations are computed again.
Weights are read from the file that each recipe names, in the current folder (field backbone.weights).
"""

from __future__ import annotations

from collections.abc import Callable

from permafrost.configs.ade20k import swinv2_base_mask2former
from permafrost.configs.paper_parts import (
    BASE_1K,
    BASE_22K,
    ESVIT_1K,
    ICAR_LAION,
    ICAR_LAION_22K,
    LARGE_22K,
    SIMMIM_1K,
    SUP_1K,
    TINY_1K,
    Protocol,
    Row,
    recipes_of,
)
from permafrost.heads import Mask2FormerConfig, PixelDecoderConfig, TransformerDecoderConfig
from permafrost.launcher import EngineConfig, Experiment
from permafrost.model import BackboneConfig

ADE20K = Protocol(
    base=swinv2_base_mask2former,
    prefix="paper_ade20k",
    command="permafrost train paper_ade20k:NAME --data.root /path/to/ADEChallengeData2016",
    metrics=("mIoU",),
    learning_rate_factor=0.1,
    remark="Published mIoU: probably multi-scale.",
)


def _head(pixel: int, decoder: int) -> Callable[[], Mask2FormerConfig]:
    """Return what builds a Mask2Former of `pixel` pixel-decoder blocks and (`decoder` + 1) predictions."""
    return lambda: Mask2FormerConfig(
        pixel_decoder=PixelDecoderConfig(num_blocks=pixel),
        transformer_decoder=TransformerDecoderConfig(num_blocks=decoder),
    )


HEAD_1_3, HEAD_1_9, HEAD_6_3, HEAD_6_9 = _head(1, 3), _head(1, 9), _head(6, 3), _head(6, 9)

# fmt: off
TABLE_1 = (
    #   recipe                   pretraining                                         network         head      frozen  fine-tuned
    Row("table1_sup_1k",         "supervised, ImageNet-1K",                          SUP_1K,         HEAD_1_9, [49.8], [52.3]),
    Row("table1_esvit_1k",       "EsViT contrastive, ImageNet-1K",                   ESVIT_1K,       HEAD_1_9, [49.7], [52.1]),
    Row("table1_simmim_1k",      "SimMIM masked images, ImageNet-1K",                SIMMIM_1K,      HEAD_1_9, [42.4], [51.7]),
    Row("table1_icar_laion",     "iCar image-text alignment, Laion",                 ICAR_LAION,     HEAD_1_9, [51.0], [55.3]),
    Row("table1_icar_laion_22k", "iCar with classification, Laion and ImageNet-22K", ICAR_LAION_22K, HEAD_1_9, [51.1], [55.4]),
)
TABLE_3 = (
    #   recipe                    head                                             network   head      frozen  fine-tuned
    Row("table3_pixel1_decoder3", "one pixel-decoder block, (3 + 1) predictions",  BASE_22K, HEAD_1_3, [51.0], [55.4]),
    Row("table3_pixel6_decoder3", "six pixel-decoder blocks, (3 + 1) predictions", BASE_22K, HEAD_6_3, [52.6], [55.3]),
    Row("table3_pixel1_decoder9", "one pixel-decoder block, (9 + 1) predictions",  BASE_22K, HEAD_1_9, [51.9], [55.3], "Table 1 SUP-22K"),
    Row("table3_pixel6_decoder9", "six pixel-decoder blocks, (9 + 1) predictions", BASE_22K, HEAD_6_9, [53.2], [55.5], "Table 5"),
)
TABLE_5 = (
    #   recipe              network         network    head      frozen  fine-tuned
    Row("table5_tiny_1k",   "SwinV2-T-1K",  TINY_1K,   HEAD_6_9, [48.9], [50.3]),
    Row("table5_base_1k",   "SwinV2-B-1K",  BASE_1K,   HEAD_6_9, [51.5], [52.7]),
    Row("table5_large_22k", "SwinV2-L-22K", LARGE_22K, HEAD_6_9, [54.4], [56.5]),
)
# fmt: on
globals().update(
    recipes_of(__name__, "Table 1", TABLE_1, ADE20K)
    | recipes_of(__name__, "Table 3", TABLE_3, ADE20K)
    | recipes_of(__name__, "Table 5", TABLE_5, ADE20K)
)


def table5_giant() -> Experiment:
    """Table 5, SwinV2-G-ext22K: frozen, 57.6 mIoU.

        permafrost train paper_ade20k:table5_giant --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_giant_ext22k.pth, 3 B parameters, not released. On cards below 24 GB --mesh.tensor 2. There is no fine-tuned twin
    in the paper.
    Published mIoU: probably multi-scale.
    """
    experiment = swinv2_base_mask2former()
    experiment.name = "paper_ade20k_table5_giant"
    experiment.backbone = BackboneConfig(name="swinv2_giant", weights="swinv2_giant_ext22k.pth")
    experiment.heads["segmentation"].model = HEAD_6_9()
    experiment.engine = EngineConfig(kind="deepspeed", zero_stage=2)
    return experiment
