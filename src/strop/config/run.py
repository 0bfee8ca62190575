"""The whole configuration and the rules that cross sections. Floor 1, no torch."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from strop.config.methods import PostTraining, SftSettings, admit
from strop.config.section import ListOf, Section
from strop.config.sections import (
    DatasetSection,
    FinetuningSection,
    GpuSection,
    LoggingSection,
    LoraSection,
    ModelSection,
    TrainingSection,
)


class RunConfig(Section):
    """Everything a run is made of. What is null here and derived later is written out in the run's config.yaml."""

    preset: str | None = None
    """A preset under this configuration: cpu, gpu-bf16, gpu-fp16, memory-efficient, or a path."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides the order of the rows, the validation split, new weights and dropout."""
    models: ListOf[ModelSection] = Field(min_length=1)
    """Models to train, one after the other."""
    dataset: DatasetSection = DatasetSection()
    post_training: PostTraining = SftSettings()
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    gpu: GpuSection = GpuSection()
    finetuning: FinetuningSection = FinetuningSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(data.get("post_training"), dict):
            data["post_training"] = admit(data["post_training"])
        if isinstance(data.get("lora"), dict) and data["lora"].get("enabled") is None:
            data["lora"] = {**data["lora"], "enabled": True}
        return data

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [m.name for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} is given twice; run folders need different names")
        return self
