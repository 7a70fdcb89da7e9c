"""TLS of both protocols: one certificate for HTTP and gRPC, read by each front end when it starts.

Invariants
 1. A certificate that cannot be used is refused before anything is started, with the flag that named it.
 2. Without one nothing here runs, and `ssl` is not imported.

Called by the settings and by the front end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from overcommit.runtime.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl


def check_files(certificate: str, key: str) -> tuple[str, str]:
    """Return both paths, absolute, or empty ones.  Raises ConfigurationError."""
    if not certificate:
        if key:
            raise ConfigurationError(
                f"--ssl-keyfile is '{key}', and there is no --ssl-certfile: give both, or neither"
            )
        return "", ""
    certificate = os.path.abspath(os.path.expanduser(certificate))
    key = os.path.abspath(os.path.expanduser(key)) if key else certificate
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigurationError(f"{flag} is '{path}': {error.strerror}") from error
    try:
        context_of(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigurationError(
            f"--ssl-certfile '{certificate}' with --ssl-keyfile '{key}' cannot be used: {error}; "
            f"both are PEM, the key fits the certificate and has no password"
        ) from error
    return certificate, key


def context_of(certificate: str, key: str, *protocols: str) -> ssl.SSLContext:
    """Make what connections are taken with; `protocols` are offered (ALPN), as HTTP/2 needs.

    Raises OSError.
    """
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # No password is ever asked for: a server has no terminal.
    context.load_cert_chain(certificate, key, password=b"")
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context
