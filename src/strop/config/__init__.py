"""The configuration room: what a run is, said in YAML, on the command line or in Python. Floor 1, no torch.

In: a path, a preset, overrides. Out: a validated, frozen `RunConfig` that knows where each value came from.

    section, sections/, methods, run  the schema: what a section is, one file per section, the methods, all together
    schema, names                     its keys in words; names as people write them
    yamlfile, layers                  reading, and merging defaults < preset < file < overrides
    explain                           every problem with its place and what to do
    guidance, dump                    what is left open, decided; warnings; the resolved configuration as YAML
    flags, manual                     the command line's keys; help, documentation and JSON Schema from the classes
"""

from strop.config.dump import to_yaml
from strop.config.guidance import advice, of_model, resolve
from strop.config.layers import CommandLine, load_config
from strop.config.methods import (
    METHODS,
    CpoSettings,
    DpoSettings,
    IpoSettings,
    KtoSettings,
    MethodSettings,
    OrpoSettings,
    PostTraining,
    SftSettings,
    SimpoSettings,
)
from strop.config.run import RunConfig
from strop.config.section import Section
from strop.config.sections import (
    DatasetSection,
    FinetuningSection,
    GpuSection,
    LoggingSection,
    LoraSection,
    ModelSection,
    TrainingSection,
)

__all__ = [
    "METHODS",
    "CommandLine",
    "CpoSettings",
    "DatasetSection",
    "DpoSettings",
    "FinetuningSection",
    "GpuSection",
    "IpoSettings",
    "KtoSettings",
    "LoggingSection",
    "LoraSection",
    "MethodSettings",
    "ModelSection",
    "OrpoSettings",
    "PostTraining",
    "RunConfig",
    "Section",
    "SftSettings",
    "SimpoSettings",
    "TrainingSection",
    "advice",
    "load_config",
    "of_model",
    "resolve",
    "to_yaml",
]
