"""Table 6 of the paper: 1 % and 10 % of COCO. Protocol, hardware and weights as in paper.py.

Which images the paper drew is not published: they are chosen by data.train_share_seed, and their ids written to the run folder.
"""

from __future__ import annotations

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.configs.paper import table2_fpn
from permafrost.configs.paper_parts import full, row, share
from permafrost.heads import BiFPNConfig
from permafrost.launcher import Experiment


def table6_fpn_1pct() -> Experiment:
    """Table 6, 1 % of COCO, FPN: frozen SwinV2-B-22K, 27.5 box AP and 26.4 mask AP.

        permafrost train low_data:table6_fpn_1pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_fpn_1pct", table2_fpn(), 0.01)


def table6_fpn_1pct_full() -> Experiment:
    """Table 6, 1 % of COCO, FPN: fine-tuned SwinV2-B-22K, 27.5 box AP and 25.8 mask AP.

        permafrost train low_data:table6_fpn_1pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_fpn_1pct_full", table6_fpn_1pct())


def table6_fpn_10pct() -> Experiment:
    """Table 6, 10 % of COCO, FPN: frozen SwinV2-B-22K, 39.1 box AP and 36.2 mask AP.

        permafrost train low_data:table6_fpn_10pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_fpn_10pct", table2_fpn(), 0.1)


def table6_fpn_10pct_full() -> Experiment:
    """Table 6, 10 % of COCO, FPN: fine-tuned SwinV2-B-22K, 42.2 box AP and 37.5 mask AP.

        permafrost train low_data:table6_fpn_10pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_fpn_10pct_full", table6_fpn_10pct())


def table6_bifpn1_1pct() -> Experiment:
    """Table 6, 1 % of COCO, 1 layer of BiFPN: frozen SwinV2-B-22K, 29.8 box AP and 27.6 mask AP.

        permafrost train low_data:table6_bifpn1_1pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn1_1pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=1)), 0.01)


def table6_bifpn1_1pct_full() -> Experiment:
    """Table 6, 1 % of COCO, 1 layer of BiFPN: fine-tuned SwinV2-B-22K, 26.3 box AP and 24.7 mask AP.

        permafrost train low_data:table6_bifpn1_1pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn1_1pct_full", table6_bifpn1_1pct())


def table6_bifpn1_10pct() -> Experiment:
    """Table 6, 10 % of COCO, 1 layer of BiFPN: frozen SwinV2-B-22K, 42.8 box AP and 38.5 mask AP.

        permafrost train low_data:table6_bifpn1_10pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn1_10pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=1)), 0.1)


def table6_bifpn1_10pct_full() -> Experiment:
    """Table 6, 10 % of COCO, 1 layer of BiFPN: fine-tuned SwinV2-B-22K, 42.0 box AP and 37.3 mask AP.

        permafrost train low_data:table6_bifpn1_10pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn1_10pct_full", table6_bifpn1_10pct())


def table6_bifpn2_1pct() -> Experiment:
    """Table 6, 1 % of COCO, 2 layers of BiFPN: frozen SwinV2-B-22K, 31.4 box AP and 28.4 mask AP.

        permafrost train low_data:table6_bifpn2_1pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn2_1pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=2)), 0.01)


def table6_bifpn2_1pct_full() -> Experiment:
    """Table 6, 1 % of COCO, 2 layers of BiFPN: fine-tuned SwinV2-B-22K, 26.3 box AP and 24.6 mask AP.

        permafrost train low_data:table6_bifpn2_1pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn2_1pct_full", table6_bifpn2_1pct())


def table6_bifpn2_10pct() -> Experiment:
    """Table 6, 10 % of COCO, 2 layers of BiFPN: frozen SwinV2-B-22K, 44.2 box AP and 39.4 mask AP.

        permafrost train low_data:table6_bifpn2_10pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn2_10pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=2)), 0.1)


def table6_bifpn2_10pct_full() -> Experiment:
    """Table 6, 10 % of COCO, 2 layers of BiFPN: fine-tuned SwinV2-B-22K, 42.1 box AP and 37.3 mask AP.

        permafrost train low_data:table6_bifpn2_10pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn2_10pct_full", table6_bifpn2_10pct())


def table6_bifpn3_1pct() -> Experiment:
    """Table 6, 1 % of COCO, 3 layers of BiFPN: frozen SwinV2-B-22K, 32.1 box AP and 28.9 mask AP.

        permafrost train low_data:table6_bifpn3_1pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn3_1pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=3)), 0.01)


def table6_bifpn3_1pct_full() -> Experiment:
    """Table 6, 1 % of COCO, 3 layers of BiFPN: fine-tuned SwinV2-B-22K, 25.9 box AP and 24.3 mask AP.

        permafrost train low_data:table6_bifpn3_1pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn3_1pct_full", table6_bifpn3_1pct())


def table6_bifpn3_10pct() -> Experiment:
    """Table 6, 10 % of COCO, 3 layers of BiFPN: frozen SwinV2-B-22K, 44.6 box AP and 39.7 mask AP.

        permafrost train low_data:table6_bifpn3_10pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn3_10pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=3)), 0.1)


def table6_bifpn3_10pct_full() -> Experiment:
    """Table 6, 10 % of COCO, 3 layers of BiFPN: fine-tuned SwinV2-B-22K, 42.3 box AP and 37.6 mask AP.

        permafrost train low_data:table6_bifpn3_10pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn3_10pct_full", table6_bifpn3_10pct())


def table6_bifpn4_1pct() -> Experiment:
    """Table 6, 1 % of COCO, 4 layers of BiFPN: frozen SwinV2-B-22K, 31.9 box AP and 28.6 mask AP.

        permafrost train low_data:table6_bifpn4_1pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn4_1pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=4)), 0.01)


def table6_bifpn4_1pct_full() -> Experiment:
    """Table 6, 1 % of COCO, 4 layers of BiFPN: fine-tuned SwinV2-B-22K, 26.0 box AP and 24.1 mask AP.

        permafrost train low_data:table6_bifpn4_1pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn4_1pct_full", table6_bifpn4_1pct())


def table6_bifpn4_10pct() -> Experiment:
    """Table 6, 10 % of COCO, 4 layers of BiFPN: frozen SwinV2-B-22K, 45.0 box AP and 40.0 mask AP.

        permafrost train low_data:table6_bifpn4_10pct --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return share("table6_bifpn4_10pct", row("", swinv2_base_fpn(), neck=BiFPNConfig(num_layers=4)), 0.1)


def table6_bifpn4_10pct_full() -> Experiment:
    """Table 6, 10 % of COCO, 4 layers of BiFPN: fine-tuned SwinV2-B-22K, 42.1 box AP and 37.4 mask AP.

        permafrost train low_data:table6_bifpn4_10pct_full --data.root /path/to/coco

    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release.
    """
    return full("table6_bifpn4_10pct_full", table6_bifpn4_10pct())
