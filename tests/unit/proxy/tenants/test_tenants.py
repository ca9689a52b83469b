"""Guards the tenants by their keys, over reloads of their file."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from baton.node.errors import SettingsError
from baton.node.tenant_rules import TenantRules
from baton.proxy.tenants.reload import load_tenants, reload_tenants
from baton.proxy.tenants.tenants import Tenants


def rules(*keys: str, **more: object) -> TenantRules:
    return TenantRules(keys_sha256=tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys), **more)


def write(file: Path, *tenants: str) -> None:
    tables = (f'[{name}]\nkeys_sha256 = ["{hashlib.sha256(name.encode()).hexdigest()}"]\n' for name in tenants)
    file.write_text("".join(tables))


def test_each_key_is_of_its_tenant() -> None:
    """Guards against a key that opens another tenant, or none that opens the first."""
    tenants = Tenants({"a": rules("k1", "k2"), "b": rules("k3")})
    found = [tenants.of_key(key.encode()) for key in ("k1", "k2", "k3", "k", "", "k11")]
    assert [tenant and tenant.name for tenant in found] == ["a", "a", "b", None, None, None]


def test_without_a_file_there_is_one_tenant() -> None:
    """Guards servers without tenants: keys as before, and caches as before."""
    keyed, opened = Tenants.one(["k", "schlüssel"]), Tenants.one([])
    assert keyed.of_key("schlüssel".encode()) is keyed.of_key(b"k") is not None
    assert keyed.of_key(b"") is None and opened.of_key(b"") is opened.of_key(b"anything") is not None
    only = keyed.of_key(b"k")
    assert only is not None and only.rules.admin and only.cache_name == ""


def test_caches_are_apart_and_the_same_after_a_restart() -> None:
    """Guards against a tenant that reads from another's cache, and one that loses its own when a key is replaced."""

    def names(*keys: str) -> list[str]:
        made = Tenants({"a": rules(*keys), "b": rules("k2"), "c": rules("k3", cache="shared")})
        return [made.of_key(key.encode()).cache_name for key in (keys[-1], "k2", "k3")]  # type: ignore[union-attr]

    first = names("k1")
    assert names("k1", "new") == first and len(set(first)) == 3 and first[2] == ""


def test_a_reload_replaces_rules_and_keeps_tenants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a tenant whose running requests are forgotten, and a removed key that still works."""
    file = tmp_path / "tenants.toml"
    write(file, "a", "b")
    tenants = load_tenants(file, ("demo",), int)
    a = tenants.of_key(b"a")
    write(file, "a", "c")
    caplog.set_level(logging.INFO)
    reload_tenants(tenants, file, ("demo",))
    assert tenants.of_key(b"a") is a
    assert tenants.of_key(b"b") is None and tenants.of_key(b"c") is not None
    assert "tenants_reloaded tenants=2" in caplog.text


def test_a_bad_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a typing error that locks every client out; at the start it is an error."""
    file = tmp_path / "tenants.toml"
    write(file, "a")
    tenants = load_tenants(file, ("demo",), int)
    file.write_text("[b]\nadmin = true\n")
    reload_tenants(tenants, file, ("demo",))
    assert tenants.of_key(b"a") is not None
    assert "tenants_kept" in caplog.text and "keys_sha256" in caplog.text
    with pytest.raises(SettingsError, match="keys_sha256"):
        load_tenants(file, ("demo",), int)


def test_models_that_are_not_served_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a misspelt model that shows only when a client gets a 404."""
    file = tmp_path / "tenants.toml"
    write(file, "a")
    file.write_text(file.read_text() + 'models = ["demo", "dmeo"]\n')
    load_tenants(file, ("demo",), int)
    assert "tenant_model_unknown tenant=a model=dmeo" in caplog.text
