"""The engine's getters of ``zero_optimization``: DeepSpeed's ``zero_<key>()``, one for each key (spec/core.md 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.config import ZeroSection

if TYPE_CHECKING:
    from collections.abc import Callable

    from ds_core.config import Config

__all__ = ["ZeroGetters", "getter"]


class ZeroGetters:
    """What ``zero_optimization`` says, also where the stage makes no use of it: then it has no effect.

    Beside the methods below there is one for each key, such as ``zero_reduce_bucket_size()``; what the keys mean is
    written in :class:`ds_core.config.ZeroSection`.
    """

    _config: Config

    def zero_optimization_stage(self) -> int:
        """Return the stage, 0 to 3."""
        return self._config.zero_optimization.stage

    def zero_optimization(self) -> bool:
        """Return whether anything is divided among the ranks."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def zero_use_cpu_optimizer(self) -> bool:
        """Return whether optimizer state is offloaded, to CPU memory or files."""
        return self._offload_device() != "none"

    def zero_cpu_offload(self) -> bool:
        """Return whether optimizer state is offloaded to CPU memory."""
        return self._offload_device() == "cpu"

    def _offload_device(self) -> str:
        offload = self._config.zero_optimization.offload_optimizer
        return "none" if offload is None else offload.device

    def zero_allow_untested_optimizer(self) -> bool:
        return self._config.zero_allow_untested_optimizer

    def zero_force_ds_cpu_optimizer(self) -> bool:
        return self._config.zero_force_ds_cpu_optimizer


def getter(owner: type, name: str, section: str, key: str, returns: Any) -> Callable[[Any], Any]:
    """Return a method ``name`` of ``owner`` that returns ``key`` of a section of the engine's configuration."""

    def get(self: Any) -> Any:
        return getattr(self._config.section(section), key)

    get.__name__, get.__qualname__, get.__module__ = name, f"{owner.__qualname__}.{name}", owner.__module__
    get.__doc__ = f"Return ``{section}.{key}`` of the configuration."
    get.__annotations__ = {"return": returns}
    return get


def _add_one_for_each_key() -> None:
    for field, info in ZeroSection.model_fields.items():
        # DeepSpeed's own name of the field: the key that users write, without the stage.
        key = (info.serialization_alias or field).removeprefix("stage3_")
        name = key if key.startswith("zero") else f"zero_{key}"
        setattr(ZeroGetters, name, getter(ZeroGetters, name, "zero_optimization", key, info.annotation))


_add_one_for_each_key()
