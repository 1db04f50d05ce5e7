"""Which engine stores checkpoints, and what is refused before a device or process group is touched."""

from __future__ import annotations

from typing import Any

import pytest

from ds_core import registry
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.config import load_config
from ds_core.engine.build import choose
from ds_core.errors import ConfigError, MissingPackageError

INSTALLED = registry.installed


class Sharded(PlainCheckpoint):
    reads_universal = True


def with_engines(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let only ``names`` be installed; what is not ds-core's is a class of this module."""
    plain = next(plugin for plugin in INSTALLED("checkpoint") if plugin.name == "plain")

    def installed(seam: str) -> tuple[Any, ...]:
        if seam != "checkpoint":
            return tuple(plugin for plugin in INSTALLED(seam) if plugin.package != "ds-ckpt")
        return tuple(plain if name == "plain" else _Plugin(name) for name in names)

    monkeypatch.setattr(registry, "installed", installed)


class _Plugin:
    package, version = "ds-ckpt", "1"

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> type[Sharded]:
        return Sharded


def chosen(**checkpoint: Any) -> str:
    return choose(load_config({"train_batch_size": 1, "checkpoint": checkpoint})).checkpoint.__name__


def test_the_default_is_sharded_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_engines(monkeypatch, "plain")
    assert chosen() == "PlainCheckpoint"
    with_engines(monkeypatch, "plain", "sharded")
    assert chosen() == "Sharded"
    assert chosen(engine="plain") == "PlainCheckpoint"


@pytest.mark.parametrize("checkpoint", [{}, {"engine": "plain"}])
def test_universal_folders_need_ds_ckpt(checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with_engines(monkeypatch, "plain")
    with pytest.raises(MissingPackageError) as caught:
        chosen(load_universal=True, **checkpoint)
    assert caught.value.what == '"checkpoint.load_universal" needs ds-ckpt: pip install ds-ckpt'


def test_universal_folders_need_an_engine_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with_engines(monkeypatch, "plain", "sharded")
    assert chosen(load_universal=True) == "Sharded"
    with pytest.raises(ConfigError) as caught:
        chosen(load_universal=True, engine="plain")
    assert "the engine 'plain' does not read DeepSpeed's universal folders" in caught.value.what
    assert caught.value.where == "checkpoint.engine, in config dict"
    assert caught.value.fix == 'set checkpoint.engine to "sharded", or leave it out'


def test_a_decoupled_writer_needs_ds_ckpt(monkeypatch: pytest.MonkeyPatch) -> None:
    with_engines(monkeypatch, "plain")
    with pytest.raises(MissingPackageError) as caught:
        chosen(writer={"decoupled": True})
    assert caught.value.what == '"checkpoint.writer.decoupled" needs ds-ckpt: pip install ds-ckpt'
    assert chosen(writer={"decoupled": True}, engine="plain") == "PlainCheckpoint"
    with_engines(monkeypatch, "plain", "async", "sharded")
    assert chosen(writer={"decoupled": True}) == "Sharded"
