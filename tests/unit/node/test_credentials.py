"""node.credentials: keys of roles, and files of secrets that only one user can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from zmq.utils import z85

from baton.node.credentials import ROLES, Keys, link_credentials
from baton.node.errors import SettingsError
from baton.node.secret_file import read_secret, write_secret


def test_each_role_has_keys_of_its_own() -> None:
    """Guards roles against one another, and clusters of two secrets."""
    one, again, other = Keys(b"a" * 32), Keys(b"a" * 32), Keys(b"b" * 32)
    publics = {keys.public(role) for keys in (one, other) for role in ROLES}
    assert len(publics) == 2 * len(ROLES)
    assert [again.pair(role) for role in ROLES] == [one.pair(role) for role in ROLES]
    assert [one.role_of(z85.decode(one.public(role))) for role in ROLES] == list(ROLES)
    assert one.role_of(z85.decode(other.public("proxy"))) is None and one.role_of(b"") is None


def test_the_derivation_stays_as_it_is() -> None:
    """Guards a cluster that is updated host by host: nodes of two versions would not let each other in."""
    assert Keys(bytes(range(32))).public("proxy") == b"M^ISt0(y({L@m9DaAo=jcQg3dawoehqQ*UcohLjD"


def test_private_keys_are_not_shown() -> None:
    """Guards logs and tracebacks, which show values by their repr."""
    pair = Keys(b"a" * 32).pair("proxy")
    assert pair.private.decode() not in repr(pair) and pair.public.decode() in repr(pair)


def test_a_new_secret_is_private_and_differs(tmp_path: Path) -> None:
    """Guards the file that `baton secret` and the launchers make, and one that exists already."""
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        write_secret(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secrets = read_secret(first), read_secret(second)
    assert [len(secret) for secret in secrets] == [32, 32] and secrets[0] != secrets[1]
    with pytest.raises(SettingsError, match="first: cannot be made: File exists"):
        write_secret(first)
    assert read_secret(first) == secrets[0]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o610])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Guards against a secret that is none: each reader of the file is let in everywhere."""
    path = tmp_path / "secret"
    write_secret(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=f"mode {mode:04o}.*chmod 600"):
        read_secret(path)


@pytest.mark.parametrize("text", ["", "00" * 31, "00" * 33, "0g" + "00" * 31, "secret", "\xe9" * 64])
def test_a_file_that_holds_no_secret_is_refused(tmp_path: Path, text: str) -> None:
    """Guards against short and guessed secrets; the error says how to make one."""
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(SettingsError, match="not 64 hex digits; make one with `baton secret FILE`"):
        read_secret(path)


def test_other_forms_of_hex_are_read(tmp_path: Path) -> None:
    """Guards secrets that other tools made, with capitals, or without an end of line."""
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("AB" * 32)
    assert read_secret(path) == b"\xab" * 32


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Guards start-up: an error of one line, and no wait for the end of a pipe."""
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_secret(tmp_path / "missing")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SettingsError, match="not a file"):
        read_secret(tmp_path / "pipe")


def test_links_in_the_clear_must_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a node that trusts everybody because an option was forgotten."""
    with pytest.raises(SettingsError, match=r"no --secret-file.*baton secret.*--insecure-network"):
        link_credentials("proxy", None, insecure_network=False)
    assert link_credentials("proxy", None, insecure_network=True).keys is None
    assert "links_insecure" in caplog.text and "reads prompts" in caplog.text
    caplog.clear()
    write_secret(tmp_path / "secret")
    for insecure_network in (False, True):  # which then opens the HTTP API only
        assert link_credentials("proxy", tmp_path / "secret", insecure_network).keys is not None
    assert not caplog.text
