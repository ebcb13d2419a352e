"""Everything that runs: the `permafrost` command, the training loop, engines, run folders. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost._lazy import attach

if TYPE_CHECKING:
    from permafrost.launcher.errors import (
        USER_ERRORS as USER_ERRORS,
        CheckpointError as CheckpointError,
        Interrupted as Interrupted,
        LaunchError as LaunchError,
        OutOfDeviceMemory as OutOfDeviceMemory,
        RankLost as RankLost,
        RecipeError as RecipeError,
        RunFolderError as RunFolderError,
        TrainingStopped as TrainingStopped,
    )
    from permafrost.launcher.experiment import (
        EngineConfig as EngineConfig,
        Experiment as Experiment,
        HeadExperiment as HeadExperiment,
        LoopConfig as LoopConfig,
        MeshConfig as MeshConfig,
        OptimizerConfig as OptimizerConfig,
        ScheduleConfig as ScheduleConfig,
    )
    from permafrost.launcher.pretraining.config import PretrainExperiment as PretrainExperiment

__getattr__, __dir__, __all__ = attach(__name__, __file__)
