"""The smoke tier: one path through every room, a minute on two cores. `pytest -m smoke` runs what this table names."""

from __future__ import annotations

SMOKE = {
    "permafrost": ["tests/test_front_door.py", "tests/test_fronts.py", "tests/test_files.py", "tests/test_wire.py"],
    "configs": [
        "tests/test_structure.py",
        "tests/test_docs.py",
        "tests/test_configuration.py",
        "tests/launcher/recipes/test_recipes.py",
    ],
    "data": ["tests/data/test_findings.py"],
    "data/detection": ["tests/data/detection/test_transforms.py"],
    "data/pictures": ["tests/data/pictures/test_read.py"],
    "data/segmentation": ["tests/data/segmentation/test_evaluator.py"],
    "data/stream": ["tests/data/stream/test_loader.py::test_batches_do", "tests/data/stream/test_sampler.py"],
    "data/video": ["tests/data/video/test_evaluator.py"],
    "data/worlds": ["tests/data/worlds/test_motion.py"],
    "heads": ["tests/heads/test_build.py"],
    "heads/detection": ["tests/heads/detection/test_config.py", "tests/heads/detection/test_sampling.py"],
    "heads/necks": ["tests/heads/necks/test_fpn.py", "tests/heads/necks/test_bifpn.py"],
    "heads/segmentation": ["tests/heads/segmentation/test_mask2former.py::test_results_are_segments_of_every_image"],
    "heads/video": ["tests/heads/video/test_video.py::test_results_are_probabilities_with_the_clips_names"],
    "launcher": ["tests/launcher/test_cli.py::test_train_evaluate_resume"],
    "launcher/cluster": ["tests/launcher/cluster/test_hostfile.py"],
    "launcher/commands": ["tests/launcher/test_cli.py::test_mistakes_are_answered_in_time"],
    "launcher/engines": ["tests/distributed/test_offload.py::test_gathered_weights_do_not_leave[2]"],
    "launcher/exchange": ["tests/launcher/exchange/test_convert.py::test_result_is_the_same_network"],
    "launcher/plan": ["tests/launcher/plan/test_plan.py::test_engines_hold_less_the_more_they_partition"],
    "launcher/pretraining": ["tests/launcher/pretraining/test_pretraining.py::TestRun::test_mistakes_about_the_folder"],
    "launcher/ranks": ["tests/launcher/ranks/test_process_group.py"],
    "launcher/recipes": ["tests/launcher/recipes/test_runs_of_before.py"],
    "launcher/run": ["tests/launcher/run/test_checkpoint.py"],
    "model": ["tests/model/test_spec.py", "tests/model/test_frozen.py"],
    "model/kernels": ["tests/model/kernels/test_residual_norm.py::test_the_reference_gives"],
    "model/split": ["tests/model/split/test_tensor_parallel.py::test_loading_refuses_before_it_reads"],
    "model/swin": [
        "tests/model/swin/test_v2.py::test_equals_timm[swinv2_tiny_window8_256",
        "tests/model/swin/test_v2.py::test_folded",
    ],
    "model/timm": ["tests/model/timm/test_backbone.py::test_a_strided_stem_is_not_tapped_unless_asked_for"],
    "model/weights": [
        "tests/model/weights/test_read.py::test_fingerprint",
        "tests/model/weights/test_read.py::test_known_",
    ],
}
"""Room -> files of tests, or the beginnings of tests' ids."""
