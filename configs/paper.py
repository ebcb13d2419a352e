"""COCO rows of the paper's tables ("Could Giant Pretrained Image Models Extract Universal Representations?", NeurIPS 2022).

Table 1: pretraining tasks; 2: head networks; 5: sizes of the base network; Table 6, little data, is low_data.py. Every row is
two recipes, the frozen backbone and, `_full`, its full fine-tuning twin; where two rows are one run, the later table refers to
the earlier recipe.

    deepspeed --num_gpus 8 --module permafrost.launcher.train paper:NAME --data.root /path/to/coco

Protocol of all but the multi-scale row: trained on train2017, box and mask AP on val2017, one scale, no flip.
The paper gives neither image size nor learning rate nor schedule nor the widths of its heads: those are
`coco:swinv2_base_fpn`'s, and BiFPN's defaults.
GPU plan of all, not measured: 8 GPUs, 2 images each; 40 GB frozen and 80 GB fine-tuned, where activations are computed again.
Weights are read from the file that each recipe names, in the current folder (field backbone.weights).
"""

from __future__ import annotations

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.configs.paper_parts import full, pretrained, row
from permafrost.data import EvaluationConfig, MultiScaleConfig
from permafrost.heads import BiFPNConfig, CascadeConfig, HTCConfig, ResidualFPNConfig, SemanticBranchConfig
from permafrost.launcher import EngineConfig, Experiment
from permafrost.model import BackboneConfig


def table1_sup_1k() -> Experiment:
    """Table 1, supervised, ImageNet-1K: frozen SwinV2-B with FPN, 42.4 box AP and 38.7 mask AP.

        permafrost train paper:table1_sup_1k --data.root /path/to/coco

    Weights: swinv2_base_1k_window7_224.pth, not released; the paper's has 224-pixel images and window 7. The nearest release
    is swinv2_base_patch4_window8_256.pth with --backbone.window-size 8.
    """
    return pretrained("table1_sup_1k", "swinv2_base_1k_window7_224.pth")


def table1_sup_1k_full() -> Experiment:
    """Table 1, supervised, ImageNet-1K: fine-tuned SwinV2-B with FPN, 50.5 box AP and 44.5 mask AP.

        permafrost train paper:table1_sup_1k_full --data.root /path/to/coco

    Weights: those of `paper:table1_sup_1k`.
    """
    return full("table1_sup_1k_full", table1_sup_1k())


def table1_esvit_1k() -> Experiment:
    """Table 1, EsViT contrastive, ImageNet-1K: frozen SwinV2-B with FPN, 42.0 box AP and 38.5 mask AP.

        permafrost train paper:table1_esvit_1k --data.root /path/to/coco

    Weights: esvit_swinv2_base_1k.pth, of a SwinV2-B pretrained with EsViT; not released.
    """
    return pretrained("table1_esvit_1k", "esvit_swinv2_base_1k.pth")


def table1_esvit_1k_full() -> Experiment:
    """Table 1, EsViT contrastive, ImageNet-1K: fine-tuned SwinV2-B with FPN, 51.5 box AP and 45.6 mask AP.

        permafrost train paper:table1_esvit_1k_full --data.root /path/to/coco

    Weights: those of `paper:table1_esvit_1k`.
    """
    return full("table1_esvit_1k_full", table1_esvit_1k())


def table1_simmim_1k() -> Experiment:
    """Table 1, SimMIM masked images, ImageNet-1K: frozen SwinV2-B with FPN, 34.1 box AP and 32.4 mask AP.

        permafrost train paper:table1_simmim_1k --data.root /path/to/coco

    Weights: simmim_swinv2_base_1k.pth, not released at window 7. The nearest release is
    swinv2_base_1k_500k.pth with --backbone.window-size 12.
    """
    return pretrained("table1_simmim_1k", "simmim_swinv2_base_1k.pth")


def table1_simmim_1k_full() -> Experiment:
    """Table 1, SimMIM masked images, ImageNet-1K: fine-tuned SwinV2-B with FPN, 52.9 box AP and 46.7 mask AP.

        permafrost train paper:table1_simmim_1k_full --data.root /path/to/coco

    Weights: those of `paper:table1_simmim_1k`.
    """
    return full("table1_simmim_1k_full", table1_simmim_1k())


