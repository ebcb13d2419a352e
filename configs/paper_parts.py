"""Turn the paper's tables into recipes: a row is two of them, the frozen network and, `_full`, its full fine-tuning twin.

    globals().update(recipes_of(__name__, "Table 2", ROWS, PROTOCOL))

makes them functions of the module that holds the rows, found and listed as those that are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from permafrost.heads import HeadConfig
from permafrost.launcher import Experiment

FULL_DROP_PATH = {"swinv2_tiny": 0.2, "swinv2_base": 0.3, "swinv2_large": 0.3}
"""Drop path of the Swin papers' detection recipes; the large size takes the base's, a choice of ours."""


@dataclass(frozen=True)
class Network:
    """A pretrained base network: its size, the file of its weights, its window, and where the file comes from."""

    backbone: str
    weights: str
    window: int
    source: str = "of the Swin Transformer release"


SUP_1K = Network(
    "swinv2_base",
    "swinv2_base_1k_window7_224.pth",
    window=7,
    source="not released; the paper's has 224-pixel images and window 7. The nearest release is\n"
    "swinv2_base_patch4_window8_256.pth with --backbone.window-size 8",
)
ESVIT_1K = Network(
    "swinv2_base", "esvit_swinv2_base_1k.pth", window=7, source="of a SwinV2-B pretrained with EsViT; not released"
)
SIMMIM_1K = Network(
    "swinv2_base",
    "simmim_swinv2_base_1k.pth",
    window=7,
    source="not released at window 7. The nearest release is swinv2_base_1k_500k.pth with --backbone.window-size 12",
)
ICAR_LAION = Network("swinv2_base", "icar_swinv2_base_laion.pth", window=7, source="not released")
ICAR_LAION_22K = Network("swinv2_base", "icar_swinv2_base_laion_22k.pth", window=7, source="not released")
TINY_1K = Network("swinv2_tiny", "swinv2_tiny_patch4_window8_256.pth", window=8)
BASE_1K = Network("swinv2_base", "swinv2_base_patch4_window8_256.pth", window=8)
BASE_22K = Network("swinv2_base", "swinv2_base_patch4_window12_192_22k.pth", window=12)
LARGE_22K = Network("swinv2_large", "swinv2_large_patch4_window12_192_22k.pth", window=12)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the frozen recipe; its twin's ends in `_full`.
        what: what distinguishes it, for the summary.
        network: what is frozen, or fine-tuned.
        head: builds what is trained on it.
        frozen: the published numbers of the frozen network, in the order of the protocol's metrics.
        fine_tuned: those of the twin.
        also: another table's row that is the same run.
        remark: sentences for this row alone.
    """

    name: str
    what: str
    network: Network
    head: Callable[[], HeadConfig]
    frozen: Sequence[float]
    fine_tuned: Sequence[float]
    also: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Protocol:
    """The settings that the rows of one data set share.

    Attributes:
        base: builds the experiment that rows vary in network and head.
        prefix: begins the experiments' names.
        command: runs a row; its "NAME" stands for the recipe.
        metrics: what is published.
        learning_rate_factor: the fine-tuned network's learning rate, as a multiple of the head's.
        fine_tuned_accumulation: how many times as many micro-batches fine-tuning takes.
        remark: a line for every row.
    """

    base: Callable[[], Experiment]
    prefix: str
    command: str
    metrics: tuple[str, ...]
    learning_rate_factor: float = 1.0
    fine_tuned_accumulation: int = 1
    remark: str = ""


def recipes_of(
    module: str, table: str, rows: Sequence[Row], protocol: Protocol, *, of: str = ""
) -> dict[str, Callable[[], Experiment]]:
    """Return the two recipes of every row by name, in order.

    Args:
        module: `__name__` of the module that puts them into its `globals()`.
        table: which one, as the summaries begin.
        rows: all or some of its rows.
        protocol: what its rows share.
        of: what the summaries say between "frozen" or "fine-tuned" and the published numbers.
    """
    recipes = {}
    for row in rows:
        for name, full in ((row.name, False), (f"{row.name}_full", True)):
            build = partial(_experiment, f"{protocol.prefix}_{name}", row, protocol, full)
            recipes[name] = _recipe(module, name, _docstring(name, table, row, protocol, of, full), build)
    return recipes


def _recipe(module: str, name: str, doc: str, build: Callable[[], Experiment]) -> Callable[[], Experiment]:
    """Return `build` as a function of the module's own."""

    def recipe() -> Experiment:
        return build()

    recipe.__module__, recipe.__name__, recipe.__qualname__, recipe.__doc__ = module, name, name, doc
    return recipe


def _experiment(name: str, row: Row, protocol: Protocol, full: bool) -> Experiment:
    experiment, network = protocol.base(), row.network
    experiment.name = name
    (head,) = experiment.heads.values()
    head.model = row.head()
    backbone = replace(experiment.backbone, name=network.backbone, weights=network.weights, window_size=network.window)
    if full:
        backbone = replace(
            backbone,
            frozen=False,
            max_images=None,
            drop_path_rate=FULL_DROP_PATH[network.backbone],
            learning_rate_factor=protocol.learning_rate_factor,
            checkpoint_activations=True,
        )
        experiment.engine.accumulation *= protocol.fine_tuned_accumulation
    experiment.backbone = backbone
    return experiment


def _docstring(name: str, table: str, row: Row, protocol: Protocol, of: str, full: bool) -> str:
    learning, values = ("fine-tuned", row.fine_tuned) if full else ("frozen", row.frozen)
    figures = " and ".join(f"{value} {metric}" for value, metric in zip(values, protocol.metrics, strict=True))
    title = f"{table} and {row.also}" if row.also else table
    summary = f"{title}, {row.what}: {learning}{of}, {figures}."
    command = f"    {protocol.command.replace('NAME', name)}"
    notes = filter(None, (f"Weights: {row.network.weights}, {row.network.source}.", row.remark, protocol.remark))
    return "\n\n".join((summary, command, "\n".join(notes)))
