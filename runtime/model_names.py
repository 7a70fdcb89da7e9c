"""What a model and a version may be called.

Pure.  Called wherever a name comes in: by the repository scan, for aliases, for what clients load.
"""

from __future__ import annotations

import os
import re
from typing import Final

from overcommit.runtime.config import NAME_CHARS_MAX

VERSION: Final = r"[1-9][0-9]{0,17}"  # a pattern
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def name_error(name: str) -> str | None:
    """Say what is wrong with a model's name; None when nothing is."""
    if len(name) > NAME_CHARS_MAX:
        return f"the name is longer than {NAME_CHARS_MAX} characters; rename the folder"
    if not _NAME.fullmatch(name) or ".." in name:
        return (
            f"'{printable(name)}' is no model name: names consist of A-Z, a-z, 0-9, '.', '_' and "
            f"'-', start with a letter or digit and hold no '..'; rename the folder"
        )
    return None


def is_text(path: str) -> bool:
    """Whether a path is UTF-8, as all that processes tell each other and write down."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name that JSON and a terminal can show, whatever bytes the file system holds."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text[:NAME_CHARS_MAX]
