"""What each key does: nothing, with the reason (P03b), for a configuration; and in one line for the class that has it.

What only an engine knows, such as how many ranks there are, is added by ``engine/effects.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.config.section import NoEffect, NotBuilt, Section, show
from ds_core.config.sections.choices import ChoiceSection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

    from ds_core.config.config import Config

__all__ = ["given_paths", "key_state", "section_state", "state_of", "unread_options", "without_effect"]

SWITCHES = ("enabled", "stage", "device")
"""Keys that turn their section on and off; they are at work even when they say off."""
PRECISIONS = ("fp16", "bf16", "torch_autocast")


def without_effect(config: Config) -> dict[str, str]:
    """Return the dotted path of each key that was given in vain -> the reason.

    >>> from ds_core.config import load_config
    >>> without_effect(load_config({"train_batch_size": 1, "fp16": {"enabled": False, "hysteresis": 4}}))
    {'fp16.hysteresis': 'no effect: not enabled'}
    """
    found = dict.fromkeys(config.ignored, "ignored in compatibility mode")
    found.update(_marked(config, config, ""))
    for name, section in config.sections.items():
        # A precision is also on where precision.type names it.
        why = "" if name in PRECISIONS and config.enables(name) else section.why_off()
        why = section.no_effect or why
        # A switch that is the section's own is at work; one inside a section that nobody reads is not.
        spared = SWITCHES if set(SWITCHES) & type(section).model_fields.keys() else ()
        found.update(_all_given(section, name, why, spared) if why else _marked(section, config, name))
    found.update(_marked_arguments(config))
    return {path: why if path in config.ignored else f"no effect: {why}" for path, why in found.items()}


def _all_given(section: Section, path: str, why: str, spared: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, value in section.given().items():
        if isinstance(value, Section):
            yield from _all_given(value, f"{path}.{key}", why, spared)
        elif key not in spared:
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
            yield from _all_given(value, prefix + key, why, SWITCHES) if why else _marked(value, config, prefix + key)


def _marked_arguments(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the arguments of optimizer and schedule that a :class:`NoEffect` speaks for."""
    for name in ("optimizer", "scheduler"):
        section = getattr(config, name)
        if section is not None and section.params:
            from ds_core.config.sections.arguments import arguments_of  # as many classes as all others together

            model = arguments_of(name, section.type)
            for key in section.params if model is not None else ():
                field = model.fields_by_key().get(key)  # type: ignore[union-attr] # there are no keys without it
                for marker in model.model_fields[field].metadata if field else ():  # type: ignore[union-attr]
                    if isinstance(marker, NoEffect) and marker.holds(config):
                        yield f"{name}.params.{key}", marker.why


def unread_options(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the sub-sections with options of plugins that are not in force, those of a section as one, and the reason.

    >>> from ds_core.config import load_config
    >>> given = {"engine": "plain", "sharded": {"keep_last": 2}}
    >>> dict(unread_options(load_config({"train_batch_size": 1, "checkpoint": given})))
    {'checkpoint.sharded': 'not read: "plain" is in force, and its options are those in "checkpoint.plain"'}
    """
    for name, section in config.sections.items():
        given = (
            [key for key, options in section.options.items() if options] if isinstance(section, ChoiceSection) else []
        )
        in_force = config.plugin(name) if given else ""
        unread = ", ".join(f"{name}.{key}" for key in given if key != in_force)
        if unread:
            yield unread, f'not read: {show(in_force)} is in force, and its options are those in "{name}.{in_force}"'


def given_paths(config: Config) -> list[str]:
    """Return the dotted paths of all keys that the user gave, in DeepSpeed's words; arguments and options as one.

    >>> from ds_core.config import load_config
    >>> given_paths(load_config({"train_batch_size": 1, "optimizer": {"type": "Adam", "params": {"lr": 1}}}))[-2:]
    ['optimizer.type', 'optimizer.params']
    """
    plain = [key for key, value in config.given().items() if not isinstance(value, Section)]
    inner = [path for name, section in config.sections.items() for path, _ in _all_given(section, name, "", ())]
    return plain + inner


NEEDS = {
    **{name: PACKAGE_OF_PLUGIN["precision", name] for name in PRECISIONS},
    **dict.fromkeys(("zero_optimization", "aio"), PACKAGE_OF_PLUGIN["partition", "1"]),
}
"""Top-level keys of the sections that another package carries out once they are on."""


def section_state(section: type[Section], name: str) -> str:
    """Return what the top-level section ``name``, of class ``section``, does: the word for its kind, then the reason.

    >>> from ds_core.config import Fp16Section
    >>> section_state(Fp16Section, "fp16")
    'needs ds-fp16'
    """
    if section.comes_with:
        return f"not built, refused while it is on; comes with a later release of {section.comes_with}"
    if section.no_effect:
        return f"no effect: {section.no_effect}"
    return f"needs {NEEDS[name]}" if name in NEEDS else "effective"


def key_state(info: FieldInfo, state: str) -> str:
    """Return what the key of ``info`` does in a section whose own state is ``state``."""
    from ds_core.config.sections.moved import Moved

    for marker in info.metadata:
        if isinstance(marker, Moved):
            return "deprecated"
        if isinstance(marker, NotBuilt):
            return f"not built: only {' or '.join(f'`{show(value)}`' for value in marker.accepted)}"
        if isinstance(marker, NoEffect):
            if marker.when is None:
                return f"no effect: {marker.why}"
            return f"{state.partition(',')[0]}; no effect where {marker.why}"
    return state.partition(",")[0]


def state_of(section: type[Section], field: str) -> str:
    """Return what ``field`` of ``section``, which may be inside another one, does: its kind, then the reason.

    The kinds are ``effective``; ``needs PACKAGE``, without which it is refused while its section is on; ``not built``,
    refused as soon as it asks for something; ``no effect``; and ``deprecated``.

    >>> from ds_core.config import Bf16Section, Config
    >>> state_of(Config, "gradient_clipping"), state_of(Config, "dump_state"), state_of(Bf16Section, "enabled")
    ('effective', 'not built: only `false`', 'needs ds-fp16')
    """
    from ds_core.config import catalog

    tops = {name: model for name, model in catalog.all_sections().items() if section in _inside(model)}
    # What zero_optimization holds stands in inference too: the section that is carried out speaks for both.
    name = min(tops, key=lambda name: (tops[name] is not section, tops[name].comes_with), default="")
    return key_state(section.model_fields[field], section_state(tops.get(name, section), name))


def _inside(section: type[Section]) -> set[type[Section]]:
    """Return ``section`` and all sections in it."""
    from ds_core.config.paths import sections_of

    return {section}.union(*(_inside(model) for model in sections_of(section).values()))
