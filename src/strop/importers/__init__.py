"""Configurations of other tools, turned into strop's. Floor 2, no torch.

In: a file of TRL, LLaMA-Factory, axolotl, unsloth or opensloth. Out: commented YAML, and what became of every key.

    foreign_file, python_calls    reading a file: YAML, JSON, or calls in a Python file, which is parsed and never run
    key_answers             what becomes of a key; the ways in which most keys are answered
    transformers_trainer    the keys of transformers' Trainer, which most tools take
    trl, trl_groups, trl_serving, trl_data, llamafactory, axolotl, axolotl_data, unsloth
                            the other keys of each tool, its defaults
    rewards                 the rewards of TRL
    tools                   the tools that are known, and how a file is told to be of one
    translate               a file's keys, answered one by one
    written_yaml            the YAML

Names that mean the same as a key of strop stand in `strop.config.other_tools`, from which error messages have their
hints, too.
"""

from strop.importers.translate import Imported, import_file
from strop.importers.written_yaml import to_text

__all__ = ["Imported", "import_file", "to_text"]
