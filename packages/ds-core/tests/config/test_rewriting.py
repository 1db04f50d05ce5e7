from __future__ import annotations

import json
import pathlib
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.config import ConfigError, examine
from ds_core.config import rewriting as module
from ds_core.config.migrate import migrate
from ds_core.config.parsing import parse
from ds_core.config.positions import Scan, scan
from ds_core.config.reading import read, read_text
from ds_core.config.rewriting import Rewritten, replace_file

if TYPE_CHECKING:
    from pathlib import Path


def rewritten(text: str, *, drop_comments: bool = False) -> Rewritten:
    return module.rewritten(read_text(text, "ds.json"), drop_comments=drop_comments)


CASES = {
    "a key": ('{"bfloat16":{"enabled" :true}}', '{"bf16":{"enabled" :true}}'),
    "inside a renamed one": ('{"bfloat16": {"check_overflow": 1}}', '{"bf16": {"check_grad_overflow": 1}}'),
    "a value": (
        '{"zero_optimization": {"cpu_offload": true, "stage": 2}}',
        '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "stage": 2}}',
    ),
    "a key that goes": (
        '{"zero_optimization": {"stage": 2, "cpu_offload": false, "reduce_bucket_size": 5e8}}',
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}',
    ),
    "the last key that goes": (
        '{\n    "zero_optimization": {\n        "stage": 2,\n        "cpu_offload": false\n    }\n}\n',
        '{\n    "zero_optimization": {\n        "stage": 2\n    }\n}\n',
    ),
    "the only key that goes": ('{"zero_optimization": { "cpu_offload": false }}', '{"zero_optimization": {  }}'),
    "several that go": (
        '{"bf16": {}, "zero_optimization": {"cpu_offload": false, "cpu_offload_param": false, "stage": 1}}',
        '{"bf16": {}, "zero_optimization": {"stage": 1}}',
    ),
    "several at the end that go": (
        '{"zero_optimization": {"stage": 1, "cpu_offload": false, "cpu_offload_param": false}}',
        '{"zero_optimization": {"stage": 1}}',
    ),
    "beside a null": (
        '{"zero_optimization": {"cpu_offload": true, "offload_optimizer": null}}',
        '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
    ),
    "legacy stage 1": (
        '{"allgather_size": 2e8, "zero_optimization": true, "train_batch_size": 1E1}',
        '{"zero_optimization": {"stage": 1, "allgather_bucket_size": 2e8}, "train_batch_size": 1E1}',
    ),
    "into a section": ('{"inference": {"mp_size": 2}}', '{"inference": {"tensor_parallel": {"tp_size": 2}}}'),
    "into a section that is there": (
        '{"inference": {\n  "tp": {\n    "enabled": true\n  },\n  "mp_size": 2\n}}',
        '{"inference": {\n  "tp": {\n    "enabled": true,\n    "tp_size": 2\n  }\n}}',
    ),
    "line ends and byte order mark": (
        '\ufeff{\r\n\t"bfloat16": {},\r\n\t"train_batch_size": 1\r\n}\r\n',
        '\ufeff{\r\n\t"bf16": {},\r\n\t"train_batch_size": 1\r\n}\r\n',
    ),
    "letters that are not ASCII": (
        '{"wandb": {"project": "Grün\\u00fc"}, "bfloat16": {}}',
        '{"wandb": {"project": "Grün\\u00fc"}, "bf16": {}}',
    ),
    "HJSON": (
        "{\n  # a\n  bfloat16: {enabled: true} // b\n  zero_optimization: { /* c */\n    cpu_offload: true # d\n }\n}",
        "{\n  # a\n  bf16: {enabled: true} // b\n  zero_optimization: { /* c */\n    offload_optimizer: CPU # d\n }\n}",
    ),
    "HJSON without braces": ("bfloat16:\n{\n}\n# end", "bf16:\n{\n}\n# end"),
    "HJSON and a text without quotes": (
        "{wandb: {project: a, b\n}\n inference: {mp_size: 2\n tp: {enabled: true\n }}}",
        '{wandb: {project: a, b\n}\n inference: {tp: {enabled: true, "tp_size": 2\n }}}',
    ),
    "HJSON and a text of many lines": (
        "{wandb: {project: '''of\n many'''}, bfloat16: {}}",
        "{wandb: {project: '''of\n many'''}, bf16: {}}",
    ),
    "HJSON in single quotes": (
        "{'wandb': {'team': 'a\\'b'}, 'bfloat16': {}}",
        "{'wandb': {'team': 'a\\'b'}, \"bf16\": {}}",
    ),
}


@pytest.mark.parametrize(("old", "new"), CASES.values(), ids=CASES)
def test_only_what_must_changes(old: str, new: str) -> None:
    new = new.replace(" CPU", ' {"device": "cpu"}')
    done = rewritten(old)
    assert done.text == new
    assert done.renamed
    again = rewritten(new)
    assert (again.text, again.renamed) == (new, ())


def test_nothing_to_do() -> None:
    text = '{ "bf16":{"enabled":true} }  '
    assert rewritten(text).text is text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"bf16": {}, "bf16": {}}', "is given twice"),
        ('{"bfloat16": {"enabled": true}, "bf16": {"enabled": false}}', "its replacement"),
        ('{"zero_optimization": {"cpu_offload": 3}}', "must be true or false"),
        ('{"bfloat16": ', "neither JSON nor HJSON"),
    ],
)
def test_what_nobody_knows_the_meaning_of_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        rewritten(text)
    assert "ds.json" in str(caught.value)


