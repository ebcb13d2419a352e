"""Pretrain the backbones that ship with the repository."""

from __future__ import annotations

from permafrost.launcher import PretrainExperiment


def nano_glyphs() -> PretrainExperiment:
    """The 2.7 M-parameter SwinV2 that the quickstart freezes, trained to name 100 outlines: 0.60 validation accuracy.

        permafrost pretrain nano_glyphs --num-threads 1

    About 110 minutes on one CPU core with AVX-512 (43 images a second), after four minutes of rendering on two.
    """
    return PretrainExperiment(name="nano_glyphs", curriculum=0.99, first_difficulty=0.2)


def nano_glyphs_debug() -> PretrainExperiment:
    """The same code path in seconds: 32 px pictures, 20 steps. The weights are of no use.

    permafrost pretrain nano_glyphs_debug
    """
    return PretrainExperiment(
        name="nano_glyphs_debug",
        image_size=32,
        num_train_images=256,
        num_val_images=100,
        num_steps=20,
        batch_size=16,
        warmup_steps=5,
        log_every=5,
        evaluate_every=10,
        checkpoint_every=10,
    )
