"""Section amp: one switch, and arguments of a function that is not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ds_core.config.sections.amp import AmpSection
from ds_core.testing.config import SectionContract

if TYPE_CHECKING:
    from ds_core.config import Section


class TestAmpSection(SectionContract):
    @pytest.fixture
    def section_class(self) -> type[Section]:
        return AmpSection

    def test_an_unknown_key_is_an_error(self) -> None:  # type: ignore[override]
        """No key is unknown: all but the switch are Apex's."""
        given = {"enabled": True, "opt_level": "O1", "loss_scale": "dynamic"}
        assert AmpSection.model_validate(given).model_dump() == given


@pytest.mark.parametrize("given", [{}, {"enabled": False}, {"enabled": False, "opt_level": "O1"}])
def test_off(given: dict[str, Any]) -> None:
    assert not AmpSection.model_validate(given).is_on()


@pytest.mark.parametrize("given", [{"enabled": True}, {"opt_level": "O1"}])
def test_on(given: dict[str, Any]) -> None:
    assert AmpSection.model_validate(given).is_on()
