"""The fix of a disk's error is about that error."""

from __future__ import annotations

import errno
import os

import pytest

from ds_core.checkpoint.disk_errors import fix_of
from ds_core.checkpoint.huggingface import writing
from ds_core.checkpoint.saving import together
from ds_core.errors import CheckpointError


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EFBIG, "free space"),
        (errno.EACCES, "writable for this user"),
        (errno.EPERM, "writable for this user"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENAMETOOLONG, "shorter tag"),
    ],
)
def test_the_fix_is_about_the_error(number, words, tmp_path):
    error = OSError(number, os.strerror(number), "file")
    assert words in fix_of(error)

    def fails():
        raise error

    with pytest.raises(CheckpointError) as caught:
        together(fails, tmp_path, None)
    assert words in caught.value.fix
    assert "what was complete before can still be loaded" in caught.value.fix
    with pytest.raises(CheckpointError) as caught, writing(tmp_path):
        fails()
    assert words in caught.value.fix


def test_an_error_without_a_number_has_a_fix_too():
    assert fix_of(OSError("gone")) == "free space or choose another folder"
