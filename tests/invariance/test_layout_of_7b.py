"""A model of 7 billion weights, sharded over 8 processes that are played one after the other, and never held.

The model is on torch's meta device, the process group is torch's fake one. What each process would write into a
checkpoint is what torch's own planner makes of it. Each is played by a process of its own, since torch remembers where
shards lie.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from processes import apart
from strop.config import RunConfig, load_config
from strop.estimate.devices import Devices
from strop.estimate.memory import peak_memory
from strop.lengths import Sized
from strop.machine import machine_named, resident
from strop.objectives.base import build_objective
from strop.plan.row_tokens import packed_tokens
from strop.plan.work import Work
from strop.policy.model.configuration import model_config
from strop.policy.model.from_config import empty_model, shape_of
from strop.policy.model.load import LoadedModel
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.policy.sharding import Sharded
from strop.types import GroupLengths
from strop.world import World

RANKS = 8
MOST_BYTES = 2**29
"""That the test may hold; the weights alone are 27 GB."""
STATES = ("exp_avg", "exp_avg_sq")
BF16 = Precision(torch.bfloat16)
PAIR: Sized = GroupLengths(512, (256, 256))


@dataclass(frozen=True)
class Played(World):
    """One of several processes, alone in its turn."""

    def mesh(self, shard_size: int | None) -> DeviceMesh:
        return init_device_mesh("cpu", (self.size,), mesh_dim_names=("shard",))

    def _exchange(self, value: Any) -> list[Any]:
        return [value] * self.size

    def doing(self, what: str) -> None:
        pass

    def leave(self) -> None:
        pass

    def sum_gradients(self, parameters: Any) -> None:
        pass

    def share_tensors(self, tensors: Any) -> None:
        pass

    def beside(self) -> World:
        return self


@contextmanager
def played(rank: int) -> Iterator[World]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield Played(torch.device("meta"), rank, RANKS, rank, RANKS)
    finally:
        dist.destroy_process_group()


def config_of(folder: Path) -> RunConfig:
    sizes = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=32_000, tie_word_embeddings=False)
    config.save_pretrained(folder)
    keys = {"models.0.huggingface_id": str(folder), "dataset.train_file": "rows.jsonl", "post_training.method": "dpo"}
    return load_config(overrides={**keys, "training.bf16": True, "gpu.fsdp": True})


Written = dict[str, tuple[list[int], list[int]]]
"""Name of a tensor -> offsets and sizes of what is written of it."""


def written_by(rank: int, config: RunConfig) -> tuple[Written, int]:
    """What a process writes of the weights and the optimizer's state, and the bytes that it took to find that out."""
    before = resident("VmRSS")
    model = empty_model(config.models[0]).float()
    loaded = LoadedModel(model.train(), torch.float32, model_config(config.models[0]))
    policy = Policy(model, loaded, BF16, share_prefix=True)
    with played(rank) as world:
        strategy = Sharded(policy, world, None)
        tensors: dict[str, Tensor] = {}
        of: dict[str, str] = {}
        for name, weight in strategy.trained.items():
            for made in (f"policy.{name}", *(f"optimizer.{state}.{name}" for state in STATES)):
                tensors[made], of[made] = torch.empty_like(weight, device="meta"), name
        own = strategy.own_share(strategy.to_save(tensors, of))
        planner = DefaultSavePlanner()
        planner.set_up_planner(own, None, is_coordinator=rank == 0)
        items = planner.create_local_plan().items
        written = {
            item.index.fqn: (list(item.tensor_data.chunk.offsets), list(item.tensor_data.chunk.sizes))
            for item in items
            if item.tensor_data is not None
        }
        return written, resident("VmHWM") - before


@pytest.mark.parametrize("ranks", [(7,), pytest.param(tuple(range(RANKS)), marks=pytest.mark.nightly)], ids=str)
def test_its_checkpoint_is_laid_out_without_holding_it(ranks: tuple[int, ...], tmp_path: Path) -> None:
    config = config_of(tmp_path)
    shape = shape_of(config.lora, config.models[0])
    total = 3 * 4 * (shape.matrix + shape.others)  # weights and two states, in float32
    assert total > 80e9
    found = [apart(written_by, rank, config) for rank in ranks]
    layout = {rank: written for rank, (written, _) in zip(ranks, found, strict=True)}
    assert all(held < MOST_BYTES for _, held in found)
    sizes = {rank: 4 * sum(prod(size) for _, size in parts.values()) for rank, parts in layout.items()}
    for rank in ranks:
        assert sizes[rank] == pytest.approx(total / RANKS, rel=1e-3), rank
    parts = (shape, config, build_objective(config.post_training), BF16, machine_named("h100"))
    predicted = peak_memory(Work.of([PAIR], packed_tokens), *parts, Devices(RANKS, RANKS))
    assert predicted["weights"] + predicted["optimizer"] == pytest.approx(total / RANKS, rel=1e-3)
    files = {f"shard-{rank + 1:05}": dict(sorted(own.items())) for rank, own in layout.items()}
    (tmp_path / "layout.json").write_text(json.dumps(files))
    if len(ranks) == RANKS:
        covered: dict[str, int] = defaultdict(int)
        starts = defaultdict(set)
        for own in layout.values():
            for name, (offsets, size) in own.items():
                covered[name] += prod(size)
                starts[name].add(offsets[0])
        names = {name for name, _ in empty_model(config.models[0]).named_parameters()}
        assert {name.removeprefix("policy.") for name in covered if name.startswith("policy.")} == names
        assert 4 * sum(covered.values()) == total, "everything once"
        assert all(len(starts[name]) == RANKS for name in covered if name.endswith("q_proj.weight"))
