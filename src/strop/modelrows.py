"""The rows of a run, tokenised for one of its models. Floor 3.

In: the configuration and a model. Out: its tokenizer, the configuration with the day that its chat template prints, and
the rows as tokens. Completions have to end with a token that generation stops at, and the model's folder says which
those are; so all code that tokenises rows for a model does it here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from strop.config import RunConfig, of_model
from strop.config.sections import ModelSection
from strop.data.load import LoadedData, load_data
from strop.data.text.date import with_day
from strop.data.text.show import SeenRow, first_row, left_out
from strop.policy.model.end_tokens import stop_tokens
from strop.policy.model.tokenizer import check_model, read_tokenizer
from strop.types import Origin


@dataclass(frozen=True)
class ModelRows:
    """What it takes to tokenise the rows of a run for one model.

    config: of this model alone, with the day. stop_tokens: ids of the tokens that generation stops at. needs_weights:
    refuse a folder without weights.
    """

    config: RunConfig
    model: ModelSection
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    needs_weights: bool = True

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: ModelSection,
        *,
        kept_day: str | None = None,
        needs_weights: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ModelRows:
        """Reads the tokenizer; the model is looked at before all rows are read (`load`).

        Args:
            kept_day: the day that the template printed at the first launch, if a run is resumed.
            needs_weights: refuse a folder without weights.
            tokenizer: the model's own, where it was read before.

        Raises:
            ModelError: there is no such model or no tokenizer, or it cannot be used.
            ConfigError: the named chat template cannot be used.
        """
        if tokenizer is None:
            tokenizer = read_tokenizer(model, needs_weights=needs_weights)
        config = with_day(of_model(config, model), tokenizer, kept_day)
        return cls(config, model, tokenizer, stop_tokens(model), needs_weights)

    def first(self) -> SeenRow | None:
        """The first training row; None where it is not among the first few (`first_row`)."""
        return first_row(self.config, self.tokenizer, self.config.rows, self.stop_tokens)

    def left_out(self, origins: Collection[Origin]) -> dict[Origin, tuple[str, ...]]:
        """Which parts of these training rows are not in their tokens, in words (`left_out`)."""
        return left_out(self.config, self.tokenizer, self.config.rows, origins, self.stop_tokens)

    def load(self) -> LoadedData:
        """All rows (`load_data`), of a model that can be trained.

        Raises:
            ModelError: it cannot (`check_model`).
            DataError: rows are refused.
        """
        kind = self.config.post_training.REWARD_MODEL
        check_model(self.model, self.tokenizer, needs_weights=self.needs_weights, reward_model=kind)
        return load_data(self.config, self.tokenizer, self.config.rows, self.stop_tokens)
