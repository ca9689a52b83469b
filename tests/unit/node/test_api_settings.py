"""Guards node.api_settings: which keys a server accepts, from options, environment and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.node.api_settings import ApiSettings, api_keys
from baton.node.errors import SettingsError
from baton.node.settings import as_arguments, parse


def read(*argv: str, **environ: str) -> ApiSettings:
    return parse(ApiSettings, argv, prog="api", description="", environ=environ)


def test_keys_come_from_options_or_the_environment_and_from_a_file(tmp_path: Path) -> None:
    """A key that is dropped locks its client out; one that stays in the environment after options lets one in."""
    file = tmp_path / "keys"
    file.write_text("# team a\nkey-a\n\n  key b  # no comment\n#key-c\n", encoding="utf-8")
    assert api_keys(read("--api-key", "x", "--api-key=y", "--api-key-file", str(file), BATON_API_KEY="z")) == (
        *("x", "y"),
        *("key-a", "key b  # no comment"),
    )
    assert api_keys(read(BATON_API_KEY="k\nl\n")) == ("k", "l")
    assert api_keys(read()) == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"", "holds no key"), (b"# none\n\n", "holds no key"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_key_file_without_keys_is_an_error(tmp_path: Path, content: bytes | None, said: str) -> None:
    """A server that was to be guarded must not serve all clients because of its file."""
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        api_keys(ApiSettings(api_key_file=tmp_path / "keys"))


def test_an_empty_key_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """`--api-key "$UNSET"` would serve all clients."""
    with pytest.raises(SystemExit):
        read("--api-key", "")
    assert "--api-key is empty" in capsys.readouterr().err


def test_serve_passes_every_option_on() -> None:
    """An option that `serve` takes and the proxy never sees does nothing."""
    values = {
        "served_model_name": ("a", "b"),
        "lora_modules": ("a=b", '{"name": "c", "path": "d"}'),
        "adapter_root": Path("r"),
        "adapter_state": Path("names"),
        "chat_template": Path("/t.jinja"),
        "tool_format": "hermes",
        "reasoning_format": "think",
        "reasoning_field": "reasoning",
        "host": "::1",
        "port": 1,
        "proxies": 2,
        "insecure_network": True,
        "api_key": ("k",),
        "api_key_file": Path("f"),
        "tenants": None,
        "tls_cert": Path("c"),
        "tls_key": Path("k"),
        "cors_origin": ("https://a", "*"),
        "allowed_host": ("a", "*"),
        "access_log": True,
        "max_requests": 2,
        "max_body_mib": 0.5,
        "max_prompts": 3,
        "max_n": 4,
        "unknown_parameters": "error",
    }
    assert set(values) == set(ApiSettings.__dataclass_fields__)
    assert read(*as_arguments(ApiSettings, values)) == ApiSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"api_key": ("k",)}, {"api_key_file": Path("keys")}])
def test_keys_beside_a_tenants_file_are_an_error(more: dict[str, Any]) -> None:
    """A key that an environment still has would be an administrator's, and appear in no file."""
    with pytest.raises(SettingsError, match="--tenants holds all keys: leave out --api-key"):
        ApiSettings(tenants=Path("tenants.toml"), **more)
    settings = read("--tenants", "tenants.toml")
    assert read(*as_arguments(ApiSettings, {"tenants": settings.tenants})) == settings
