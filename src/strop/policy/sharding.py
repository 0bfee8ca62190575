"""The weights of a policy sharded over processes by torch's FSDP (`fully_shard`). Floor 2.

    matrices   sharded by rows over the processes of a replica; so are their gradients and the optimizer's state. Each
               layer is one group, gathered while it computes; embedding and head are another.
    vectors    (norms, biases) are whole in every process. They are a thousandth of a model, and 16-bit copies of them
               would lose what a small learning rate moves. Their gradients are summed as those of a replicated model.

Layers are gathered in the compute dtype, embedding and head in the dtype that they are kept in: the sums over the
layers begin with the embedding, and gradients of a shared embedding and head are added up there.

The optimizer sees this process's rows as plain tensors, on which any update that treats each weight by itself is right.
A layer's collective calls happen inside forward and backward passes, so all processes must go through the same number
of passes: `idle` stands for a micro-batch that a process does not have.
"""

from __future__ import annotations

import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from strop.batch import Batch
from strop.errors import CheckpointError, ModelError, foreign_errors
from strop.policy.gradient_checkpointing import layers_that_can
from strop.policy.gradient_norm import clip, gradient_norm
from strop.policy.model.deferred_weights import DeferredWeights
from strop.policy.model.load import check_finite
from strop.policy.policy import Policy
from strop.policy.precision import Precision
from strop.policy.strategy import Piece, Strategy, rounded
from strop.policy.teacher import DIVERGENCE, TEACHER_LOGPS
from strop.types import Completion, Group, Origin
from strop.world import World

BROKEN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket", re.IGNORECASE)
"""In the messages of errors of torch.distributed, when another process is gone."""


