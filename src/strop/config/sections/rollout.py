"""The `rollout` and `rewards` sections of the configuration: completions that the policy itself samples. Floor 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from strop.config.base_section import JsonMapping, ListOf, MappingOf, Problem, Section
from strop.types import LARGEST


class RewardSection(Section):
    """One of several rewards; a text is the reward of that name."""

    name: str
    """`exact_match`, `math_equal`, `regex`, `format`, `length`, `json_schema` or `python_tests`; a function of your
    own, `module:function` or `file.py:function`; or `model:ID`, a reward model (a folder or hub id)."""
    weight: float = Field(default=1.0, ge=-1e30, le=1e30)
    """What it counts in the sum."""
    settings: MappingOf[Any] = Field(default_factory=JsonMapping, json_schema_extra={"x-type": "names and values"})
    """Arguments of the function, by name."""


def reward_names(names: Sequence[str]) -> tuple[str, ...]:
    """What rewards are called in metrics: their names, numbered where one occurs twice."""
    count, so_far = Counter(names), Counter[str]()
    found = []
    for name in names:
        so_far[name] += 1
        found.append(name if count[name] == 1 else f"{name}#{so_far[name]}")
    return tuple(found)


class RolloutSection(Section):
    """Completions that the policy samples in every step. The section's presence switches it on."""

    enabled: bool = Field(default=True, json_schema_extra={"x-default": "true if the section is given, else false"})
    """Sample completions in every step instead of reading them; true when a `rollout` section is given, else false."""
    sampler: Literal["policy", "vllm"] = "policy"
    """What draws the completions: the policy itself, on its own device; or a vLLM server that you start,
    which loads the adapter again before each step."""
    num_generations: int = Field(default=8, gt=0, le=1024)
    """Completions of each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, in sampling and in training. With enabled false, grpo reads it, too: the temperature at
    which the completions of rows were sampled. Rows that say it (`sampling_temperature`) set it."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability; 1: from all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Draw from tokens that are at least this share as likely as the likeliest; 0: from all."""
    stop: ListOf[str] = ()
    """Texts that end a completion, too. It ends with the token that completes one, which is kept: the text is in what
    rewards get, and all tokens up to there are trained."""
    stop_token_ids: ListOf[Annotated[int, Field(ge=0)]] = ()
    """Ids of tokens that end a completion, too, beside the model's own end tokens."""
    num_generations_eval: int = Field(default=1, gt=0, le=1024)
    """Completions of each validation prompt."""
    temperature_eval: float = Field(default=0.0, ge=0)
    """The same of validation prompts; 0: the likeliest token each time."""
    steps_per_generation: int = Field(default=1, gt=0)
    """Steps whose prompts are sampled together, before the first of them: with more than 1, the later ones train on
    what an older policy sampled."""
    num_iterations: int = Field(default=1, gt=0)
    """How many times these steps are gone through before prompts are sampled again."""
    staleness: int = Field(default=0, ge=0, le=64)
    """Sampler vllm: how many steps old the weights are that sample, so that the server samples for the next steps while
    this one trains. 0: each step waits for what the current weights sample."""
    dynamic_sampling: bool = False
    """Leave out prompts whose completions all have the same reward, and sample further prompts in their place (DAPO,
    arXiv 2503.14476)."""
    max_refills: int = Field(default=3, ge=0)
    """Read with dynamic_sampling: how many times a step samples further prompts."""
    probe_prompts: int | None = Field(default=None, ge=0, le=4096)
    """Prompts that are sampled for before the first step, to forecast how many groups will have the same reward for all
    completions; they are not trained on. Null: 2 % of the prompts that the run samples for, at most 64, and none where
    that is fewer than 16; 0: none."""
    batch_tokens: int = Field(default=32_768, gt=0)
    """Tokens, prompts and completions, that are decoded together at most, and fewer where memory does not suffice;
    changes memory and speed."""
    vllm_url: str = "http://127.0.0.1:8000"
    """Where the server of sampler vllm listens."""
    vllm_model: str | None = None
    """The name under which it serves the base model; null: the first model that it names and that is no adapter."""
    vllm_timeout: float = Field(default=600.0, gt=0)
    """Seconds that one answer of it may take: the completions of one prompt."""
    vllm_retry_seconds: float = Field(default=300.0, ge=0)
    """How long it is tried again where it cannot be reached or is too busy, before the run stops."""
    vllm_requests: int = Field(default=64, gt=0, le=4096)
    """Prompts of each process that it works on at once."""
    vllm_max_logp_difference: float = Field(default=0.5, gt=0)
    """Sampler vllm: nats per token, on average over a step, that its log-probs may be from those of training; beyond,
    it samples from another model, and the run stops."""
    reward_timeout: float = Field(default=60.0, gt=0)
    """Seconds that a reward may take for the completions of one prompt."""
    reward_memory_gib: float | None = Field(default=None, gt=0)
    """GiB of memory that the process of the rewards may use, as measured on Linux; null: half of the machine's."""
    on_reward_error: Literal["stop", "skip_group", "value"] = "stop"
    """A reward that fails, takes too long, or gives null or no number: stop, leave the prompt out of the step, or take
    reward_error_value. What is not stopped at is counted."""
    reward_error_value: float = Field(default=0.0, ge=-LARGEST, le=LARGEST)
    """The reward of a completion whose own cannot be had, under on_reward_error value."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if "max_refills" in self.model_fields_set and self.max_refills != 3 and not self.dynamic_sampling:
            yield Problem(
                ("max_refills", "dynamic_sampling"),
                f"max_refills is {self.max_refills}, and without dynamic_sampling nothing reads it",
                fix="set dynamic_sampling: true, or remove max_refills",
            )
        if self.dynamic_sampling and self.num_generations < 2:
            yield Problem(
                ("dynamic_sampling", "num_generations"),
                "dynamic_sampling leaves out prompts whose completions all have the same reward, and num_generations "
                "is 1: that would be every prompt",
                "at least 2 completions per prompt",
                "raise num_generations, or remove dynamic_sampling",
            )
        if unread := [name for name in NOT_READ[self.sampler] if self._is_changed(name)]:
            yield Problem(
                (unread[0], "sampler"),
                f"{unread[0]} is given, and sampler {self.sampler} does not read it",
                fix=f"remove {unread[0]}, or choose the other sampler",
            )
        if self.staleness and self.sampler == "policy":
            yield Problem(
                ("staleness", "sampler"),
                f"staleness is {self.staleness}, and sampler policy samples and trains on one device: completions of "
                "older weights would save no time",
                "staleness: 0, or sampler: vllm",
                "remove staleness; steps_per_generation and num_iterations train several steps on one sampling",
            )
        if not self.vllm_url.startswith(("http://", "https://")):
            yield Problem(("vllm_url",), f"vllm_url is {self.vllm_url}", "http://HOST:PORT")
        if self.sampler == "vllm" and self.temperature != 1 and (self.top_k or self.top_p < 1 or self.min_p):
            yield Problem(
                ("temperature", "sampler"),
                f"temperature is {self.temperature:g} beside top_k, top_p or min_p, and vLLM gives log-probs before "
                "both or behind both, while training computes them behind the temperature alone",
                "a temperature of 1, or draws from all tokens",
                "remove one of them",
            )
        if self.reward_error_value != 0 and self.on_reward_error != "value":
            yield Problem(
                ("reward_error_value", "on_reward_error"),
                f"reward_error_value is {self.reward_error_value:g}, and on_reward_error {self.on_reward_error} does "
                "not read it",
                fix="set on_reward_error: value, or remove reward_error_value",
            )

    def _is_changed(self, name: str) -> bool:
        return name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default


OF_VLLM = ("vllm_url", "vllm_model", "vllm_timeout", "vllm_retry_seconds", "vllm_requests", "vllm_max_logp_difference")
NOT_READ: Mapping[str, tuple[str, ...]] = {"policy": OF_VLLM, "vllm": ("batch_tokens",)}
"""By sampler, the settings that only the other one reads."""
