"""What day it is to a chat template: the day of a run's first launch. Floor 2.

In: the configuration and the tokenizer. Out: the configuration with `dataset.date`, where the template prints the day;
tomorrow it would give other tokens.
"""

from __future__ import annotations

import datetime

from transformers import PreTrainedTokenizerBase

from strop.config import DatasetSection, RunConfig
from strop.data.text.chat_template import choose_template
from strop.data.text.sandbox import NOW


def today() -> datetime.date:
    """The day of a launch."""
    return datetime.date.today()


def day_of(dataset: DatasetSection) -> datetime.date | None:
    """What a template takes for today."""
    return None if dataset.date is None else datetime.date.fromisoformat(dataset.date)


def with_day(config: RunConfig, tokenizer: PreTrainedTokenizerBase, kept: str | None = None) -> RunConfig:
    """The configuration with the day, where its chat template asks for it.

    Args:
        kept: the day of the first launch, where a run is resumed.

    Raises:
        ConfigError: the named template cannot be used.
    """
    if config.dataset.date is not None or not _prints_the_day(config.dataset, tokenizer):
        return config
    if kept is not None:
        return config.with_values({"dataset.date": kept}, "the resumed run")
    return config.with_values({"dataset.date": today().isoformat()}, "today: the chat template prints the day")


def _prints_the_day(dataset: DatasetSection, tokenizer: PreTrainedTokenizerBase) -> bool:
    if dataset.render == "raw":
        return False
    if dataset.template is not None:
        return NOW in choose_template(dataset.template, tokenizer).source
    return NOW in str(tokenizer.chat_template)
