"""Guards the tenants file: what it may say, and that an error names its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from baton.node import tenant_rules
from baton.node.errors import SettingsError
from baton.node.tenant_rules import TenantRules, read_tenants

KEYS = [hashlib.sha256(key.encode()).hexdigest() for key in ("a", "b", "c")]


def read(folder: Path, content: str) -> dict[str, TenantRules]:
    file = folder / "tenants.toml"
    file.write_text(content, encoding="utf-8")
    return read_tenants(file)


def test_a_whole_file(tmp_path: Path) -> None:
    """Guards the names of the fields, and the defaults: no limit, no right that is not given."""
    found = read(
        tmp_path,
        f"""
        [acme]
        keys_sha256 = ["{KEYS[0]}", "{KEYS[1].upper()}"]
        models = ["demo", "gpt-4o"]
        max_concurrent = 8
        requests_per_minute = 600
        tokens_per_minute = 200_000
        priority_floor = -5
        admin = true
        metrics = true
        cache = "shared"
        [ops-2]
        keys_sha256 = ["{KEYS[2]}"]
        """,
    )
    acme, ops = found["acme"], found["ops-2"]
    assert acme.keys_sha256 == tuple(KEYS[:2])
    assert (acme.max_concurrent, acme.requests_per_minute, acme.tokens_per_minute) == (8, 600, 200_000)
    assert (acme.priority_floor, acme.admin, acme.metrics, acme.cache) == (-5, True, True, "shared")
    assert acme.may_use("gpt-4o") and not acme.may_use("other") and ops.may_use("other")
    assert ops == TenantRules(keys_sha256=(KEYS[2],))
    assert not (ops.admin or ops.metrics) and ops.cache == "own" and ops.priority_floor == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has 0 tenants"),
        ("[a\n", r"not TOML.*line 1"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\n[a]\n', r"not TOML.*line 3"),
        ("limit = 3", r"limit: expected a table \[limit\]"),
        (f'["a b"]\nkeys_sha256 = ["{KEYS[0]}"]', r"\['a b'\]: a tenant's name is"),
        ("[a]", r"\[a\] fields: .*missing required field `keys_sha256`"),
        ("[a]\nkeys_sha256 = []", r"\[a\] keys_sha256: .*length >= 1"),
        ('[a]\nkeys_sha256 = ["my-secret"]', r"\[a\] keys_sha256\[0\]: expected the SHA-256 of a key, 64 hex digits$"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\nmax_concurrent = 0', r"\[a\] max_concurrent: Expected `int` >= 1"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\nmax_concurrent = true', r"\[a\] max_concurrent: Expected `int"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\nadmin = 1', r"\[a\] admin: Expected `bool`"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\ncache = "none"', r"\[a\] cache: Invalid enum value 'none'"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\nmax_tokens = 3', r"\[a\] fields: .*unknown field `max_tokens`"),
        (f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\nmodels = []', r"\[a\] models: .*length >= 1"),
        (
            f'[a]\nkeys_sha256 = ["{KEYS[0]}"]\n[b]\nkeys_sha256 = ["{KEYS[1]}", "{KEYS[0].upper()}"]',
            r"\[b\] keys_sha256\[1\]: \[a\] has the same key",
        ),
    ],
)
def test_an_error_names_the_line_or_the_field(tmp_path: Path, content: str, said: str) -> None:
    """Guards against a tenant that gets other limits than its file says, and a key that is logged with the error."""
    with pytest.raises(SettingsError, match=said) as raised:
        read(tmp_path, content)
    assert str(tmp_path) in str(raised.value) and "my-secret" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback at the start."""
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_tenants(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_tenants(tmp_path / "bytes.toml")
    monkeypatch.setattr(tenant_rules, "MAX_FILE_BYTES", 8)
    with pytest.raises(SettingsError, match="larger than 8 bytes"):
        read(tmp_path, f'[a]\nkeys_sha256 = ["{KEYS[0]}"]')


def test_tenants_and_keys_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the metrics, which have a label a tenant, and requests, which are compared with every key."""
    content = f'[a]\nkeys_sha256 = ["{KEYS[0]}", "{KEYS[1]}"]\n[b]\nkeys_sha256 = ["{KEYS[2]}"]'
    monkeypatch.setattr(tenant_rules, "MAX_KEYS", 2)
    with pytest.raises(SettingsError, match="has 3 keys; at most 2 are allowed"):
        read(tmp_path, content)
    monkeypatch.setattr(tenant_rules, "MAX_TENANTS", 1)
    with pytest.raises(SettingsError, match="has 2 tenants; 1 to 1 are allowed"):
        read(tmp_path, content)