def table1_icar_laion() -> Experiment:
    """Table 1, iCar image-text alignment, Laion: frozen SwinV2-B with FPN, 43.3 box AP and 39.5 mask AP.

        permafrost train paper:table1_icar_laion --data.root /path/to/coco

    Weights: icar_swinv2_base_laion.pth, not released.
    """
    return pretrained("table1_icar_laion", "icar_swinv2_base_laion.pth")


def table1_icar_laion_full() -> Experiment:
    """Table 1, iCar image-text alignment, Laion: fine-tuned SwinV2-B with FPN, 51.7 box AP and 45.5 mask AP.

        permafrost train paper:table1_icar_laion_full --data.root /path/to/coco

    Weights: those of `paper:table1_icar_laion`.
    """
    return full("table1_icar_laion_full", table1_icar_laion())


def table1_icar_laion_22k() -> Experiment:
    """Table 1, iCar with classification, Laion and ImageNet-22K: frozen SwinV2-B with FPN, 44.9 box AP and 41.2 mask AP.

        permafrost train paper:table1_icar_laion_22k --data.root /path/to/coco

    Weights: icar_swinv2_base_laion_22k.pth, not released.
    """
    return pretrained("table1_icar_laion_22k", "icar_swinv2_base_laion_22k.pth")


def table1_icar_laion_22k_full() -> Experiment:
    """Table 1, iCar with classification, Laion and ImageNet-22K: fine-tuned SwinV2-B with FPN, 52.3 box AP and 46.1 mask AP.

        permafrost train paper:table1_icar_laion_22k_full --data.root /path/to/coco

    Weights: those of `paper:table1_icar_laion_22k`.
    """
    return full("table1_icar_laion_22k_full", table1_icar_laion_22k())


def table2_fpn() -> Experiment:
    """Table 2 and Table 1 SUP-22K, FPN: frozen SwinV2-B-22K, 45.0 box AP and 41.1 mask AP.

        permafrost train paper:table2_fpn --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return row("table2_fpn", swinv2_base_fpn())


def table2_fpn_full() -> Experiment:
    """Table 2 and Table 1 SUP-22K, FPN: fine-tuned SwinV2-B-22K, 51.9 box AP and 45.7 mask AP.

        permafrost train paper:table2_fpn_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table2_fpn_full", table2_fpn())


def table2_residual_fpn() -> Experiment:
    """Table 2, FPN with four residual blocks: frozen SwinV2-B-22K, 49.5 box AP and 44.0 mask AP.

        permafrost train paper:table2_residual_fpn --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return row("table2_residual_fpn", swinv2_base_fpn(), neck=ResidualFPNConfig(num_blocks=4))


def table2_residual_fpn_full() -> Experiment:
    """Table 2, FPN with four residual blocks: fine-tuned SwinV2-B-22K, 52.1 box AP and 45.6 mask AP.

        permafrost train paper:table2_residual_fpn_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table2_residual_fpn_full", table2_residual_fpn())


def table2_bifpn() -> Experiment:
    """Table 2, BiFPN: frozen SwinV2-B-22K, 51.9 box AP and 46.0 mask AP.

        permafrost train paper:table2_bifpn --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Five
    layers, the depth of section 5.2 for SwinV2-L-22K; this row's own is not published.
    """
    return row("table2_bifpn", swinv2_base_fpn(), neck=BiFPNConfig())


def table2_bifpn_full() -> Experiment:
    """Table 2, BiFPN: fine-tuned SwinV2-B-22K, 52.3 box AP and 45.7 mask AP.

        permafrost train paper:table2_bifpn_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Five
    layers, the depth of section 5.2 for SwinV2-L-22K; this row's own is not published.
    """
    return full("table2_bifpn_full", table2_bifpn())


