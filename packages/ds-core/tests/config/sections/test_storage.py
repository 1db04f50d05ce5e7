"""Sections aio, nebula and datastates_ckpt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.problems import validate
from ds_core.config.sections.storage import AioSection, DatastatesSection, NebulaSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section

AIO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
    "use_gds": False,
}
NEBULA = {
    "enabled": False,
    "persistent_storage_path": None,
    "persistent_time_interval": 100,
    "num_of_version_in_retention": 2,
    "enable_nebula_load": True,
    "nebula_load_path": None,
}


class TestAioSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return AioSection


class TestNebulaSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return NebulaSection


class TestDatastatesSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return DatastatesSection

    def test_an_unknown_key_is_an_error(self) -> None:  # type: ignore[override]
        """No key is unknown: all are the package's."""
        given = {"host_cache_size": 16, "nested": {"a": [1, None]}}
        assert DatastatesSection.model_validate(given).model_dump() == given


def test_defaults() -> None:
    assert AioSection().model_dump(by_alias=True) == AIO
    assert NebulaSection().model_dump(by_alias=True) == NEBULA


@pytest.mark.parametrize(
    "given", [{}, AIO, {"thread_count": 1}, {"block_size": 2**20, "single_submit": False}, {"queue_depth": "auto"}]
)
def test_aio_at_its_defaults_is_off(given: dict[str, Any]) -> None:
    assert not AioSection.model_validate(given).is_on()


@pytest.mark.parametrize("given", [{"queue_depth": 16}, {"single_submit": True}, {"overlap_events": False}])
def test_aio_away_from_them_is_on(given: dict[str, Any]) -> None:
    assert AioSection.model_validate(given).is_on()


@pytest.mark.parametrize("name", ["intra_op_parallelism", "thread_count", "num_threads"])
def test_spellings_of_threads(name: str) -> None:
    assert AioSection.model_validate({name: 4}).intra_op_parallelism == 4


@pytest.mark.parametrize("name", ["block_size", "block_bytes"])
def test_block_size_is_in_bytes(name: str) -> None:
    section = AioSection.model_validate({name: 4096})
    assert (section.block_bytes, getattr(section, "block_size")) == (4096, 4096)  # noqa: B009 - DeepSpeed's name


@pytest.mark.parametrize("name", ["block_size", "queue_depth", "intra_op_parallelism"])
def test_aio_counts_from_one(name: str) -> None:
    _, (problem,) = validate(AioSection, {name: 0})
    assert problem.text == "got 0, must be at least 1"


@pytest.mark.parametrize("name", ["persistent_time_interval", "num_of_version_in_retention"])
def test_nebula_counts_from_one(name: str) -> None:
    _, (problem,) = validate(NebulaSection, {name: 0})
    assert problem.text == "got 0, must be at least 1"


def test_nebula_is_a_switch() -> None:
    assert not NebulaSection(persistent_storage_path="there").is_on()
    assert NebulaSection(enabled=True).is_on()


@pytest.mark.parametrize("given", [{}, {"enabled": False}, {"host_cache_size": 16}])
def test_datastates_is_on_where_it_is_there(given: dict[str, Any]) -> None:
    assert DatastatesSection.model_validate(given).is_on()
