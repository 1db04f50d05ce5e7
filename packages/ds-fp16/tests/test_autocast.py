"""Helpers of ``torch.autocast``: resolving class names, marking parameters, asking an engine."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_core.errors import ConfigError
from ds_core.interfaces.precision import PrecisionPlan
from ds_fp16 import autocast

if TYPE_CHECKING:
    from pathlib import Path

KEY = "torch_autocast.lower_precision_safe_modules"


class _Parts:
    """Just what the helpers ask of an engine."""

    def __init__(self, plan: PrecisionPlan) -> None:
        self.precision = self
        self.plan = plan


class _Engine:
    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module = module
        self.device = torch.device("cpu")
        self.parts = _Parts(PrecisionPlan(autocast=dtype))


def _engine(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    return _Engine(module, dtype)


class TestNames:
    def test_the_defaults_lead_to_the_classes(self) -> None:
        names = autocast.get_default_autocast_lower_precision_modules()
        assert names == [
            "torch.nn.modules.linear.Linear",
            "torch.nn.modules.conv.Conv1d",
            "torch.nn.modules.conv.Conv2d",
            "torch.nn.modules.conv.Conv3d",
        ]
        assert autocast.safe_module_classes(names) == autocast.LOWER_PRECISION_SAFE_MODULES

    def test_a_caller_cannot_change_the_defaults(self) -> None:
        autocast.get_default_autocast_lower_precision_modules().clear()
        assert len(autocast.get_default_autocast_lower_precision_modules()) == 4

    def test_no_names(self) -> None:
        assert autocast.safe_module_classes([]) == ()

    def test_short_and_long_names_of_a_class_are_one(self) -> None:
        names = ("torch.nn.Conv1d", "torch.nn.Linear", "torch.nn.modules.linear.Linear")
        assert autocast.safe_module_classes(names) == (nn.Conv1d, nn.Linear)

    def test_a_submodule_is_imported_and_a_nested_class_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "ds_fp16_names_package"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "layers.py").write_text(
            "from torch import nn\nclass Outer:\n    class Inner(nn.Linear):\n        pass\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        (found,) = autocast.safe_module_classes(["ds_fp16_names_package.layers.Outer.Inner"])
        assert found.__qualname__ == "Outer.Inner"
        assert issubclass(found, nn.Linear)

    @pytest.mark.parametrize(
        ("name", "why", "fix"),
        [
            ("torch.nn.Linaer", "torch.nn has no 'Linaer'", "did you mean torch.nn.Linear?"),
            ("torch.nn.linears.Linear", "torch.nn has no 'linears'", "did you mean torch.nn."),
            ("torhc.nn.Linear", "no module is called 'torhc'", "check the spelling"),
            ("Linear", "not a dotted name", "torch.nn.Linear"),
            ("torch.nn.", "not a dotted name", "torch.nn.Linear"),
            ("", "not a dotted name", "torch.nn.Linear"),
            (3, "not a dotted name", "torch.nn.Linear"),
            ("torch.nn", "it is a module, not a class", "torch.nn.Linear"),
            ("torch.nn.functional.linear", "not a class", "torch.nn.Linear"),
            ("torch.nn.Parameter", "not a subclass of torch.nn.Module", "name the class of a layer"),
        ],
    )
    def test_a_bad_name_says_why(self, name: Any, why: str, fix: str) -> None:
        with pytest.raises(ConfigError) as caught:
            autocast.safe_module_classes(["torch.nn.Linear", name])
        assert repr(name) in caught.value.what
        assert why in caught.value.what
        assert caught.value.where == KEY
        assert fix in str(caught.value.fix)

    def test_several_bad_names_are_told_together(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)2 names cannot be used.*'torch\.nn\.Linaer'.*'nothing\.Here'"):
            autocast.safe_module_classes(["torch.nn.Linaer", "torch.nn.Linear", "nothing.Here"])

    def test_one_string_is_not_a_list_of_letters(self) -> None:
        with pytest.raises(ConfigError, match=r"is one name(?s:.*)write \['torch\.nn\.Linear'\]"):
            autocast.safe_module_classes("torch.nn.Linear")

    def test_a_module_that_cannot_be_imported_says_what_it_missed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "ds_fp16_names_broken.py").write_text("import ds_fp16_not_there\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConfigError, match="cannot be imported: No module named 'ds_fp16_not_there'"):
            autocast.safe_module_classes(["ds_fp16_names_broken.Layer"])


class _MyLinear(nn.Linear):
    pass


class TestMarks:
    def test_only_direct_parameters_of_exactly_these_classes(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2))
                self.linear = nn.Linear(2, 2)
                self.norm = nn.LayerNorm(2)
                self.derived = _MyLinear(2, 2)

        model = Holder()
        assert autocast.init_autocast_params(_engine(model), torch.bfloat16) is None
        marked = [name for name, param in model.named_parameters() if autocast.has_comm_dtype(param)]
        assert marked == ["linear.weight", "linear.bias"]
        assert model.linear.weight.comm_dtype == torch.bfloat16
        assert autocast.get_comm_dtype(model.linear.weight) == torch.bfloat16
        assert autocast.get_comm_dtype(model.norm.weight) == torch.float32
        assert autocast.get_all_comm_dtypes(model.parameters()) == {torch.bfloat16, torch.float32}

    def test_nothing_else_changes(self) -> None:
        model = nn.Linear(2, 2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        engine = _engine(model)
        autocast.init_autocast_params(engine, torch.float16)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.weight.dtype == torch.float32
        assert not autocast.is_autocast_initialized(engine)

    def test_a_second_call_replaces_the_marks(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        autocast.init_autocast_params(_engine(model), torch.bfloat16)
        autocast.init_autocast_params(_engine(model), torch.float16, ["torch.nn.LayerNorm"])
        assert not autocast.has_comm_dtype(model[0].weight)
        assert autocast.get_comm_dtype(model[1].weight) == torch.float16

    def test_no_names_mark_nothing(self) -> None:
        model = nn.Linear(2, 2)
        autocast.init_autocast_params(_engine(model), torch.bfloat16, [])
        assert autocast.get_all_comm_dtypes(model.parameters()) == {torch.float32}

    @pytest.mark.parametrize("dtype", [None, torch.int8, "bfloat16"])
    def test_a_dtype_is_needed(self, dtype: Any) -> None:
        with pytest.raises(ConfigError, match="expected is a floating-point"):
            autocast.init_autocast_params(_engine(nn.Linear(2, 2)), dtype)

    def test_a_bad_name_marks_nothing(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(ConfigError, match="Linaer"):
            autocast.init_autocast_params(_engine(model), torch.float16, ["torch.nn.Linear", "torch.nn.Linaer"])
        assert not autocast.has_comm_dtype(model.weight)

    def test_dtypes_are_sorted_by_name(self) -> None:
        dtypes = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
        assert autocast.sort_dtypes(dtypes) == [torch.bfloat16, torch.float16, torch.float32, torch.float64]
        assert autocast.sort_dtypes([]) == []
        assert autocast.get_all_comm_dtypes([]) == set()


class TestEngines:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_an_enabled_engine_computes_in_its_dtype(self, dtype: torch.dtype) -> None:
        model = nn.Linear(2, 2)
        engine = _engine(model, dtype)
        assert autocast.is_autocast_initialized(engine)
        assert autocast.get_autocast_dtype(engine) == dtype
        with autocast.autocast_if_enabled(engine):
            assert model(torch.ones(1, 2)).dtype == dtype
        assert model(torch.ones(1, 2)).dtype == torch.float32

    def test_a_second_engine_inherits_nothing(self) -> None:
        enabled, plain = _engine(nn.Linear(2, 2), torch.bfloat16), _engine(nn.Linear(2, 2))
        with autocast.autocast_if_enabled(enabled):
            pass
        assert autocast.is_autocast_initialized(enabled)
        assert not autocast.is_autocast_initialized(plain)
        assert autocast.get_autocast_dtype(plain) is None
        with autocast.autocast_if_enabled(plain):
            assert plain.module(torch.ones(1, 2)).dtype == torch.float32

    @pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.float16, torch.float16)])
    def test_the_engines_word_holds_inside_another(self, dtype: torch.dtype | None, expected: torch.dtype) -> None:
        model = nn.Linear(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.ones(1, 2)).dtype == torch.bfloat16
            with autocast.autocast_if_enabled(_engine(model, dtype)):
                assert model(torch.ones(1, 2)).dtype == expected
            assert model(torch.ones(1, 2)).dtype == torch.bfloat16

    def test_a_real_engine(self) -> None:
        import ds_core

        model = nn.Linear(2, 1)
        engine = ds_core.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1})[0]
        with contextlib.closing(_Destroyed(engine)):
            assert not autocast.is_autocast_initialized(engine)
            autocast.init_autocast_params(engine, torch.bfloat16)
            assert autocast.get_all_comm_dtypes(engine.module.parameters()) == {torch.bfloat16}
            with autocast.autocast_if_enabled(engine):
                assert engine.module(torch.ones(1, 2)).dtype == torch.float32


class _Destroyed:
    """Takes an engine and its process group down."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def close(self) -> None:
        from ds_core import comm

        self.engine.destroy()
        self.engine = None
        gc.collect()
        comm.destroy_process_group()
