"""Runs that findings are tried on: healthy ones of every method, and runs that are broken on purpose.

Every run is trained here, by a tiny model on rows of words.

rows       what a run reads: healthy rows, and broken ones
models     the tiny models
quality    the reward of runs that sample, healthy and broken
faults     what is broken while a run trains, or in its folder behind it
scenario   what a run is, and how it is trained
healthy    those in which nothing is wrong
broken     those that must raise a finding, by what is wrong: data, rate, setting, sampled completions
"""

from benchmarks.scenarios.broken import BROKEN, UNTRIED
from benchmarks.scenarios.healthy import HEALTHY
from benchmarks.scenarios.models import write_models
from benchmarks.scenarios.scenario import Scenario, trained

__all__ = ["UNTRIED", "Scenario", "scenarios", "trained", "write_models"]


def scenarios() -> list[Scenario]:
    """All of them, healthy ones first."""
    return [*HEALTHY, *BROKEN]
