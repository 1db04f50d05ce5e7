"""DeepSpeed's accessor surface on the engine: names over the parts, no mechanism of its own (spec/core.md 3.2, 3.3)."""

from __future__ import annotations

import logging
import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ds_core import comm
from ds_core.checkpoint.deepspeed_interface import TorchFiles
from ds_core.engine import restore, state
from ds_core.engine.config_getters import ConfigGetters
from ds_core.engine.effects import without_effect_here
from ds_core.engine.parts import Outcome
from ds_core.errors import ConfigError, EngineError, NoCheckpointError, NotBuiltError
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torch.optim import Optimizer

    from ds_core.checkpoint.huggingface import Exported
    from ds_core.config import Config
    from ds_core.data import DeepSpeedDataLoader
    from ds_core.engine.engine import Progress
    from ds_core.engine.overflow import OverflowHistory, OverflowRecord
    from ds_core.engine.parts import Parts
    from ds_core.engine.precision_report import PrecisionReport
    from ds_core.interfaces.scheduler import LRSchedule

__all__ = ["EngineFace"]


class EngineFace(ConfigGetters, nn.Module):
    """Everything of ``DeepSpeedEngine`` that only reads or forwards."""

    parts: Parts
    module: nn.Module
    progress: Progress
    device: torch.device
    training_dataloader: DeepSpeedDataLoader | None
    overflow_history: OverflowHistory
    client_optimizer: Any = None
    """What ``initialize`` was given as ``optimizer``."""
    client_lr_scheduler: Any = None
    """What ``initialize`` was given as ``lr_scheduler``."""
    _config: Config
    _face: Callable[[], Any] = staticmethod(lambda: None)

    _LATER: ClassVar[dict[str, str]] = {
        "no_sync": "leave no_sync() out: below stage 2 gradients are reduced only at the end of a window already, "
        "from stage 2 on a rank keeps its share alone, so every backward reduces",
        "coalesce_grad_reduction": "call engine.backward several times before engine.step()",
        "scale": "call engine.backward(loss)",
        "offload_states": "it comes with a later release of ds-zero",
        "reload_states": "it comes with a later release of ds-zero",
    }

    # -- the client's objects ---------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Any:
        """The partition's or the precision's face over the torch optimizer where one has one, else that itself.

        None for an engine that only runs forward.
        """
        if self.parts.optimizer is None:
            return None
        face = self._face()
        if face is None:
            face = self.parts.partition.optimizer_face(self)
            if face is None:
                face = self.parts.precision.optimizer_face(self)
            if face is None:
                return self.basic_optimizer
            # Weakly: a face holds its engine, and a cycle would keep a dropped engine's memory for a while.
            self._face = weakref.ref(face)
        return face

    @property
    def basic_optimizer(self) -> Optimizer | None:
        """The torch optimizer, over fp32 masters where the precision keeps them; learning-rate schedules drive it."""
        return None if self.parts.optimizer is None else self.parts.optimizer.optimizer

    @property
    def lr_scheduler(self) -> LRSchedule | None:
        """The schedule; set it to None to step one yourself."""
        return self.parts.schedule.schedule

    @lr_scheduler.setter
    def lr_scheduler(self, schedule: LRSchedule | None) -> None:
        self.parts.schedule.schedule = schedule

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration as it was given."""
        return self._config.raw

    # -- counters ---------------------------------------------------------------------------------------------------

    @property
    def global_steps(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self.progress.global_steps

    @property
    def global_samples(self) -> int:
        return self.progress.global_samples

    @property
    def skipped_steps(self) -> int:
        return self.progress.skipped_steps

    @property
    def micro_steps(self) -> int:
        return self.parts.accumulation.micro_steps

    # -- ranks ------------------------------------------------------------------------------------------------------

    @property
    def global_rank(self) -> int:
        return comm.get_rank()

    @property
    def local_rank(self) -> int:
        return comm.get_local_rank()

    @property
    def world_size(self) -> int:
        return comm.get_world_size()

    @property
    def data_parallel_group(self) -> Any:
        return self.parts.group

    @property
    def dp_world_size(self) -> int:
        return self.parts.world_size

    # -- batch sizes and boundaries ---------------------------------------------------------------------------------

    def train_batch_size(self) -> int:
        return self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps() * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self.parts.accumulation.steps

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return (train batch size, micro-batch size, accumulation steps)."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the accumulation steps so that a step takes ``train_batch_size`` samples.

        Raises:
            ConfigError: it is not a multiple of micro-batch size times ranks.
            EngineError: inside an accumulation window.
        """
        per_micro_step = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size <= 0 or train_batch_size % per_micro_step:
            raise ConfigError(
                f"train_batch_size {train_batch_size} is not a multiple of {self.train_micro_batch_size_per_gpu()} "
                f"samples x {self.dp_world_size} ranks = {per_micro_step}",
                where="set_train_batch_size",
                fix=f"use a multiple of {per_micro_step}",
            )
        window = self.parts.accumulation
        if window.in_window:
            raise EngineError(
                "the batch size cannot change inside an accumulation window",
                where=f"micro-batch {window.micro_steps}",
                fix="call set_train_batch_size after a step at the boundary",
            )
        window.steps = train_batch_size // per_micro_step

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.parts.accumulation.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the coming backward and step end a window; None: count micro-batches again."""
        self.parts.accumulation.override = is_boundary

    # -- results of the last step -----------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """Return the L2 norm of the last step's gradients before clipping, unscaled; None before the first step."""
        return self.progress.norm

    def was_step_applied(self) -> bool:
        """Return whether the last ``step()`` changed the weights."""
        return self.progress.outcome is Outcome.UPDATED

    def get_lr(self) -> list[float]:
        return [float(group.get("lr", 0.0)) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        """Return each group's momentum where it has one, else its betas."""
        return [group.get("momentum", group.get("betas")) for group in self._groups()]

    def _groups(self) -> Sequence[Mapping[str, Any]]:
        return [] if self.basic_optimizer is None else self.basic_optimizer.param_groups

    @property
    def cur_scale(self) -> float:
        """The loss scale of the coming backward."""
        return self.parts.precision.scaler.scale

    @property
    def overflows(self) -> tuple[OverflowRecord, ...]:
        """The last steps whose gradients held inf or NaN, newest last: step, scale, parameter, module, ranks."""
        return self.overflow_history.records

    def precision_report(self) -> PrecisionReport:
        """Return which dtype everything has, by parameter group; prints as a table."""
        from ds_core.engine.precision_report import precision_report

        return precision_report(self)

    # -- what is at work ----------------------------------------------------------------------------------------------

    def report(self) -> dict[str, str]:
        """Return what is at work here and what is not: part -> effect, and path of a key -> why it has none (P03b).

        Every key that was given and changes nothing here is listed, as ``no effect: <reason>``.
        """
        parts, checkpoint = self.parts, self._config.checkpoint
        found = {
            "precision": type(parts.precision).__name__,
            "partition": type(parts.partition).__name__,
            "optimizer": "none" if self.basic_optimizer is None else type(self.basic_optimizer).__name__,
            "checkpoint": f"{type(parts.checkpoint).__name__}, {checkpoint.why(self._config.plugin('checkpoint'))}",
            "clipping": f"norm above {parts.clip.max_norm}" if parts.clip.max_norm > 0 else "off",
        }
        if parts.optimizer is not None:
            found["gradient factor"] = {
                "grad_scale": "applied by the fused update, in its own pass",
                "step_scaled": "applied by the optimizer, in its own pass",
                "multiply": "one multiplication before the update, skipped at 1",
            }[parts.optimizer.way]
        found.update(parts.partition.report())
        found.update(parts.activation.report())
        found.update(without_effect_here(self))
        return found

    # -- the module -------------------------------------------------------------------------------------------------

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """Return the state dict of the module, without the engine's ``module.`` prefix."""
        found: dict[str, Any] = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            frozen = {prefix + name for name, param in self.module.named_parameters() if not param.requires_grad}
            found = {name: value for name, value in found.items() if name not in frozen}
        return found

    def load_module_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load ``checkpoint["module"]`` into the module; masters begin anew from it, with all digits it has."""
        restore.load_weights(self, checkpoint["module"], strict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the window so far; the window itself goes on."""
        self.parts.partition.clear_gradients()

    def compile(self, backend: str = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compile the module in place with ``torch.compile``; nothing happens when it is compiled already."""
        if not self.is_compiled:
            self.module.compile(backend=backend, **(compile_kwargs or {}))

    @property
    def is_compiled(self) -> bool:
        return self.module._compiled_call_impl is not None

    def train(self, mode: bool = True) -> EngineFace:
        """Set training mode; returns the engine, as ``nn.Module`` does."""
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in EngineFace._LATER:
                raise NotBuiltError(f"engine.{name} is not built yet", fix=EngineFace._LATER[name]) from None
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
            return getattr(module, name)

    # -- data and checkpoints ---------------------------------------------------------------------------------------

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DeepSpeedDataLoader:
        """Return a loader of this rank's micro-batches of ``dataset``, a :class:`ds_core.data.DeepSpeedDataLoader`."""
        from ds_core.data import DeepSpeedDataLoader

        return DeepSpeedDataLoader(
            dataset,
            batch_size=batch_size or self.train_micro_batch_size_per_gpu(),
            pin_memory=pin_memory and self.device.type == "cuda",
            data_sampler=data_sampler,
            collate_fn=collate_fn,
            num_local_io_workers=num_local_io_workers,
            data_parallel_world_size=self.dp_world_size,
            data_parallel_rank=comm.get_rank(self.parts.group),
            dataloader_drop_last=self._config.dataloader_drop_last,
            shuffle=route == "train",
        )

    def save_checkpoint(
        self,
        save_dir: str | PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything training needs to go on; see :func:`ds_core.engine.state.save`. Every rank calls it.

        ``client_state`` is the caller's own: a dictionary of numbers, text, lists, tuples, dictionaries and tensors.
        """
        mine = {} if client_state is None else client_state
        state.save(self, save_dir, tag, mine, save_latest, exclude_frozen_parameters)
        return True

    def load_checkpoint(
        self,
        load_dir: str | PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str, dict[str, Any]] | tuple[None, None]:
        """Load what :meth:`save_checkpoint` saved, at any world size; see :func:`ds_core.engine.state.load`.

        Args:
            load_dir: the folder that checkpoints were saved to.
            tag: which of them; None: the one that ``latest`` names.
            load_module_strict: whether model and checkpoint must have the same weights; if not, what only one of them
                has is told in a warning. Not one weight in common is an error all the same.
            load_optimizer_states: go on with the optimizer's state, gradients of an unfinished window included. State
                of another kind of optimizer is left out, with a warning.
            load_lr_scheduler_states: go on with the learning-rate schedule.
            load_module_only: load weights and buffers, and nothing else.
            custom_load_fn: called as ``fn(src=<state dict>, dst=engine.module)`` to load the weights its own way. If
                the optimizer's groups have other names than the checkpoint's, the optimizer starts anew.

        Returns:
            (path of the checkpoint, the client state given to ``save_checkpoint``); (None, None), with a warning, where
            no tag was given and no checkpoint is in the folder, or there is no such folder: nothing is loaded then.

        Raises:
            CheckpointError: on every rank, as :func:`ds_core.engine.state.load`; also where checkpoints are in the
                folder and no ``latest`` names one.
        """
        options = restore.LoadOptions(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            module_only=load_module_only,
            custom=custom_load_fn,
        )
        try:
            return state.load(self, load_dir, tag, options)
        except NoCheckpointError as error:  # on every rank, and nothing was loaded on any
            log_dist(f"nothing is loaded: {error.what} ({error.where}); {error.fix}", level=logging.WARNING)
            return None, None

    # -- weights for others -----------------------------------------------------------------------------------------

    def export_weights(
        self,
        save_dir: str | PathLike[str],
        dtype: str | torch.dtype | None = None,
        max_shard_size: str | int | None = "5GB",
        safe_serialization: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Exported:
        """Write the weights as ``transformers`` loads them; see :func:`ds_core.engine.export.export_weights`.

        Every rank calls it; the weights need not be whole on any of them.
        """
        from ds_core.engine.export import export_weights

        return export_weights(self, save_dir, dtype, max_shard_size, safe_serialization, exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights as the model has them into one file, safetensors if its name ends so. Every rank calls it.

        Returns:
            True; False at stage 3 without ``stage3_gather_16bit_weights_on_model_save``, where nothing is written.
        """
        from ds_core.engine.export import save_16bit_model

        return save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)

    def save_fp16_model(self, save_dir: str | PathLike[str], save_filename: str = "pytorch_model.bin") -> bool:
        """:meth:`save_16bit_model` by its old name."""
        return self.save_16bit_model(save_dir, save_filename)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor] | None:
        """Return all weights on rank 0, None on the others; a ValueError where they are whole on every rank."""
        from ds_core.engine.export import consolidated

        return consolidated(self, exclude_frozen_parameters, "_consolidated_16bit_state_dict")

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """Return all weights on rank 0, None on the others; a ValueError below stage 3."""
        from ds_core.engine.export import consolidated

        return consolidated(self, exclude_frozen_parameters, "_zero3_consolidated_16bit_state_dict")

    @property
    def checkpoint_engine(self) -> TorchFiles:
        """DeepSpeed's engine of checkpoint *files*, for scripts that save one of their own.

        Its ``commit()`` waits until what :meth:`save_checkpoint` saved is durable, also where a thread still writes it.
        """
        return TorchFiles(lambda: self.parts.checkpoint.commit())

    @abstractmethod
    def destroy(self) -> None: ...
