"""The lookup, on packages that are nothing but a .dist-info folder and a module on ``sys.path``."""

import importlib
import subprocess
import sys

import pytest
from packaging.version import Version

import ds_core
from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.errors import MissingPackageError, PluginError

MAJOR, MINOR, *_ = Version(ds_core.__version__).release
THIS = f"ds-core~={MAJOR}.{MINOR}.0"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with entry points, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package, entries, *, requires=(THIS,), version="1.2.3", module=None, code="class Plugin:\n    pass\n"):
        info = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
        text = "".join(f"[ds_core.{seam}]\n{name} = {target}\n" for (seam, name), target in entries.items())
        (info / "entry_points.txt").write_text(text)
        if module is not None:
            (tmp_path / f"{module}.py").write_text(code)
        importlib.invalidate_caches()
        registry.refresh()

    yield install
    registry.refresh()
    for name in [name for name in sys.modules if name.startswith("reg_test_")]:
        del sys.modules[name]


def test_the_seams_have_interface_and_contract():
    for seam in registry.SEAMS:
        assert importlib.util.find_spec(f"ds_core.interfaces.{seam}") is not None
        assert importlib.util.find_spec(f"ds_core.testing.{seam}") is not None


def test_every_built_in_can_be_imported():
    checked = 0
    for seam in registry.SEAMS:
        for plugin in registry.installed(seam):
            if plugin.package == "ds-core":
                assert plugin.load() is not None
                assert plugin.version == ds_core.__version__
                checked += 1
    assert checked >= 15


def test_a_strangers_plugin_is_found_like_a_built_in(install):
    install("stranger", {("precision", "odd"): "reg_test_odd:Plugin"}, module="reg_test_odd")
    plugin = registry.find("precision", "odd")
    assert (plugin.package, plugin.version, plugin.needs) == ("stranger", "1.2.3", f"~={MAJOR}.{MINOR}.0")
    assert plugin.problem() is None
    assert "odd" in registry.names("precision")
    assert "reg_test_odd" not in sys.modules, "finding imports nothing"
    assert registry.load("precision", "odd") is sys.modules["reg_test_odd"].Plugin


def test_names_are_matched_exactly_and_sorted(install):
    install("stranger", {("precision", "Odd"): "a:b", ("precision", "aaa"): "a:b"})
    assert registry.names("precision")[:2] == ("Odd", "aaa")
    with pytest.raises(PluginError, match="did you mean 'Odd'"):
        registry.find("precision", "odd")


def test_two_packages_with_one_name_are_an_error(install):
    install("first-one", {("precision", "twice"): "a:b"})
    install("second-one", {("precision", "twice"): "a:b"}, version="2.0")
    with pytest.raises(PluginError) as caught:
        registry.load("precision", "twice")
    assert str(caught.value) == (
        "several packages register a 'ds_core.precision' plugin called 'twice': first-one 1.2.3, second-one 2.0\n"
        "  fix: uninstall all but one of first-one, second-one"
    )
    assert registry.names("precision").count("twice") == 1


def test_a_built_in_cannot_be_shadowed(install):
    install("intruder", {("precision", "fp32"): "a:b"})
    with pytest.raises(PluginError, match=r"called 'fp32': ds-core .*, intruder 1\.2\.3"):
        registry.find("precision", "fp32")


def test_one_package_found_twice_is_one(install, tmp_path, monkeypatch):
    install("stranger", {("precision", "odd"): "reg_test_odd:Plugin"}, module="reg_test_odd")
    second = tmp_path / "again"
    second.mkdir()
    info = next(tmp_path.glob("stranger*.dist-info"))
    (second / info.name).mkdir()
    for file in info.iterdir():
        (second / info.name / file.name).write_text(file.read_text())
    monkeypatch.syspath_prepend(str(second))
    registry.refresh()
    assert registry.find("precision", "odd").package == "stranger"


def test_a_known_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(registry, "installed", lambda seam: ())
    for (seam, name), package in PACKAGE_OF_PLUGIN.items():
        with pytest.raises(MissingPackageError, match=f"needs {package}: pip install {package}"):
            registry.find(seam, name)
    with pytest.raises(MissingPackageError) as caught:
        registry.find("precision", "fp16", needed_by="fp16.enabled")
    assert str(caught.value) == (
        '"fp16.enabled" needs ds-fp16: pip install ds-fp16\n'
        "  where: installed 'ds_core.precision' plugins: none\n"
        "  fix: pip install ds-fp16"
    )


def test_a_known_package_that_is_too_old_is_not_to_be_installed_again(install):
    install("ds-pipe", {("engine", "plain_pipe"): "a:b"}, version="0.1.3")
    with pytest.raises(MissingPackageError) as caught:
        registry.find("engine", "pipeline", needed_by="pipeline.enabled")
    assert str(caught.value).splitlines()[0] == (
        '"pipeline.enabled" comes with a later release of ds-pipe, installed is 0.1.3'
    )
    assert (
        caught.value.fix == "pip install --upgrade ds-pipe, once there is one; until then choose one that is installed"
    )