def table2_cascade() -> Experiment:
    """Table 2, FPN with a cascade head: frozen SwinV2-B-22K, 49.0 box AP and 43.0 mask AP.

        permafrost train paper:table2_cascade --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return row("table2_cascade", swinv2_base_fpn(), model=CascadeConfig())


def table2_cascade_full() -> Experiment:
    """Table 2, FPN with a cascade head: fine-tuned SwinV2-B-22K, 54.5 box AP and 46.9 mask AP.

        permafrost train paper:table2_cascade_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table2_cascade_full", table2_cascade())


def table2_bifpn_cascade() -> Experiment:
    """Table 2 and Table 5, BiFPN with a cascade head: frozen SwinV2-B-22K, 53.8 box AP and 46.7 mask AP.

        permafrost train paper:table2_bifpn_cascade --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Five
    layers, the depth of section 5.2 for SwinV2-L-22K; this row's own is not published.
    """
    return row("table2_bifpn_cascade", swinv2_base_fpn(), model=CascadeConfig(), neck=BiFPNConfig())


def table2_bifpn_cascade_full() -> Experiment:
    """Table 2 and Table 5, BiFPN with a cascade head: fine-tuned SwinV2-B-22K, 54.3 box AP and 46.9 mask AP.

        permafrost train paper:table2_bifpn_cascade_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Five
    layers, the depth of section 5.2 for SwinV2-L-22K; this row's own is not published.
    """
    return full("table2_bifpn_cascade_full", table2_bifpn_cascade())


def table5_tiny_1k() -> Experiment:
    """Table 5, SwinV2-T-1K: frozen, BiFPN, Mask R-CNN, 49.6 box AP and 44.0 mask AP.

        permafrost train paper:table5_tiny_1k --data.root /path/to/coco

    Weights: swinv2_tiny_patch4_window8_256.pth of the Swin Transformer release. Nine layers (section 5.2).
    """
    experiment = pretrained("table5_tiny_1k", "swinv2_tiny_patch4_window8_256.pth", backbone="swinv2_tiny", window=8)
    return row("table5_tiny_1k", experiment, neck=BiFPNConfig(num_layers=9))


def table5_tiny_1k_full() -> Experiment:
    """Table 5, SwinV2-T-1K: fine-tuned, BiFPN, Mask R-CNN, 49.8 box AP and 43.8 mask AP.

        permafrost train paper:table5_tiny_1k_full --data.root /path/to/coco

    Weights: swinv2_tiny_patch4_window8_256.pth of the Swin Transformer release. Nine layers (section 5.2).
    """
    return full("table5_tiny_1k_full", table5_tiny_1k())


def table5_base_1k() -> Experiment:
    """Table 5, SwinV2-B-1K: frozen, BiFPN, Mask R-CNN, 50.3 box AP and 44.5 mask AP.

        permafrost train paper:table5_base_1k --data.root /path/to/coco

    Weights: swinv2_base_patch4_window8_256.pth of the Swin Transformer release. Its number of layers is not published.
    """
    experiment = pretrained("table5_base_1k", "swinv2_base_patch4_window8_256.pth", backbone="swinv2_base", window=8)
    return row("table5_base_1k", experiment, neck=BiFPNConfig(num_layers=5))


def table5_base_1k_full() -> Experiment:
    """Table 5, SwinV2-B-1K: fine-tuned, BiFPN, Mask R-CNN, 51.1 box AP and 44.8 mask AP.

        permafrost train paper:table5_base_1k_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window8_256.pth of the Swin Transformer release. Its number of layers is not published.
    """
    return full("table5_base_1k_full", table5_base_1k())


def table5_base_22k() -> Experiment:
    """Table 5, SwinV2-B-22K: frozen, BiFPN, Mask R-CNN, 52.5 box AP and 46.6 mask AP.

        permafrost train paper:table5_base_22k --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Its number of layers is not published,
    nor what puts it 0.6 box AP above Table 2's row.
    """
    experiment = pretrained(
        "table5_base_22k", "swinv2_base_patch4_window12_192_22k.pth", backbone="swinv2_base", window=12
    )
    return row("table5_base_22k", experiment, neck=BiFPNConfig(num_layers=5))


