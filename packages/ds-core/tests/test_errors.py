import copy
import pickle

import pytest

from ds_core import errors
from ds_core.errors import DsError, MissingPackageError, NotBuiltError, nearest

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DsError)]


def test_all_of_them_are_public():
    assert {cls.__name__ for cls in CLASSES} == {name for name in errors.__all__ if name[0].isupper()}


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_says_what_where_and_how_to_fix_it(cls):
    assert str(cls("stage is 7", where="zero_optimization.stage", fix="use 0 to 3")) == (
        "stage is 7\n  where: zero_optimization.stage\n  fix: use 0 to 3"
    )
    assert str(cls("stage is 7")) == "stage is 7"
    assert str(cls("stage is 7", fix="use 0")) == "stage is 7\n  fix: use 0"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("travel", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_travel_between_ranks(cls, travel):
    error = cls("what", where="where", fix="fix")
    again = travel(error)
    assert type(again) is cls
    assert (again.what, again.where, again.fix, str(again)) == ("what", "where", "fix", str(error))


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        ("ConfigError", ValueError),
        ("PluginError", LookupError),
        ("MissingPackageError", AttributeError),
        ("NotBuiltError", NotImplementedError),
        ("EngineError", RuntimeError),
        ("DataError", ValueError),
        ("CheckpointError", RuntimeError),
        ("CommError", RuntimeError),
        ("LaunchError", RuntimeError),
    ],
)
def test_they_can_be_caught_as_what_python_calls_them(cls, builtin):
    with pytest.raises(builtin, match="what"):
        raise getattr(errors, cls)("what")


@pytest.mark.parametrize("cls", [MissingPackageError, NotBuiltError])
def test_a_name_that_is_not_there_yet_is_no_attribute(cls):
    class Package:
        def __getattr__(self, name):
            raise cls(name)

    assert not hasattr(Package(), "zero")


def test_the_nearest_word():
    allowed = ["optimizer", "zero_optimization", "FP16"]
    assert nearest("zero_optimisation", allowed) == "zero_optimization"
    assert nearest("OPTIMISER", allowed) == "optimizer"
    assert nearest("fp_16", allowed) == "FP16"
    assert nearest("banana", allowed) is None
    assert nearest("zero", allowed) == "zero_optimization"
    assert nearest("fp61", allowed) == "FP16"
    assert nearest("_comment", ["comet"]) is None, "many short words are alike"
    assert nearest("msamp", ["amp"]) is None
    assert nearest("gpu", ["cpu", "none"]) is None
    assert nearest("grad_dtype", ["grad_accum_dtype", "param_dtype"]) == "grad_accum_dtype"
    assert nearest("", ["_x"]) is None
    assert nearest("anything", []) is None
