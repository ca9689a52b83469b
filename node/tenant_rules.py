"""What a tenants file says: keys, models and limits of each tenant, checked as a whole.

It knows the file and no request: what a tenant does at the moment is the proxy's.

    [acme]
    keys_sha256 = ["5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"]
    tokens_per_minute = 200000
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from baton.node.errors import SettingsError

MAX_FILE_BYTES = 4 << 20
MAX_TENANTS = 1024
"""Each is a label in the metrics."""
MAX_KEYS = 4096
"""Every request is compared with all of them."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 in 64 lower-case hex digits")]
Limit = Annotated[int, Meta(ge=1, le=1 << 40)]


class TenantRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tenant's table of the file."""

    keys_sha256: Annotated[tuple[Digest, ...], Meta(min_length=1)]
    models: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """Names that it may use; None: all."""
    max_concurrent: Limit | None = None
    """Requests that are being answered at once."""
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Of prompts and answers together."""
    priority_floor: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0
    """The lowest `priority`, which is served first, that its requests may have."""
    admin: bool = False
    """May use every route."""
    metrics: bool = False
    """May read the metrics, which tell of all tenants."""
    cache: Literal["own", "shared"] = "own"
    """Whether its prefixes are its own, or common to all tenants that share."""

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


def read_tenants(path: Path) -> dict[str, TenantRules]:
    """The tenants of a file, by name. Raises SettingsError that names the line, or the tenant and the field."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SettingsError(f"--tenants {path}: larger than {MAX_FILE_BYTES} bytes")
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--tenants {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--tenants {path}: not UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError of another kind
        raise SettingsError(f"--tenants {path}: not TOML: {error}") from None
    if not 1 <= len(tables) <= MAX_TENANTS:
        raise SettingsError(f"--tenants {path}: has {len(tables)} tenants; 1 to {MAX_TENANTS} are allowed")
    try:
        found = {name: _rules(name, table) for name, table in tables.items()}
        _check_keys(found)
    except ValueError as error:
        raise SettingsError(f"--tenants {path}: {error}") from None
    return found


def _rules(name: str, table: Any) -> TenantRules:
    if not _NAME.fullmatch(name):
        raise ValueError(f"[{name[:64]!r}]: a tenant's name is 1 to 64 letters, digits, dashes or underscores")
    if not isinstance(table, dict):
        raise ValueError(f"{name}: expected a table [{name}], not a value outside of one")
    if isinstance(keys := table.get("keys_sha256"), list):
        table = {**table, "keys_sha256": [each.lower() if isinstance(each, str) else each for each in keys]}
    try:
        return msgspec.convert(table, TenantRules)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".") or "fields"
        if field.startswith("keys_sha256["):  # the value may be a key that was pasted as it is
            text = "expected the SHA-256 of a key, 64 hex digits"
        raise ValueError(f"[{name}] {field}: {text}") from None


def _check_keys(tenants: Mapping[str, TenantRules]) -> None:
    owners: dict[str, str] = {}
    for name, rules in tenants.items():
        for place, digest in enumerate(rules.keys_sha256):
            if digest in owners:
                raise ValueError(f"[{name}] keys_sha256[{place}]: [{owners[digest]}] has the same key")
            owners[digest] = name
    if len(owners) > MAX_KEYS:
        raise ValueError(f"has {len(owners)} keys; at most {MAX_KEYS} are allowed")