LOSES = [
    "{zero_optimization: {cpu_offload: false # was slow\n stage: 2}}",
    "{zero_optimization: true, # was slow\n allgather_size: 5\n}",
]


@pytest.mark.parametrize("text", LOSES)
def test_comments_are_not_lost_unasked(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be kept") as caught:
        rewritten(text)
    assert "--drop-comments" in str(caught.value.fix)
    plain = rewritten(text, drop_comments=True).text
    assert json.loads(plain) == migrate(parse(text, "ds.json").value)[0]


OLD_ZERO = st.fixed_dictionaries(
    {},
    optional={
        "stage": st.sampled_from([0, 1, 2, 3]),
        "cpu_offload": st.sampled_from([True, False, "auto"]),
        "cpu_offload_param": st.sampled_from([True, False, "auto"]),
        "cpu_offload_use_pin_memory": st.booleans(),
        "offload_optimizer": st.none(),
        "stage3_gather_fp16_weights_on_model_save": st.booleans(),
        "reduce_bucket_size": st.sampled_from([5e8, 1000]),
    },
)
OLD_BF16 = st.fixed_dictionaries({}, optional={"enabled": st.booleans(), "check_overflow": st.booleans()})
OLD = st.fixed_dictionaries(
    {"train_batch_size": st.just(8)},
    optional={
        "zero_optimization": st.booleans() | OLD_ZERO,
        "allgather_size": st.sampled_from([2e8, 7]),
        "bfloat16": OLD_BF16,
        "gradient_clipping": st.sampled_from([1e0, 0.5]),
        "inference": st.fixed_dictionaries(
            {},
            optional={
                "mp_size": st.sampled_from([1, 2]),
                "replace_method": st.just("auto"),
                "tensor_parallel": st.sampled_from([{}, {"enabled": True}, {"tp_grain_size": 8, "enabled": False}]),
                "moe_type": st.sampled_from(["standard", "residual"]),
                "ep_size": st.sampled_from([1, 4]),
                "moe": st.sampled_from([{}, {"enabled": True}]),
            },
        ),
    },
)


@st.composite
def old_texts(draw: st.DrawFn) -> str:
    config = draw(OLD)
    shuffled = {key: config[key] for key in draw(st.permutations(list(config)))}
    text = json.dumps(shuffled, indent=draw(st.sampled_from([None, 0, 2])))
    return text.replace("500000000.0", "5e8")


def meaning(text: str) -> tuple[Any, ...]:
    examined = examine(json.loads(text), dp_world_size=2)
    # "(it is read as ...)" is all that changes.
    found = sorted((problem.text.partition(" (it is read as")[0], problem.fix or "") for problem in examined.problems)
    return dict(examined.config), dict(examined.config.sections), found


@given(old_texts())
def test_the_result_means_the_same_and_stays(text: str) -> None:
    try:
        done = rewritten(text)
    except ConfigError:
        assert migrate(json.loads(text))[2], "refused only where a key contradicts its replacement"
        return
    assert meaning(done.text) == meaning(text)
    assert rewritten(done.text).renamed == ()
    assert rewritten(done.text).text == done.text


def scanned(text: str) -> Scan:
    found = scan(text, is_plain_json=True, notes=True)
    assert found.is_whole
    return found


@given(old_texts())
def test_json_is_changed_in_place(text: str) -> None:
    """Never written anew: what is not deprecated keeps its spelling."""
    parsed = json.loads(text)
    new, _, problems = migrate(parsed)
    if problems:
        return
    done = rewritten(text).text
    assert json.loads(done) == new
    assert scanned(done).numbers.items() <= scanned(text).numbers.items()
    assert ("\n" in done) == ("\n" in text)


# ---- files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xef\xbb\xbf{\r\n}\r\n")
    return path


def test_a_file_that_is_changed_while_it_is_rewritten(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf{\r\n"bfloat16": {}}\r\n')
    document = read(file)
    file.write_text("{}")
    assert module.rewritten(document).text == '\ufeff{\r\n"bf16": {}}\r\n'
    assert document.file == file


def test_replaces_and_keeps_permissions(file: Path) -> None:
    file.chmod(0o640)
    assert replace_file(file, "{}\r\n") is None
    assert file.read_bytes() == b"{}\r\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(file.parent.iterdir()) == [file]


def test_new_file_has_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    replace_file(tmp_path / "new.json", "{}", backup=True)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    assert not (tmp_path / "new.json.bak").exists()


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file)
    replace_file(link, "{}")
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "{}"


def test_backup(file: Path) -> None:
    before = file.read_bytes()
    saved = replace_file(file, "{}", backup=True)
    assert saved == file.with_name("ds.json.bak")
    assert saved is not None
    assert saved.read_bytes() == before
    with pytest.raises(ConfigError, match="an earlier run"):
        replace_file(file, "{a: 1}", backup=True)
    assert file.read_text(encoding="utf-8") == "{}"


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        replace_file(tmp_path, "{}")


@pytest.mark.parametrize("step", ["fsync", "open"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_original(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(ConfigError if isinstance(failure, OSError) else KeyboardInterrupt):
        replace_file(file, "{}")
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_rename_that_fails_leaves_the_original(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(ConfigError, match="Permission denied"):
        replace_file(file, "{}")
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_killed_half_way(file: Path) -> None:
    """A process that dies while it writes has not touched the file."""
    before = file.read_bytes()
    code = (
        "import os, pathlib, sys; from ds_core.config.rewriting import replace_file;"
        "os.fsync = lambda _: os._exit(9); replace_file(pathlib.Path(sys.argv[1]), '{}')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)], timeout=60, check=False).returncode == 9
    assert file.read_bytes() == before
