"""Where a repository elsewhere is, how it is read, and what its failures mean to whoever runs the server.

Invariants
 1. `hf://OWNER/NAME[@REVISION]` is a repository of one model, called NAME, and is held to the commit that its
    revision meant when the place was opened: files of two commits never mix.
 2. A failure says the address and what to do.  What only a person can change (credentials, a wrong name) is a
    ConfigurationError, at once; what may pass by itself is Unavailable, and is tried again.

Called by `fetching`.  Each file system has errors of its own, which are told apart by what they carry: a
status, or a class's name; importing all of their packages would take seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from overcommit.runtime.errors import ConfigurationError, OvercommitError, Unavailable, said_by

_HUB: Final = re.compile(r"hf://([^/@]+)/([^/@]+?)/?(?:@(.+))?")
_HUB_FORM: Final = "hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
_REFUSED: Final = frozenset({"401", "403"})
_NO_CREDENTIALS: Final = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "GatedRepoError"}
)
_CREDENTIALS: Final = {
    "hf": "for a private or gated model set HF_TOKEN to a token that may read it",
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to who may list and read it",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of an account that may list and read it",
}


@dataclass(slots=True, frozen=True)
class RemotePlace:
    """A repository's file system, and where it is in it."""

    file_system: Any
    base: str
    prefix: str = ""  # comes before each file's name here
    listing: Mapping[str, object] = field(default_factory=dict)  # for `find`
    reading: Mapping[str, object] = field(default_factory=dict)  # for `cat_file`


def open_place(url: str) -> RemotePlace:
    """Find what a URL names.  Raises ConfigurationError and Unavailable."""
    hub = _HUB.fullmatch(url)
    if url.startswith("hf://") and hub is None:
        raise ConfigurationError(f"{url}: it is {_HUB_FORM}")
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(
            f"{url} needs the package fsspec: pip install 'overcommit[remote]'"
        ) from error
    try:
        if hub is not None:
            return _open_hub(url, hub[1], hub[2], hub[3])
        file_system, base = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigurationError(f"{url}: {error}; pip install 'overcommit[remote]'") from error
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{url}: {said_by(error)}") from error
    # Of web servers, fsspec leaves out the folders that cannot be listed just now.
    is_web = url.startswith(("http://", "https://"))
    return RemotePlace(file_system, base, listing={"on_error": "raise"} if is_web else {})


def _open_hub(url: str, owner: str, name: str, revision: str | None) -> RemotePlace:
    """Ask the hub which commit a revision is.  Raises ConfigurationError and Unavailable."""
    import huggingface_hub

    file_system = huggingface_hub.HfFileSystem()
    repository = f"{owner}/{name}"
    api = huggingface_hub.HfApi(endpoint=file_system.endpoint)
    try:
        commit = api.model_info(repository, revision=revision).sha
    except Exception as error:  # of httpx, of the hub, of the system
        raise explain(url, "cannot be looked at", error) from error
    if not commit:
        raise Unavailable(f"{url}: {file_system.endpoint} does not say which commit that is")
    # Its buffered files read 5 MiB further than they are asked to.
    return RemotePlace(
        file_system, f"{repository}@{commit}", f"{name}/", reading={"cache_type": "none"}
    )


def explain(url: str, what: str, error: BaseException) -> OvercommitError:
    """Make of any file system's error one that says whose it is and what to do.

    `what` follows the URL: "cannot be listed".
    """
    scheme = url.partition("://")[0]
    chain = list(_chain(error))
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    said = said_by(error) if isinstance(error, Exception) else repr(error)
    text = f"{url} {what}: {' '.join(said.split())}"
    credentials = _CREDENTIALS.get(scheme, "its server wants credentials that it was not given")
    if "OfflineModeIsEnabled" in names:
        return ConfigurationError(f"{text}; unset HF_HUB_OFFLINE")
    if "RevisionNotFoundError" in names:
        return ConfigurationError(f"{text}; name a branch, a tag or a commit of it after the @")
    if "RepositoryNotFoundError" in names and "GatedRepoError" not in names:
        # The hub tells nobody without credentials whether a private model exists.
        return ConfigurationError(f"{text}; is the name right? If so, {credentials}")
    if names & _NO_CREDENTIALS or any(_is_refusal(one) for one in chain):
        return ConfigurationError(f"{text}; {credentials}")
    if any(isinstance(one, FileNotFoundError) for one in chain) or "EntryNotFoundError" in names:
        return ConfigurationError(f"{text}; it is not there: is the address right?")
    return Unavailable(f"{text}; try again")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, PermissionError):
        return True
    answer = getattr(error, "response", None)
    code = getattr(answer, "status_code", None) or getattr(error, "status", None)
    if code is None:
        code = getattr(error, "code", None)
    # gcsfs says 403 in its text alone.
    is_told = isinstance(error, OSError) and str(error).startswith("Forbidden")
    return is_told or str(code) in _REFUSED
