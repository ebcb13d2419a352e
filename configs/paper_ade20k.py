"""ADE20K rows of the paper's tables ("Could Giant Pretrained Image Models Extract Universal Representations?", NeurIPS 2022).

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

from permafrost.configs.ade20k import swinv2_base_mask2former
from permafrost.configs.paper_parts import fine_tuned
from permafrost.launcher import EngineConfig, Experiment
from permafrost.model import BackboneConfig


def _row(
    name: str, weights: str, *, backbone: str = "swinv2_base", window: int, pixel: int, decoder: int
) -> Experiment:
    """A head of `pixel` pixel-decoder blocks and `decoder` transformer blocks on a frozen network."""
    experiment = swinv2_base_mask2former()
    experiment.name = f"paper_ade20k_{name}"
    experiment.backbone = BackboneConfig(name=backbone, weights=weights, window_size=window)
    model = experiment.heads["segmentation"].model
    model.pixel_decoder.num_blocks, model.transformer_decoder.num_blocks = pixel, decoder
    return experiment


def _full(name: str, base: Experiment) -> Experiment:
    """The full fine-tuning twin: the backbone learns at a tenth of the head's rate."""
    base.name = f"paper_ade20k_{name}"
    base.backbone = fine_tuned(base.backbone, learning_rate_factor=0.1)
    return base


def table1_sup_1k() -> Experiment:
    """Table 1, supervised, ImageNet-1K: frozen, 49.8 mIoU.

        permafrost train paper_ade20k:table1_sup_1k --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_1k_window7_224.pth, not released; the paper's has 224-pixel images and window 7. The nearest release is
    swinv2_base_patch4_window8_256.pth with --backbone.window-size 8.
    Published mIoU: probably multi-scale.
    """
    return _row("table1_sup_1k", "swinv2_base_1k_window7_224.pth", window=7, pixel=1, decoder=9)


def table1_sup_1k_full() -> Experiment:
    """Table 1, supervised, ImageNet-1K: fine-tuned, 52.3 mIoU.

        permafrost train paper_ade20k:table1_sup_1k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table1_sup_1k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table1_sup_1k_full", table1_sup_1k())


def table1_esvit_1k() -> Experiment:
    """Table 1, EsViT contrastive, ImageNet-1K: frozen, 49.7 mIoU.

        permafrost train paper_ade20k:table1_esvit_1k --data.root /path/to/ADEChallengeData2016

    Weights: esvit_swinv2_base_1k.pth, of a SwinV2-B pretrained with EsViT; not released.
    Published mIoU: probably multi-scale.
    """
    return _row("table1_esvit_1k", "esvit_swinv2_base_1k.pth", window=7, pixel=1, decoder=9)


def table1_esvit_1k_full() -> Experiment:
    """Table 1, EsViT contrastive, ImageNet-1K: fine-tuned, 52.1 mIoU.

        permafrost train paper_ade20k:table1_esvit_1k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table1_esvit_1k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table1_esvit_1k_full", table1_esvit_1k())


def table1_simmim_1k() -> Experiment:
    """Table 1, SimMIM masked images, ImageNet-1K: frozen, 42.4 mIoU.

        permafrost train paper_ade20k:table1_simmim_1k --data.root /path/to/ADEChallengeData2016

    Weights: simmim_swinv2_base_1k.pth, not released at window 7. The nearest release is
    swinv2_base_1k_500k.pth with --backbone.window-size 12.
    Published mIoU: probably multi-scale.
    """
    return _row("table1_simmim_1k", "simmim_swinv2_base_1k.pth", window=7, pixel=1, decoder=9)


def table1_simmim_1k_full() -> Experiment:
    """Table 1, SimMIM masked images, ImageNet-1K: fine-tuned, 51.7 mIoU.

        permafrost train paper_ade20k:table1_simmim_1k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table1_simmim_1k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table1_simmim_1k_full", table1_simmim_1k())


def table1_icar_laion() -> Experiment:
    """Table 1, iCar image-text alignment, Laion: frozen, 51.0 mIoU.

        permafrost train paper_ade20k:table1_icar_laion --data.root /path/to/ADEChallengeData2016

    Weights: icar_swinv2_base_laion.pth, not released.
    Published mIoU: probably multi-scale.
    """
    return _row("table1_icar_laion", "icar_swinv2_base_laion.pth", window=7, pixel=1, decoder=9)


def table1_icar_laion_full() -> Experiment:
    """Table 1, iCar image-text alignment, Laion: fine-tuned, 55.3 mIoU.

        permafrost train paper_ade20k:table1_icar_laion_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table1_icar_laion`.
    Published mIoU: probably multi-scale.
    """
    return _full("table1_icar_laion_full", table1_icar_laion())


def table1_icar_laion_22k() -> Experiment:
    """Table 1, iCar with classification, Laion and ImageNet-22K: frozen, 51.1 mIoU.

        permafrost train paper_ade20k:table1_icar_laion_22k --data.root /path/to/ADEChallengeData2016

    Weights: icar_swinv2_base_laion_22k.pth, not released.
    Published mIoU: probably multi-scale.
    """
    return _row("table1_icar_laion_22k", "icar_swinv2_base_laion_22k.pth", window=7, pixel=1, decoder=9)


def table1_icar_laion_22k_full() -> Experiment:
    """Table 1, iCar with classification, Laion and ImageNet-22K: fine-tuned, 55.4 mIoU.

        permafrost train paper_ade20k:table1_icar_laion_22k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table1_icar_laion_22k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table1_icar_laion_22k_full", table1_icar_laion_22k())


def table3_pixel1_decoder3() -> Experiment:
    """Table 3, one pixel-decoder block, (3 + 1) predictions: frozen, 51.0 mIoU.

        permafrost train paper_ade20k:table3_pixel1_decoder3 --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_patch4_window12_192_22k.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row("table3_pixel1_decoder3", "swinv2_base_patch4_window12_192_22k.pth", window=12, pixel=1, decoder=3)


def table3_pixel1_decoder3_full() -> Experiment:
    """Table 3, one pixel-decoder block, (3 + 1) predictions: fine-tuned, 55.4 mIoU.

        permafrost train paper_ade20k:table3_pixel1_decoder3_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table3_pixel1_decoder3`.
    Published mIoU: probably multi-scale.
    """
    return _full("table3_pixel1_decoder3_full", table3_pixel1_decoder3())


def table3_pixel6_decoder3() -> Experiment:
    """Table 3, six pixel-decoder blocks, (3 + 1) predictions: frozen, 52.6 mIoU.

        permafrost train paper_ade20k:table3_pixel6_decoder3 --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_patch4_window12_192_22k.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row("table3_pixel6_decoder3", "swinv2_base_patch4_window12_192_22k.pth", window=12, pixel=6, decoder=3)


