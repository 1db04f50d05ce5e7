"""Which keys were given and change nothing, and why (P03b). What is known from the configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.config.section import NoEffect, Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.config import Config

__all__ = ["without_effect"]

SWITCHES = ("enabled", "stage")
"""Keys that turn their section on and off; they are at work even when they say off."""


def without_effect(config: Config) -> dict[str, str]:
    """Return the dotted path of each key that was given in vain -> the reason.

    >>> from ds_core.config import load_config
    >>> without_effect(load_config({"train_batch_size": 1, "fp16": {"enabled": False, "hysteresis": 4}}))
    {'fp16.hysteresis': 'no effect: not enabled'}
    """
    found = dict.fromkeys(config.ignored, "ignored in compatibility mode, as DeepSpeed does")
    found.update(_marked(config, config, ""))
    for name, section in config.sections.items():
        # A precision is also on where precision.type names it.
        why = "" if name in PRECISIONS and config.enables(name) else section.why_off()
        why = section.no_effect or why
        found.update(_all_given(section, name, why) if why else _marked(section, config, name))
    return {path: why if path in config.ignored else f"no effect: {why}" for path, why in found.items()}


PRECISIONS = ("fp16", "bf16", "torch_autocast")


def _all_given(section: Section, path: str, why: str) -> Iterator[tuple[str, str]]:
    for key, value in section.given().items():
        if isinstance(value, Section):
            yield from _all_given(value, f"{path}.{key}", why)
        elif key not in SWITCHES:
            yield f"{path}.{key}", why


def _marked(section: Section, config: Config, path: str) -> Iterator[tuple[str, str]]:
    """Yield the given keys of ``section`` that a :class:`NoEffect` speaks for."""
    prefix = f"{path}." if path else ""
    for key, value in section.given().items():
        field = type(section).fields_by_key().get(key)
        markers = type(section).model_fields[field].metadata if field else section.unread(key)
        whys = [marker.why for marker in markers if isinstance(marker, NoEffect) and marker.holds(config)]
        if whys:
            yield prefix + key, whys[0]
        elif isinstance(value, Section) and path:  # those at the top level have their turn
            why = value.why_off()
            yield from _all_given(value, prefix + key, why) if why else _marked(value, config, prefix + key)
