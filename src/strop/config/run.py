"""The whole configuration, the rules that cross sections, and where each value came from. Floor 1, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from strop.config.base_section import ListOf, NamedOf, Problem, Section
from strop.config.methods import SAMPLING, PostTraining, SftSettings, either
from strop.config.sections import (
    DatasetSection,
    FinetuningSection,
    GpuSection,
    LoggingSection,
    LoraSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    TrainingSection,
    reward_names,
)
from strop.types import RowShape

SHARDABLE = ("adamw_torch_fused", "adamw_torch", "sgd")
"""Optimizers that update each number of a weight by itself, so that every process can update its part."""


class RunConfig(Section):
    """Everything a run is made of. What is null here and derived later is written out in the run's config.yaml."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides the order of the rows, the validation split, new weights and dropout."""
    models: ListOf[ModelSection] = Field(min_length=1)
    """Models to train, one after the other."""
    dataset: DatasetSection = DatasetSection()
    post_training: PostTraining = SftSettings()
    rollout: RolloutSection = RolloutSection(enabled=False)
    rewards: NamedOf[RewardSection] = Field(
        default=(),
        json_schema_extra={"x-type": "a list of names, or of objects with name, weight and settings"},
    )
    """What sampled completions are rewarded by, each with `name`, `weight` and `settings`: shipped rewards such as
    `exact_match`, functions of your own (`module:function`, `file.py:function`), or reward models (`model:ID`)."""
    lora: LoraSection = LoraSection(enabled=False)
    training: TrainingSection = TrainingSection()
    gpu: GpuSection = GpuSection()
    finetuning: FinetuningSection = FinetuningSection()
    logging: LoggingSection = LoggingSection()

    _origins: dict[str, str] | None = PrivateAttr(default=None)

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted key -> where its value came from: `default...`, `preset NAME`, `FILE:LINE`, `command line`, `python`.

        Every key of the configuration has an entry. A copy with changed values keeps the entries of the original.
        """
        if self._origins is None:
            self._origins = {key: "python" if given else "default" for key, _, given in self.leaves()}
        return MappingProxyType(self._origins)

    def with_origins(self, origins: Mapping[str, str]) -> Self:
        """This configuration, with these origins."""
        copy = self.model_copy()
        copy._origins = dict(origins)
        return copy

    def with_values(self, values: Mapping[str, Any], origin: str | Mapping[str, str]) -> Self:
        """A copy in which these keys (`section.key`, or a top-level key) have these values and this origin."""
        update: dict[str, Any] = {}
        for key, value in values.items():
            section, _, field = key.partition(".")
            if field:
                update[section] = update.get(section, getattr(self, section)).model_copy(update={field: value})
            else:
                update[key] = value
        origins = {key: origin if isinstance(origin, str) else origin[key] for key in values}
        return self.model_copy(update=update).with_origins({**self.origins, **origins})

    def leaves(self) -> Iterator[tuple[str, Any, bool]]:
        """Every key with a value, in the order of the schema: (dotted key, value, whether it was given)."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name == "models":
                sections = {f"models.{i}": model for i, model in enumerate(value)}
            elif isinstance(value, Section):
                sections = {name: value}
            else:
                yield name, value, name in self.model_fields_set
                continue
            for prefix, section in sections.items():
                for key in type(section).model_fields:
                    given = name in self.model_fields_set and key in section.model_fields_set
                    yield f"{prefix}.{key}", getattr(section, key), given

    def __eq__(self, other: object) -> bool:
        # two configurations are equal whatever their origins
        return self.__dict__ == other.__dict__ if isinstance(other, RunConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, data: Any) -> Any:
        method = data.get("post_training") if isinstance(data, Mapping) else None
        if isinstance(method, Mapping) and method.get("method") is None:
            return {**data, "post_training": {**method, "method": "sft"}}
        return data

    def adapts(self, model: ModelSection) -> bool:
        """Whether adapters train, and not all weights: new ones or the model's own."""
        return self.lora.enabled or model.adapter is not None

    @property
    def rows(self) -> RowShape:
        """What the method needs of the data: under rollout prompts alone."""
        return "prompt" if self.rollout.enabled else self.post_training.ROWS

    @property
    def reward_names(self) -> tuple[str, ...]:
        """What the rewards are called in metrics: their names, numbered where one occurs twice."""
        return reward_names([reward.name for reward in self.rewards])

    def _rollout_problems(self) -> Iterator[Problem]:
        if self.rollout.enabled:
            yield from self._sampling_problems()
        elif (only := self.post_training.only_samples) is not None:
            yield Problem(
                (f"post_training.{only.setting}", "rollout"),
                f"post_training.{only.setting} is {only.value}, and nothing is sampled",
                "a rollout section",
                f"add rollout: {{enabled: true}}, or set {only.setting}: {only.without}",
            )
        elif self.rewards:
            yield Problem(
                ("rewards",),
                "rewards are given, and nothing is sampled that they could reward",
                "a rollout section beside them",
                "add rollout: {enabled: true}, or remove rewards",
            )

    def _sampling_problems(self) -> Iterator[Problem]:
        method, rollout = self.post_training, self.rollout
        if not method.samples:
            variant = method.SAMPLES_WITH
            yield Problem(
                ("rollout", "post_training.method"),
                f"completions are to be sampled, and method {method.method} trains on those of the rows"
                + (f" without {variant}" if variant else ""),
                "method " + either([f"{n} with {m.SAMPLES_WITH}".removesuffix(" with ") for n, m in SAMPLING.items()]),
                f"set post_training.{variant or 'method: grpo'}, or remove rollout",
            )
            return
        if method.REWARDED and not self.rewards:
            yield Problem(
                ("rewards", "rollout"), "completions are to be sampled, and no reward is given", "at least one"
            )
        yield from self._probe_problems()
        if rollout.num_generations < 2 and (compares := method.compares) is not None:
            name, value, without = compares
            yield Problem(
                ("rollout.num_generations", f"post_training.{name}"),
                f"rollout.num_generations is 1, and {name} {value} compares the completions of a prompt",
                "at least 2",
                f"raise it, or set post_training.{name}: {without}",
            )
        yield from self._served_problems()
        if rollout.num_generations_eval > 1 and rollout.temperature_eval == 0:
            yield Problem(
                ("rollout.num_generations_eval", "rollout.temperature_eval"),
                f"rollout.num_generations_eval is {rollout.num_generations_eval}, and at temperature_eval 0 all are "
                "the same",
                "1, or a temperature above 0",
                "set temperature_eval: 1.0, or remove num_generations_eval",
            )

    def _probe_problems(self) -> Iterator[Problem]:
        """What a forecast of groups without signal needs: rewards to compare."""
        rollout = self.rollout
        if rollout.probe_prompts and not (self.rewards and rollout.num_generations > 1):
            yield Problem(
                ("rollout.probe_prompts",),
                f"rollout.probe_prompts is {rollout.probe_prompts}, and "
                + ("there is no reward" if not self.rewards else "one completion per prompt is compared with no other"),
                "rewards, and at least 2 completions per prompt",
                "remove probe_prompts",
            )

    def _served_problems(self) -> Iterator[Problem]:
        """What a server that samples cannot be given."""
        if self.rollout.sampler != "vllm":
            return
        if not all(map(self.adapts, self.models)):
            yield Problem(
                ("rollout.sampler", "lora.enabled"),
                "rollout.sampler is vllm, which is given adapters, and all weights train",
                "a lora section",
                "add lora: {r: 32}, or set rollout.sampler: policy",
            )
        if named := [model for model in self.models if model.add_tokens]:
            yield Problem(
                ("rollout.sampler", "models"),
                f"rollout.sampler is vllm, which does not know the tokens that {named[0].huggingface_id} gets by "
                "add_tokens",
                "a model whose tokens stay as they are",
                "remove add_tokens, or set rollout.sampler: policy",
            )
        others = {"use_dora": False, "modules_to_save": None, "target_parameters": None, "bias": "none"}
        for key in (key for key, known in others.items() if getattr(self.lora, key) != known):
            yield Problem(
                ("rollout.sampler", f"lora.{key}"),
                f"rollout.sampler is vllm, which does not serve adapters with lora.{key}",
                "plain LoRA, also with use_rslora",
                f"remove lora.{key}, or set rollout.sampler: policy",
            )

    def _sharded_model_problems(self) -> Iterator[Problem]:
        """What of a model cannot lie in parts."""
        for i, model in enumerate(self.models):
            if model.quant == "8bit":
                yield Problem(
                    (f"models.{i}.quant", "gpu.fsdp"),
                    f"models.{i}.quant is 8bit, whose scales belong to whole weights, and gpu.fsdp shards them",
                    "4bit, or a base that is not quantised",
                    "set quant: 4bit, or leave gpu.fsdp out",
                )
            if model.quant == "4bit" and self.lora.use_dora:
                yield Problem(
                    (f"models.{i}.quant", "lora.use_dora", "gpu.fsdp"),
                    f"models.{i}.quant is 4bit and lora.use_dora is true, which needs whole weights in every pass, and "
                    "gpu.fsdp shards them",
                    "two of the three",
                    "leave use_dora or gpu.fsdp out",
                )
            if model.add_tokens and self.lora.enabled:
                yield Problem(
                    (f"models.{i}.add_tokens", "gpu.fsdp"),
                    "rows of new tokens train inside of an embedding that is whole, and gpu.fsdp shards it",
                    "one of the two",
                    "leave gpu.fsdp out, or train all weights (lora.enabled: false)",
                )

    def _sharding_problems(self) -> Iterator[Problem]:
        """What needs whole weights."""
        if not self.gpu.fsdp:
            return
        optim = self.training.optim
        if optim not in SHARDABLE:
            yield Problem(
                ("training.optim", "gpu.fsdp"),
                f"training.optim is {optim}, which looks at more of a weight than one process has of it",
                f"with gpu.fsdp, one of {', '.join(SHARDABLE)}",
                "choose one of these, or leave gpu.fsdp out",
            )
        yield from self._sharded_model_problems()
        if self.training.fp16:
            yield Problem(
                ("training.fp16", "gpu.fsdp"),
                "training.fp16 scales its loss by what every process sees of the gradients, and gpu.fsdp is true",
                "bf16, or float32",
                "set training.bf16: true in place of fp16, or leave gpu.fsdp out",
            )
        if self.rollout.enabled and self.rollout.sampler == "vllm":
            yield Problem(
                ("rollout.sampler", "gpu.fsdp"),
                "rollout.sampler is vllm, which gets an adapter that one process has whole, and gpu.fsdp divides it",
                "sampler: policy, or gpu.use_ddp",
                "set rollout.sampler: policy, or leave gpu.fsdp out",
            )

    def problems(self) -> Iterator[Problem]:
        yield from self._rollout_problems()
        yield from self.post_training.problems_in(self)
        yield from self._sharding_problems()
        names = [model.name for model in self.models]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield Problem(
                    (f"models.{i}.name", f"models.{i}.huggingface_id"),
                    f"models.{names.index(name)} and models.{i} are both named {name!r}",
                    "names that differ, since they name the run folders",
                    "give each model its own `name:`",
                )
        for i, model in enumerate(self.models):
            if model.quant != "none" and not self.adapts(model):
                yield Problem(
                    (f"models.{i}.quant", "lora.enabled"),
                    f"models.{i}.quant is {model.quant}, and all weights are to be trained: quantised ones cannot "
                    "move by a step of training, which is smaller than the distance between two of them",
                    "adapters on top of the quantised base",
                    "set lora.enabled: true, or quant: none",
                )
            if model.quant != "none" and self.lora.enabled and self.lora.moves_base:
                yield Problem(
                    (f"models.{i}.quant", "lora.init_lora_weights"),
                    f"lora.init_lora_weights: {self.lora.init_lora_weights} changes the base's weights, and "
                    f"models.{i}.quant is {model.quant}: quantised ones cannot be changed by so little",
                    "true or gaussian on a quantised base",
                    "remove init_lora_weights, or set quant: none",
                )
        if self.training.packing and not self.post_training.PACKS:
            yield Problem(
                ("training.packing",),
                f"training.packing is true, and the method is {self.post_training.method}",
                "method sft; pairs share their prompts, and nothing is padded, without it",
                "remove packing",
            )
        if self.training.save_dtype != "auto" and all(map(self.adapts, self.models)):
            yield Problem(
                ("training.save_dtype",),
                f"training.save_dtype is {self.training.save_dtype}; adapters are trained, which are saved in float32",
                "auto, or full training",
                "remove save_dtype",
            )