def table3_pixel6_decoder3_full() -> Experiment:
    """Table 3, six pixel-decoder blocks, (3 + 1) predictions: fine-tuned, 55.3 mIoU.

        permafrost train paper_ade20k:table3_pixel6_decoder3_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table3_pixel6_decoder3`.
    Published mIoU: probably multi-scale.
    """
    return _full("table3_pixel6_decoder3_full", table3_pixel6_decoder3())


def table3_pixel1_decoder9() -> Experiment:
    """Table 3 and Table 1 SUP-22K, one pixel-decoder block, (9 + 1) predictions: frozen, 51.9 mIoU.

        permafrost train paper_ade20k:table3_pixel1_decoder9 --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_patch4_window12_192_22k.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row("table3_pixel1_decoder9", "swinv2_base_patch4_window12_192_22k.pth", window=12, pixel=1, decoder=9)


def table3_pixel1_decoder9_full() -> Experiment:
    """Table 3 and Table 1 SUP-22K, one pixel-decoder block, (9 + 1) predictions: fine-tuned, 55.3 mIoU.

        permafrost train paper_ade20k:table3_pixel1_decoder9_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table3_pixel1_decoder9`.
    Published mIoU: probably multi-scale.
    """
    return _full("table3_pixel1_decoder9_full", table3_pixel1_decoder9())


def table3_pixel6_decoder9() -> Experiment:
    """Table 3 and Table 5, six pixel-decoder blocks, (9 + 1) predictions: frozen, 53.2 mIoU.

        permafrost train paper_ade20k:table3_pixel6_decoder9 --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_patch4_window12_192_22k.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row("table3_pixel6_decoder9", "swinv2_base_patch4_window12_192_22k.pth", window=12, pixel=6, decoder=9)


def table3_pixel6_decoder9_full() -> Experiment:
    """Table 3 and Table 5, six pixel-decoder blocks, (9 + 1) predictions: fine-tuned, 55.5 mIoU.

        permafrost train paper_ade20k:table3_pixel6_decoder9_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table3_pixel6_decoder9`.
    Published mIoU: probably multi-scale.
    """
    return _full("table3_pixel6_decoder9_full", table3_pixel6_decoder9())


def table5_tiny_1k() -> Experiment:
    """Table 5, SwinV2-T-1K: frozen, 48.9 mIoU.

        permafrost train paper_ade20k:table5_tiny_1k --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_tiny_patch4_window8_256.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row(
        "table5_tiny_1k", "swinv2_tiny_patch4_window8_256.pth", backbone="swinv2_tiny", window=8, pixel=6, decoder=9
    )


def table5_tiny_1k_full() -> Experiment:
    """Table 5, SwinV2-T-1K: fine-tuned, 50.3 mIoU.

        permafrost train paper_ade20k:table5_tiny_1k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table5_tiny_1k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table5_tiny_1k_full", table5_tiny_1k())


def table5_base_1k() -> Experiment:
    """Table 5, SwinV2-B-1K: frozen, 51.5 mIoU.

        permafrost train paper_ade20k:table5_base_1k --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_base_patch4_window8_256.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row("table5_base_1k", "swinv2_base_patch4_window8_256.pth", window=8, pixel=6, decoder=9)


def table5_base_1k_full() -> Experiment:
    """Table 5, SwinV2-B-1K: fine-tuned, 52.7 mIoU.

        permafrost train paper_ade20k:table5_base_1k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table5_base_1k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table5_base_1k_full", table5_base_1k())


def table5_large_22k() -> Experiment:
    """Table 5, SwinV2-L-22K: frozen, 54.4 mIoU.

        permafrost train paper_ade20k:table5_large_22k --data.root /path/to/ADEChallengeData2016

    Weights: swinv2_large_patch4_window12_192_22k.pth, of the Swin Transformer release.
    Published mIoU: probably multi-scale.
    """
    return _row(
        "table5_large_22k",
        "swinv2_large_patch4_window12_192_22k.pth",
        backbone="swinv2_large",
        window=12,
        pixel=6,
        decoder=9,
    )


def table5_large_22k_full() -> Experiment:
    """Table 5, SwinV2-L-22K: fine-tuned, 56.5 mIoU.

        permafrost train paper_ade20k:table5_large_22k_full --data.root /path/to/ADEChallengeData2016

    Weights: those of `paper_ade20k:table5_large_22k`.
    Published mIoU: probably multi-scale.
    """
    return _full("table5_large_22k_full", table5_large_22k())


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
    model = experiment.heads["segmentation"].model
    model.pixel_decoder.num_blocks, model.transformer_decoder.num_blocks = 6, 9
    experiment.engine = EngineConfig(kind="deepspeed", zero_stage=2)
    return experiment