class Sharded(Strategy):
    """Every process holds its rows of each matrix.

    Args:
        policy: on the CPU; it is changed in place and moved to the device, layer by layer.
        shard_size: how many processes share a copy of the model; None: all.
        deferred: weights of the policy that are still in the files; each process reads its part of them.

    Raises:
        ConfigError: `shard_size` does not divide the number of processes.
        ModelError: torch cannot shard the model, or its files cannot be read.
    """

    repeats = False

    def __init__(
        self, policy: Policy, world: World, shard_size: int | None, deferred: DeferredWeights | None = None
    ) -> None:
        super().__init__(policy, world)
        self.mesh = world.mesh(shard_size)
        self._group = self.mesh.get_group(self.mesh.ndim - 1)
        self._index = self.mesh.get_local_rank(self.mesh.ndim - 1)
        self._layers = layers_that_can(policy.model)
        self._layer_of = {module: layer for layer in self._layers for module in layer.modules()}

        def failed(why: str) -> ModelError:
            return ModelError(f"torch cannot shard it: {why}", where=policy.where, fix="leave gpu.fsdp out")

        with foreign_errors(failed):
            _shard(policy, self._layers, self.mesh, world.device)
        if deferred is not None:
            with world.together():
                self._read(deferred)
                world.any(False)

    @torch.no_grad()
    def _read(self, deferred: DeferredWeights) -> None:
        """Fills this process's parts of the weights that are still in the files, one after the other."""
        sources = {self.policy.model.get_parameter(name): source for name, source in deferred.names.items()}
        for weight, source in sources.items():  # tied ones once
            if isinstance(weight, DTensor):
                own, start = weight.to_local(), self._first_row(weight)
                own.copy_(deferred.read(source, start, start + len(own)))
            else:
                own = deferred.read(source, 0, weight.numel()).to(weight.device, weight.dtype)
                weight.data = own
            check_finite({source.key: own}, self.policy.where)

    # -- the model ---------------------------------------------------------------------------------------------------

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        if not any(isinstance(weight, DTensor) for weight in module.parameters()):
            yield
            return
        layer = self._layer_of.get(module, self.policy)
        assert isinstance(layer, FSDPModule)
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    @contextmanager
    def all_gathered(self) -> Iterator[None]:
        """Weights of layers are in the compute dtype meanwhile, others as they are kept."""
        modules = [module for module in self.policy.modules() if isinstance(module, FSDPModule)]
        copies = self.policy.weight_copies
        with self.passes():
            try:
                for module in modules:
                    module.unshard()
                    module.set_reshard_after_forward(False, recurse=False)
                copies.keeps = True
                yield
            finally:
                copies.keeps = False
                copies.forget()
                for module in modules:
                    module.set_reshard_after_forward(True, recurse=False)
                    module.reshard()
            # FSDP gathers ahead in a backward pass, in the order in which layers have computed before it. After this
            # pass that order ends in the same way in all processes, however often each called the model in the block.
            self.idle(False)

    def idle(self, backward: bool, wants: Set[str] = frozenset()) -> None:
        wants = wants & {DIVERGENCE, TEACHER_LOGPS}  # the teacher computes in the same pass, and may be sharded, too
        with torch.set_grad_enabled(backward):
            scored = self.policy(self._filling(wants))
        if backward:
            given = [x for x in (scored.logps, *scored.columns.per_token.values()) if x.requires_grad]
            torch.autograd.backward(given, [torch.zeros_like(x) for x in given])

    def _filling(self, wants: Set[str]) -> Batch:
        """The smallest micro-batch."""
        completion = Completion(array("q", [0, 0]), bytes([1, 1]))
        return self.policy.collate([Group(array("q", [0]), (completion,), Origin("filling", 1))], wants=wants)

    def num_idle(self, num_passes: int) -> int:
        return max(self.world.gather(num_passes)) - num_passes

    def forget_passes(self) -> None:
        reset = getattr(self.policy, "reset_iter_state", None)  # from torch 2.13 on
        if callable(reset):
            reset()

    def outlasting(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    @contextmanager
    def passes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and BROKEN.search(str(error)) is None:
                raise
            with self.world.connected():
                raise

    # -- gradients and the optimizer -----------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        with torch.no_grad():
            return {name: self._piece(weight) for name, weight in self.policy.trainable().items()}

    def _piece(self, weight: nn.Parameter) -> Piece:
        if not isinstance(weight, DTensor):
            return Piece(weight, 0, weight.numel(), counts=self._index == 0)
        start = self._first_row(weight) * weight[:1].numel()
        return Piece(nn.Parameter(weight.to_local()), start, weight.numel(), counts=True)

    def _first_row(self, weight: DTensor) -> int:
        """Of those that lie here."""
        per_process = -(-len(weight) // self._group.size())  # as torch.chunk divides them
        return min(self._index * per_process, len(weight))

    def sum_gradients(self) -> None:
        vectors = []
        for name, weight in self.policy.trainable().items():
            if isinstance(weight, DTensor):
                gradient, weight.grad = weight.grad, None
                assert gradient is None or isinstance(gradient, DTensor)
                self.pieces[name].tensor.grad = None if gradient is None else gradient.to_local()
            else:
                vectors.append(weight)
        self.world.sum_gradients(vectors)

    def clip(self, limit: float) -> Tensor:
        counted = [piece.tensor.grad for piece in self.pieces.values() if piece.counts]
        own = gradient_norm(gradient for gradient in counted if gradient is not None)
        norm = self.norm(own.to(self.world.device))
        clip(self.trained.values(), limit, norm)
        return norm

    def sum(self, own: Tensor) -> Tensor:
        total = own.clone()
        with self.world.connected():
            dist.all_reduce(total, group=self._group)
        return total

    def norm(self, own: Tensor) -> Tensor:
        return self.sum(own.square()).sqrt()

    def placed(self, values: Tensor, places: Tensor, size: int) -> Tensor:
        return self.sum(values.new_zeros(size).index_copy_(0, places, values))

    # -- saving and loading --------------------------------------------------------------------------------------------

    def to_save(self, tensors: Mapping[str, Tensor], of: Mapping[str, str]) -> dict[str, Tensor]:
        weights = self.policy.trainable()
        saved = dict(tensors)
        for name in of:
            weight = weights[of[name]]
            if isinstance(weight, DTensor) and tensors[name].shape == self.pieces[of[name]].tensor.shape:
                saved[name] = _sharded_as(weight, tensors[name])
        return saved

    def own_share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replicas take turns, and so do the processes of a replica for what all of them hold."""
        replica = self.world.rank // self._group.size()
        num_replicas = self.world.size // self._group.size()
        own: dict[str, Tensor] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            if isinstance(tensor, DTensor):
                if number % num_replicas == replica and tensor.to_local().numel():
                    own[name] = tensor
            elif number % self.world.size == self.world.rank:
                own[name] = tensor
        return own

    def load(self, tensors: Mapping[str, Tensor], read: Callable[[Mapping[str, Tensor]], None]) -> None:
        with self.world.together():
            read(tensors)

    def whole(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):
                yield name, rounded(tensor.detach(), dtype)
                continue
            first_replica = self.world.rank < self._group.size()
            rows = rounded(tensor.to_local().detach(), dtype)
            parts = self.world.gather(rows if first_replica else rows[:0])
            yield name, torch.cat(parts) if self.world.is_main else rows

    def check_folder(self, folder: Path) -> None:
        with self.world.together():
            self.world.any(False)  # rank 0 has made it
            if not folder.is_dir():
                raise CheckpointError(
                    f"process {self.world.rank} does not see this folder, which process 0 has made",
                    where=str(folder),
                    expected="with gpu.fsdp, a folder that all machines share: each process writes its part of a "
                    "checkpoint",
                    fix="choose another training.output_dir",
                )

    def describe(self) -> str | None:
        size, of = self._group.size(), self.world.size
        copies = f", {of // size} copies" if size < of else ""
        return f"sharded over {size} processes{copies} (FSDP): {len(self._layers)} layers and the rest"


def _sharded_as(weight: DTensor, rows: Tensor) -> DTensor:
    """Rows of this process as the tensor that is sharded as `weight` is."""
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(
        rows.detach(), mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _shard(policy: Policy, layers: list[nn.Module], mesh: DeviceMesh, device: torch.device) -> None:
    # a view that a pass returns must not be changed in place, which nothing here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    vectors = {weight for weight in policy.parameters() if weight.ndim < 2}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=_of_layers(policy.precision), ignored_params=vectors)
    # Resharded, too, so that outside of a pass every process sees its rows only: what an optimizer or a checkpoint
    # changes there is gathered by the next pass.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(policy, mesh=mesh, mp_policy=whole, reshard_after_forward=True, ignored_params=vectors)
    for weight in vectors:
        weight.data = weight.data.to(device)
    register_fsdp_forward_method(policy, "own_pass")
    policy.weight_copies.keeps = False
    for module in policy.modules():
        if isinstance(module, FSDPModule):  # gradients are sums over all processes, as the counts of a step want them
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _of_layers(precision: Precision) -> MixedPrecisionPolicy:
    if not precision.is_low:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(precision.compute, precision.master, cast_forward_inputs=False)
