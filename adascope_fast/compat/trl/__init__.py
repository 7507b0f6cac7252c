"""TRL 0.23.1's DDPO on this engine: `from adascope_fast.compat.trl import DDPOConfig, DDPOTrainer`, and the pipelines.

TRL removed its DDPOTrainer in 0.24. Names, arguments, fields and random draws are those of 0.23.1; nothing here needs
TRL. docs/migrating.md says how each field is honoured, and where TRL itself fails.
"""

from typing import TYPE_CHECKING

from adascope_fast.lazy import lazy

if TYPE_CHECKING:
    from adascope_fast.compat.trl.config import DDPOConfig as DDPOConfig
    from adascope_fast.compat.trl.pipelines import DDPOPipelineOutput as DDPOPipelineOutput
    from adascope_fast.compat.trl.pipelines import DDPOStableDiffusionPipeline as DDPOStableDiffusionPipeline
    from adascope_fast.compat.trl.pipelines import (
        DefaultDDPOStableDiffusionPipeline as DefaultDDPOStableDiffusionPipeline,
    )
    from adascope_fast.compat.trl.pipelines import (
        DefaultDDPOStableDiffusionXLPipeline as DefaultDDPOStableDiffusionXLPipeline,
    )
    from adascope_fast.compat.trl.statistics import PerPromptStatTracker as PerPromptStatTracker
    from adascope_fast.compat.trl.step import DDPOSchedulerOutput as DDPOSchedulerOutput
    from adascope_fast.compat.trl.trainer import DDPOTrainer as DDPOTrainer

__getattr__ = lazy(
    __name__,
    {
        "DDPOConfig": "config",
        "DDPOPipelineOutput": "pipelines",
        "DDPOSchedulerOutput": "step",
        "DDPOStableDiffusionPipeline": "pipelines",
        "DDPOTrainer": "trainer",
        "DefaultDDPOStableDiffusionPipeline": "pipelines",
        "DefaultDDPOStableDiffusionXLPipeline": "pipelines",
        "PerPromptStatTracker": "statistics",
    },
)