def table5_base_22k_full() -> Experiment:
    """Table 5, SwinV2-B-22K: fine-tuned, BiFPN, Mask R-CNN, 52.3 box AP and 45.7 mask AP.

        permafrost train paper:table5_base_22k_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Its number of layers is not published,
    nor what puts it 0.6 box AP above Table 2's row.
    """
    return full("table5_base_22k_full", table5_base_22k())


def table5_large_22k() -> Experiment:
    """Table 5, SwinV2-L-22K: frozen, BiFPN, Mask R-CNN, 53.0 box AP and 46.8 mask AP.

        permafrost train paper:table5_large_22k --data.root /path/to/coco

    Weights: swinv2_large_patch4_window12_192_22k.pth of the Swin Transformer release. Five layers (section 5.2).
    """
    experiment = pretrained(
        "table5_large_22k", "swinv2_large_patch4_window12_192_22k.pth", backbone="swinv2_large", window=12
    )
    return row("table5_large_22k", experiment, neck=BiFPNConfig(num_layers=5))


def table5_large_22k_full() -> Experiment:
    """Table 5, SwinV2-L-22K: fine-tuned, BiFPN, Mask R-CNN, 53.0 box AP and 46.5 mask AP.

        permafrost train paper:table5_large_22k_full --data.root /path/to/coco

    Weights: swinv2_large_patch4_window12_192_22k.pth of the Swin Transformer release. Five layers (section 5.2).
    """
    return full("table5_large_22k_full", table5_large_22k())


def table5_giant_htc() -> Experiment:
    """Table 5, SwinV2-G-ext22K: frozen, BiFPN, HTC, 57.9 box AP and 50.4 mask AP.

        permafrost train paper:table5_giant_htc --data.root /path/to/coco

    Weights: swinv2_giant_ext22k.pth, 3 B parameters, not released. Needs COCO-stuff's pixel maps; on cards below 24 GB
    --mesh.tensor 2. There is no fine-tuned twin in the paper. Multi-scale testing: `paper:table5_giant_htc_multi_scale`.
    """
    experiment = row("table5_giant_htc", swinv2_base_fpn(), model=HTCConfig(), neck=BiFPNConfig())
    experiment.backbone = BackboneConfig(name="swinv2_giant", weights="swinv2_giant_ext22k.pth")
    model = experiment.heads["detection"].model
    model.semantic = SemanticBranchConfig(num_classes=183)
    experiment.data.semantic = "stuffthingmaps/train2017"
    experiment.engine = EngineConfig(kind="deepspeed", zero_stage=2)
    return experiment


def table5_giant_htc_multi_scale() -> Experiment:
    """Table 5, SwinV2-G-ext22K, multi-scale testing: frozen, BiFPN, HTC, 59.3 box AP and 51.6 mask AP.

        permafrost train paper:table5_giant_htc_multi_scale --data.root /path/to/coco

    Weights: those of `paper:table5_giant_htc`, and so is the training; a finished run of it is scored so by
    `permafrost evaluate RUN --sizes 768 1024 1280 1536 --flip`. On test-dev (with --submission FOLDER) the paper has 60.0 and 52.2.
    It gives neither the sizes nor whether images are mirrored nor how results are merged. Here: squares of 3/4 to 3/2 of the
    training size, mirrored too, so eight views of each image; boxes by one non-maximum suppression over all of them, masks voted
    (data/detection/views.py).
    """
    experiment = row("table5_giant_htc_multi_scale", table5_giant_htc())
    experiment.data.evaluation = EvaluationConfig(sizes=(768, 1024, 1280, 1536), flip=True)
    return experiment


def padding() -> Experiment:
    """The comparison of section 3.3: aspect ratio and padding in place of the square crop, frozen SwinV2-B-22K with BiFPN.

        permafrost train paper:padding --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release. Its twin is `paper:table2_bifpn`, which the paper
    prefers without figures for this one. Short sides 480 to 800, 1333 at most; tested at 800.
    """
    experiment = row("padding", table2_bifpn())
    experiment.data.jitter = MultiScaleConfig()
    experiment.data.evaluation = EvaluationConfig(resize="short_side")
    return experiment