def test_an_unknown_name_gets_the_nearest(install):
    install("stranger", {("checkpoint", "sharded_files"): "a:b"})
    with pytest.raises(PluginError) as caught:
        registry.find("checkpoint", "shraded_files", needed_by="checkpoint.engine")
    error = caught.value
    assert not isinstance(error, MissingPackageError)
    assert error.what == "no 'ds_core.checkpoint' plugin is called 'shraded_files' (asked for by 'checkpoint.engine')"
    assert "plain" in error.where
    assert error.fix == "did you mean 'sharded_files'?"
    with pytest.raises(PluginError, match="did you mean 'StepLR'"):
        registry.find("scheduler", "StepLr", others=("StepLR",))
    with pytest.raises(PluginError, match="check the spelling, or install the package that provides it"):
        registry.find("checkpoint", "zzzzzzzzzz")


def test_what_is_no_seam_is_refused():
    with pytest.raises(PluginError, match=r"'precisions' is not a seam[\s\S]*one of precision, partition"):
        registry.names("precisions")


@pytest.mark.parametrize("requires", [f"ds-core~={MAJOR}.{MINOR + 1}.0", f"DS_Core <{MAJOR}.{MINOR}", "ds-core==99"])
def test_a_plugin_for_another_core_is_refused_with_the_fix(install, requires):
    install("early-bird", {("precision", "next"): "reg_test_next:Plugin"}, requires=[requires], module="reg_test_next")
    plugin = registry.find("precision", "next")
    with pytest.raises(PluginError) as caught:
        plugin.load()
    error = caught.value
    assert error.what.startswith("early-bird 1.2.3 is made for ds-core")
    assert error.what.endswith(f"installed is ds-core {ds_core.__version__}")
    assert error.where == "entry point 'next' of group 'ds_core.precision' in early-bird 1.2.3"
    assert error.fix == "pip install --upgrade early-bird ds-core"
    assert "reg_test_next" not in sys.modules, "it is refused before its code runs"


@pytest.mark.parametrize(
    "requires",
    [
        [THIS],
        [f"ds-core (>={MAJOR}.{MINOR})"],
        ["ds-core"],
        [],
        ["numpy", THIS, "torch>=2"],
        ["ds-core~=99.0; python_version < '3'", THIS],
    ],
)
def test_a_plugin_for_this_core_is_taken(install, requires):
    install("fits", {("precision", "fits"): "reg_test_fits:Plugin"}, requires=requires, module="reg_test_fits")
    assert registry.load("precision", "fits").__name__ == "Plugin"


def test_a_newer_patch_of_a_plugin_is_taken(install):
    install("fits", {("precision", "fits"): "reg_test_fits:Plugin"}, version="0.1.9", module="reg_test_fits")
    assert registry.load("precision", "fits").__name__ == "Plugin"


@pytest.mark.parametrize(
    ("target", "code", "reason"),
    [
        ("reg_test_broken:Plugin", "import reg_test_no_such_module", "reg_test_no_such_module"),
        ("reg_test_broken:Other", "class Plugin: pass", "Other"),
        ("reg_test_absent:Plugin", "", "reg_test_absent"),
    ],
)
def test_a_plugin_that_cannot_be_imported_says_why(install, target, code, reason):
    install("broken", {("precision", "broken"): target}, module="reg_test_broken", code=code)
    with pytest.raises(PluginError) as caught:
        registry.load("precision", "broken")
    error = caught.value
    assert error.what.startswith("the plugin cannot be imported: ")
    assert reason in error.what
    assert error.where.endswith(f"in broken 1.2.3: {target}")
    assert "pip install --force-reinstall broken" in error.fix
    assert isinstance(error.__cause__, ImportError | AttributeError)


def test_a_broken_plugin_does_not_disturb_the_others(install):
    install("broken", {("precision", "broken"): "reg_test_broken:Plugin"}, module="reg_test_broken", code="1 / 0")
    assert registry.load("precision", "fp32").__name__ == "Fp32"
    with pytest.raises(ZeroDivisionError):
        registry.load("precision", "broken")


def test_what_was_found_is_kept_until_refreshed(install, tmp_path):
    install("stranger", {("precision", "odd"): "a:b"})
    assert "odd" in registry.names("precision")
    info = next(tmp_path.glob("*.dist-info"))
    info.rename(tmp_path / "gone")
    assert "odd" in registry.names("precision")
    registry.refresh()
    importlib.invalidate_caches()
    assert "odd" not in registry.names("precision")


def test_looking_up_loads_no_torch():
    code = (
        "import sys; from ds_core import registry; [registry.names(seam) for seam in registry.SEAMS]; "
        "assert not {'torch', 'pydantic', 'ds_core.config'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
