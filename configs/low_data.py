"""Reproduce Table 6 of the paper: 1 % and 10 % of COCO. Protocol, hardware and weights as in paper.py.

Which images the paper drew is not published: they are chosen by data.train_share_seed, and their ids written to the run folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.configs.paper import COCO, FPN, on_neck
from permafrost.configs.paper_parts import BASE_22K, Row, recipes_of
from permafrost.heads import BiFPNConfig
from permafrost.launcher import Experiment

# fmt: off
TABLE_6 = (
    # neck                          head                                 1 %: frozen   fine-tuned    10 %: frozen  fine-tuned
    ("fpn",    "FPN",               FPN,                                ([27.5, 26.4], [27.5, 25.8]), ([39.1, 36.2], [42.2, 37.5])),
    ("bifpn1", "1 layer of BiFPN",  on_neck(BiFPNConfig, num_layers=1), ([29.8, 27.6], [26.3, 24.7]), ([42.8, 38.5], [42.0, 37.3])),
    ("bifpn2", "2 layers of BiFPN", on_neck(BiFPNConfig, num_layers=2), ([31.4, 28.4], [26.3, 24.6]), ([44.2, 39.4], [42.1, 37.3])),
    ("bifpn3", "3 layers of BiFPN", on_neck(BiFPNConfig, num_layers=3), ([32.1, 28.9], [25.9, 24.3]), ([44.6, 39.7], [42.3, 37.6])),
    ("bifpn4", "4 layers of BiFPN", on_neck(BiFPNConfig, num_layers=4), ([31.9, 28.6], [26.0, 24.1]), ([45.0, 40.0], [42.1, 37.4])),
)
# fmt: on


def _share(percent: int) -> Experiment:
    """Return COCO's recipe on an exact share of the images, as often through each; the paper does not publish its schedule."""
    experiment = swinv2_base_fpn()
    loop, schedule = experiment.loop, experiment.heads["detection"].schedule
    experiment.data.train_share = percent / 100
    loop.num_steps = max(1, round(loop.num_steps * percent / 100))
    loop.evaluate_every = max(1, loop.num_steps // 6)
    loop.checkpoint_every = min(loop.checkpoint_every, loop.evaluate_every)
    schedule.warmup_steps = min(schedule.warmup_steps, loop.num_steps // 10)
    return experiment


COMMAND = "permafrost train low_data:NAME --data.root /path/to/coco"
SHARES = {percent: replace(COCO, base=partial(_share, percent), command=COMMAND) for percent in (1, 10)}


def _recipes() -> dict[str, Callable[[], Experiment]]:
    recipes: dict[str, Callable[[], Experiment]] = {}
    for key, neck, head, *published in TABLE_6:
        for (percent, protocol), (frozen, fine_tuned) in zip(SHARES.items(), published, strict=True):
            row = Row(f"table6_{key}_{percent}pct", f"{percent} % of COCO, {neck}", BASE_22K, head, frozen, fine_tuned)
            recipes |= recipes_of(__name__, "Table 6", [row], protocol, of=" SwinV2-B-22K")
    return recipes


globals().update(_recipes())
