"""The sections of the configuration, one file each. Floor 1, no torch.

Every field says its unit and range in its docstring; the reference page of the documentation and the JSON Schema are
made from these. `post_training` differs by method and stands in `strop.config.methods`.
"""

from strop.config.sections.dataset import DatasetSection, SourceSection
from strop.config.sections.finetuning import FinetuningSection
from strop.config.sections.gpu import GpuSection
from strop.config.sections.logging import LoggingSection
from strop.config.sections.lora import LoraSection
from strop.config.sections.model import ModelSection
from strop.config.sections.rollout import RewardSection, RolloutSection, reward_names
from strop.config.sections.training import LEARNING_RATES, TrainingSection

__all__ = [
    "LEARNING_RATES",
    "DatasetSection",
    "FinetuningSection",
    "GpuSection",
    "LoggingSection",
    "LoraSection",
    "ModelSection",
    "RewardSection",
    "RolloutSection",
    "SourceSection",
    "TrainingSection",
    "reward_names",
]
