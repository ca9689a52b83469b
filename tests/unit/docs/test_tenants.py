"""docs/tenants.md: its example is a file that the proxy accepts, and its table has the fields that there are."""

from __future__ import annotations

import re
from pathlib import Path

from baton.node.tenant_rules import TenantRules, read_tenants

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "tenants.md").read_text(encoding="utf-8")


def test_the_example_is_a_file_of_tenants(tmp_path: Path) -> None:
    """Guards the file that users copy against a field that was renamed, and a digest of the wrong length."""
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    file = tmp_path / "tenants.toml"
    file.write_text(example, encoding="utf-8")
    tenants = read_tenants(file)
    assert set(tenants) == {"acme", "batch", "monitoring", "ops"}
    assert tenants["acme"].tokens_per_minute == 200_000 and tenants["batch"].priority_floor == 100
    assert tenants["monitoring"].metrics and tenants["ops"].admin


def test_the_table_has_every_field() -> None:
    """Guards against a field that only the code knows."""
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == list(TenantRules.__struct_fields__)
