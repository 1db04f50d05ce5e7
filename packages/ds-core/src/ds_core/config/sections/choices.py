"""Sections that choose a plugin by name and hold its options: ``checkpoint``, ``precision`` and ``partition``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from ds_core.config.section import NoEffect, NotBuilt, PositiveInt, Section, key, show

if TYPE_CHECKING:
    from ds_core.config.config import Config

__all__ = [
    "CheckpointSection",
    "ChoiceSection",
    "ParallelWriteSection",
    "PartitionSection",
    "PrecisionSection",
    "WriterSection",
]


class ChoiceSection(Section):
    """A section with a key that names a plugin; further keys are sub-sections, each for the plugin of that name."""

    model_config = ConfigDict(extra="allow")
    if not TYPE_CHECKING:  # mypy would take it for an argument of the constructor
        __pydantic_extra__: dict[str, dict[str, Any]]

    seam: ClassVar[str]
    """The seam whose plugins may be named."""

    @property
    def chosen(self) -> str | None:
        """The name of the plugin asked for, or None where the core chooses."""
        raise NotImplementedError

    def unread(self, key: str) -> tuple[NoEffect, ...]:
        why = f"{show(key)} was not chosen; its keys are unchecked"
        return (NoEffect(why, when=lambda config: config.plugin(self.seam) != key),)

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """The sub-sections as given, by plugin; not checked yet."""
        return self.__pydantic_extra__ or {}


PLAIN, SHARDED, ASYNC = "plain", "sharded", "async"
"""Engines of the seam ``checkpoint``: ds-core's, and two of ds-ckpt's."""
DECOUPLED = "checkpoint.writer.decoupled"


class ParallelWriteSection(Section):
    """Which ranks write what every data-parallel rank holds."""

    pipeline_stage: Annotated[bool, NoEffect("ranks always share out what several of them hold")] = False
    """Spread the layers of a pipeline stage over its data-parallel ranks, as is always done."""


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


OF_THE_ENGINE = NoEffect(
    "how files are written is up to the engine, whose options are in checkpoint.sharded or checkpoint.async"
)
ALL_WRITE = NoEffect("every rank writes its part, in as many threads as writers in the section of the engine says")
NOTHING_WRITTEN = NotBuilt(
    "FAST",
    "PYTHON",
    why="which writes empty files: nothing would be saved",
    fix='remove it, or write "FAST"',
)


def _has_an_engine(config: Config) -> bool:
    return config.checkpoint.engine is not None


class WriterSection(Section):
    """DeepSpeed's fast writers of checkpoint files; there, an object turns them on, whatever is in it.

    Of these, ``decoupled`` is what changes something here: it selects the engine ``async``.
    """

    source = "spec/core.md 2.14, spec/checkpoint.md 12"

    type: Annotated[Literal["FAST", "PYTHON", "MOCK"], BeforeValidator(_upper), OF_THE_ENGINE, NOTHING_WRITTEN] = "FAST"
    """Past the system's cache (``FAST``), through Python's files (``PYTHON``), or nowhere (``MOCK``); any case."""
    io_buffer_bytes: Annotated[PositiveInt, OF_THE_ENGINE] = key("io_buffer_size", default=64 * 1024 * 1024)
    """Bytes of a buffer between the device and the file."""
    io_buffer_double: Annotated[bool, OF_THE_ENGINE] = True
    """Use two buffers in turn, so that filling one overlaps with writing the other."""
    show_statistics: Annotated[bool, OF_THE_ENGINE] = False
    """Print numbers about each file."""
    data_parallel: Annotated[Literal["REPLICA", "SOCKET", "MACHINE"] | None, BeforeValidator(_upper), ALL_WRITE] = None
    """Which data-parallel ranks write: all (``REPLICA``), one per CPU socket, or one per machine; any case. Null: the
    first."""
    decoupled: Annotated[bool, NoEffect("checkpoint.engine is given", when=_has_an_engine)] = False
    """Write while training goes on: where ``checkpoint.engine`` is not given, it is then ``async``."""
    io_multiplier: Annotated[PositiveInt, ALL_WRITE] = 1
    """Factor of the number of parallel writers that a file is divided for."""

    def is_on(self) -> bool:
        """Return whether any key was given."""
        return bool(self.model_fields_set)


def _unless_empty(writer: WriterSection | None) -> WriterSection | None:
    return writer if writer is not None and writer.is_on() else None


def _titled(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


class CheckpointSection(ChoiceSection):
    """How ``save_checkpoint`` and ``load_checkpoint`` work; options of an engine are in the sub-section of its name."""

    source = "spec/core.md 2.14"
    seam = "checkpoint"

    engine: Annotated[str, Field(min_length=1)] | None = None
    """Which engine stores checkpoints: an entry of ``ds_core.checkpoint``. Null: ``sharded`` where ds-ckpt is
    installed, else ``plain``."""
    tag_validation: Annotated[Literal["Warn", "Ignore", "Fail"], BeforeValidator(_titled)] = "Warn"
    """What to do when ranks save under different tags; any case."""
    load_universal: bool = False
    """``load_checkpoint`` without a tag takes the one that ``latest_universal`` names, written by DeepSpeed's
    ``ds_to_universal``; where there is no such file, the one in ``latest``, with a warning if DeepSpeed wrote
    it. Needs ds-ckpt."""
    use_node_local_storage: Annotated[
        bool,
        NotBuilt(
            False,
            why="which would leave every node with a part of the checkpoint",
            fix="remove it, and save to a folder that all nodes share, or to a URL of an object store (ds-ckpt)",
        ),
    ] = False
    """Every node keeps its own files."""
    parallel_write: ParallelWriteSection = Field(default_factory=ParallelWriteSection)
    """Which ranks write what every data-parallel rank holds."""
    checkpoint_serialization: Annotated[bool, NoEffect("nothing is pickled, so there is no format to choose")] = True
    """The zip format of ``torch.save``; false: its older one."""
    writer: Annotated[WriterSection | None, AfterValidator(_unless_empty)] = None
    """DeepSpeed's fast writers."""

    @property
    def chosen(self) -> str | None:
        return ASYNC if self.chosen_by == DECOUPLED else self.engine

    @property
    def chosen_by(self) -> str | None:
        """The key that asks for an engine; None where the core chooses."""
        if self.engine is not None:
            return "checkpoint.engine"
        return DECOUPLED if self.writer is not None and self.writer.decoupled else None

    def why(self, name: str) -> str:
        """Return why the engine called ``name``, the one in force, is it."""
        if self.chosen_by is not None:
            return f"as {self.chosen_by} says"
        return "the default where ds-ckpt is installed" if name == SHARDED else "the default without ds-ckpt"


class PrecisionSection(ChoiceSection):
    """A precision that is not DeepSpeed's; ``fp16``, ``bf16`` and ``torch_autocast`` have sections of their own."""

    seam = "precision"

    type: str | None = None
    """Which precision: an entry of ``ds_core.precision``. Null: by the sections that are enabled."""

    @property
    def chosen(self) -> str | None:
        return self.type


class PartitionSection(ChoiceSection):
    """A partition that is not DeepSpeed's; ZeRO's is ``zero_optimization.stage``."""

    seam = "partition"

    type: str | None = None
    """Which partition: an entry of ``ds_core.partition``. Null: by the stage."""

    @property
    def chosen(self) -> str | None:
        return self.type
