"""What to do about a disk that refuses to be written to. Loads no torch."""

from __future__ import annotations

import errno

__all__ = ["fix_of"]

_FIXES = {
    errno.EACCES: "make the folder writable for this user, or choose another one",
    errno.EPERM: "make the folder writable for this user, or choose another one",
    errno.EROFS: "choose another folder: this filesystem is mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter tag, or a folder with a shorter path",
    errno.ENOTDIR: "choose another folder: a part of this path is a file",
    errno.EISDIR: "choose another folder, or remove the one that is where a file belongs",
    errno.EIO: "choose another folder: this disk does not work",
}


def fix_of(error: OSError) -> str:
    """Return what to do about ``error``, which came up while something was written.

    >>> fix_of(OSError(errno.EROFS, "Read-only file system"))
    'choose another folder: this filesystem is mounted read-only'
    """
    return _FIXES.get(error.errno or 0, "free space or choose another folder")
