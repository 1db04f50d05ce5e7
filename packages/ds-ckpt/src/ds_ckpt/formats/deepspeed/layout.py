"""A folder of DeepSpeed's -> :class:`~ds_ckpt.stored.Stored`: which files are there, and which stage reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_ckpt.checks import Field, damaged
from ds_ckpt.formats.deepspeed import module as modules
from ds_ckpt.formats.deepspeed.building import Builder
from ds_ckpt.formats.deepspeed.folder import list_folder
from ds_ckpt.formats.deepspeed.jsonable import Encoder
from ds_ckpt.formats.deepspeed.stage0 import read_stage0
from ds_ckpt.formats.deepspeed.state import Optimizer, Scaling, scaler_in, state_of
from ds_ckpt.formats.deepspeed.torchfile import read_torch_file
from ds_ckpt.formats.deepspeed.universal import read_universal
from ds_ckpt.formats.deepspeed.zero import partition_count, read_partitions, read_slices, stage_of
from ds_ckpt.storage import folder_at
from ds_ckpt.stored import Stored
from ds_core.interfaces.logical import MASTER

if TYPE_CHECKING:
    from pathlib import Path

    from ds_ckpt.formats.deepspeed.folder import Listing
    from ds_ckpt.formats.deepspeed.module import Module

__all__ = ["read_folder"]


def read_folder(folder: Path) -> Stored:
    """Return what DeepSpeed's checkpoint in ``folder`` holds."""
    return _Reading(folder, list_folder(folder)).read()


class _Reading:
    """One folder being read."""

    def __init__(self, folder: Path, listing: Listing) -> None:
        self.folder, self.listing = folder, listing
        self.builder = Builder(folder)
        self.model = self.parse(listing.first_model())
        modules.check_kind(self.model)
        self.module: Module = modules.module_of(self.model)
        self.world_size = 1
        self.stage = 0

    def parse(self, name: str) -> Field:
        file = read_torch_file(self.folder, name)
        self.builder.add_file(file)
        return Field(file.value, "", self.folder, name)

    def read(self) -> Stored:
        optimizer, scaling = self.optimizer()
        modules.add_buffers(self.module, self.builder)
        if self.listing.model is not None:
            modules.add_weights(self.module, self.builder)
        else:
            modules.add_frozen_slices(self.model, self.all_models, self.builder)
        version = self.model.get("ds_version")
        tensors = self.builder.tensors
        state = state_of(
            self.model,
            stage=self.stage,
            optimizer=optimizer,
            scaling=scaling,
            weight_dtypes=[ref.dtype for ref in self.module.params.values()],
            master_dtypes=[stored.of.dtype for stored in tensors.values() if stored.of.kind == MASTER],
            excluded=modules.unread(self.module, self.builder),
            params=self.module.params,
            shared=self.module.aliases,
            encoder=Encoder(self.folder),
        )
        return Stored(
            folder_at(self.folder),
            "deepspeed",
            "unknown" if version is None else version.text(100),
            self.world_size,
            tensors,
            self.builder.files,
            state,
        )

    def optimizer(self) -> tuple[Optimizer | None, Scaling]:
        shapes = self.model.get("param_shapes")
        if self.listing.is_universal:
            if shapes is None:
                raise self.model["param_shapes"].wrong("shapes of the parameters")
            optimizer, scaling, self.stage = read_universal(shapes.list(), self.builder)
            self.world_size = self.told_world_size()
            return optimizer, scaling
        saved = self.model.get("optimizer")
        if not self.listing.optimizers and (saved is not None or shapes is None):
            self.world_size = self.told_world_size()
            if self.listing.model is None:
                raise damaged("the optimizer files are missing, and with them the weights of stage 3", self.folder)
            if saved is None:
                return None, Scaling()
            candidates = {name: ref.shape for name, ref in self.module.params.items()}
            return read_stage0(saved, candidates, self.builder)
        if shapes is None:
            raise self.model["param_shapes"].wrong("shapes of the parameters, as there are optimizer files")
        return self.zero(shapes)

    def zero(self, shapes: Field) -> tuple[Optimizer, Scaling]:
        some = next(iter(self.listing.optimizers.values()), None)
        if some is None:
            self.listing.expect(self.listing.optimizers, self.told_world_size(), "optimizer")
        assert some is not None
        parsed = {some: self.inner(some)}
        self.world_size = partition_count(parsed[some]) or self.told_world_size()
        names = self.listing.expect(self.listing.optimizers, self.world_size, "optimizer")
        ranks = [parsed[name] if name in parsed else self.inner(name) for name in names]
        self.stage = stage_of(ranks[0])
        for rank in ranks:
            if stage_of(rank) != self.stage or (partition_count(rank) or self.world_size) != self.world_size:
                raise rank.wrong(f"stage {self.stage} of {self.world_size} ranks, as in the file of rank 0")
        if (self.stage == 3) != (self.listing.model is None):
            raise self.model.wrong(f"model-states files as stage {self.stage} writes them")
        read = read_slices if self.stage == 3 else read_partitions
        return read(ranks, shapes.list(), self.builder), scaler_in(ranks[0])

    def inner(self, name: str) -> Field:
        return self.parse(name)["optimizer_state_dict"]

    def all_models(self) -> list[Field]:
        names = self.listing.expect(self.listing.models, self.world_size, "model-states")
        return [self.model, *(self.parse(name) for name in names[1:])]

    def told_world_size(self) -> int:
        """Return the number of ranks by the model-states file; old ones do not say."""
        found = self.model.get("dp_world_size")
        return 1 if found is None else found.whole(1, 2**24)
