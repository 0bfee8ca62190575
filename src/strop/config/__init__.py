"""The configuration room: what a run is, said in YAML, on the command line or in Python. Floor 1, no torch.

In: a path, a preset, overrides. Out: a validated, frozen `RunConfig` that knows where each value came from.

    base_section, sections/         what a section is; one file per section
    method_base, methods, grpo_settings
                                    `post_training`: what methods share; one class per method; those of GRPO
    run                             all sections together, and the rules that cross them
    schema, names, unread_keys      keys in words; names as people write them; which keys a run does not read
    yamlfile, layers                reading, and merging defaults < preset < file < overrides
    explain                         every problem with its place and what to do
    guidance, dump                  what is left open, decided; warnings; the resolved configuration as YAML
    flags, manual                   the command line's keys; help, documentation and JSON Schema from the classes
    other_tools                     names of other tools, and what strop calls them
    stop_on                         findings that can stop a run
    unsafe_folders                  folders of the operating system, into which no run is written
"""

from strop.config.base_section import Section
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
