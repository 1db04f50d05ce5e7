"""Contract of the seam ``config``; inherit :class:`SectionContract` in a plugin's tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from ds_core.config import Section

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SectionContract"]


class SectionContract:
    """What every section of a plugin's own promises."""

    @pytest.fixture
    def section_class(self) -> type[Section]:
        """Override: the class under test."""
        raise NotImplementedError

    @pytest.fixture
    def valid(self) -> Mapping[str, Any]:
        """Override if the section has required keys: a section a user might write."""
        return {}

    def test_it_is_a_section(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        assert issubclass(section_class, Section)
        assert isinstance(section_class.model_validate(valid), section_class)

    def test_it_imports_without_torch(self, section_class: type[Section]) -> None:
        """A configuration can be checked where no torch is installed."""
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; import importlib\n"
            f"importlib.import_module({section_class.__module__!r})\n"
            "assert 'torch' not in sys.modules, 'torch was imported'\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    def test_every_key_is_described(self, section_class: type[Section]) -> None:
        described = section_class.descriptions()
        undescribed = [name for name in section_class.model_fields if not described.get(name)]
        assert undescribed == [], "write a docstring under the field"

    def test_an_unknown_key_is_an_error(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        with pytest.raises(ValidationError, match="surely_no_such_key"):
            section_class.model_validate({**valid, "surely_no_such_key": 1})

    def test_values_are_frozen(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        section = section_class.model_validate(valid)
        for name in section_class.model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, None)

    def test_it_travels_as_json(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        section = section_class.model_validate(valid)
        again = section_class.model_validate(json.loads(section.model_dump_json(exclude_unset=True)))
        assert again == section

    def test_what_is_given_is_left_as_it_is(self, section_class: type[Section], valid: Mapping[str, Any]) -> None:
        before = json.dumps(valid, sort_keys=True)
        section_class.model_validate(valid)
        assert json.dumps(valid, sort_keys=True) == before
