"""The certificate of an HTTPS server: checked before anything starts; and the probe's view of a server of our own.

It makes contexts of `ssl` and knows no HTTP.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from baton.node.errors import SettingsError


def check_certificate(certificate: Path, key: Path | None) -> None:
    """Raise SettingsError where a server cannot use the files; without `key`, `certificate` holds it too."""
    for path in (certificate, key or certificate):
        try:
            path.open("rb").close()
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    given = f"--tls-cert {certificate}" + (f" --tls-key {key}" if key else "")
    try:
        server_context(certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"{given}: the key is not that of the certificate") from None
        wanted = "a chain of certificates and a key without a password, in PEM format, are needed"
        raise SettingsError(f"{given}: {wanted} ({error.reason or error})") from None
    except ValueError as error:
        raise SettingsError(f"{given}: {error}") from None


def server_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """For a server with files that were checked: TLS 1.2 and 1.3, with Python's ciphers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password="")  # it would be asked for on the terminal otherwise
    return context


def own_server_context() -> ssl.SSLContext:
    """For a client that has started the server itself, on this machine: the certificate names the server's public host,
    so it is not checked."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
