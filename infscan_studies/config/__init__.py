"""The settings of the studies' commands: every key with its type, its default and its meaning. No torch, no numpy.

The string below a field documents that key (`infscan <command> --help`), as in `infscan.config.schema`. The classes of
the groups `study` and `truth` are presets: `study=layers` chooses `LayersConfig`.
"""

from infscan_studies.config.bank import BankJob, BankMethod, BankRecipe, SweepConfig
from infscan_studies.config.demo import AnswersJob, FactsJob, FinetuneDemoJob, RealDemoJob, TrainDemoJob
from infscan_studies.config.prove import ProveJob, StepOptimizer
from infscan_studies.config.retraining import LdsCorpus, LdsJob, LdsQueries, RetrainingConfig
from infscan_studies.config.studies import (
    PLANTED,
    CrossLingualConfig,
    ExtrapolationConfig,
    LayersConfig,
    MemorisationConfig,
    ModelsConfig,
    SideBySideConfig,
    SparsityConfig,
    StudyConfig,
    StudyJob,
    WordOrderConfig,
)
from infscan_studies.config.training import Reduction, Sizes, TrainingOptimizer, TrainingSettings
from infscan_studies.config.validate import (
    CGConfig,
    CoordinateSystem,
    CoverageConfig,
    LissaConfig,
    Optimiser,
    PbrfConfig,
    RegressionConfig,
    ResponseConfig,
    TruthConfig,
    ValidateConfig,
    ValidateJob,
)

__all__ = [
    "PLANTED",
    "AnswersJob",
    "BankJob",
    "BankMethod",
    "BankRecipe",
    "CGConfig",
    "CoordinateSystem",
    "CoverageConfig",
    "CrossLingualConfig",
    "ExtrapolationConfig",
    "FactsJob",
    "FinetuneDemoJob",
    "LayersConfig",
    "LdsCorpus",
    "LdsJob",
    "LdsQueries",
    "LissaConfig",
    "MemorisationConfig",
    "ModelsConfig",
    "Optimiser",
    "PbrfConfig",
    "ProveJob",
    "RealDemoJob",
    "Reduction",
    "RegressionConfig",
    "ResponseConfig",
    "RetrainingConfig",
    "SideBySideConfig",
    "Sizes",
    "SparsityConfig",
    "StepOptimizer",
    "StudyConfig",
    "StudyJob",
    "SweepConfig",
    "TrainDemoJob",
    "TrainingOptimizer",
    "TrainingSettings",
    "TruthConfig",
    "ValidateConfig",
    "ValidateJob",
    "WordOrderConfig",
]
