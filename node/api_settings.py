"""Options of the HTTP API that `baton serve` and `baton proxy` share: the former passes them on to the latter.

It owns the keys that clients may send, and where they are read from. It does not know what the API answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.settings import option
from baton.node.tenant_rules import read_tenants
from baton.node.tls import check_certificate

KEY_VARIABLE = "BATON_API_KEY"
MAX_KEY_FILE_BYTES = 1 << 20
AUTO = "auto"
TOOL_FORMATS = (
    *(AUTO, "none", "hermes", "llama3_json", "qwen3_xml", "pythonic"),
    *("mistral", "mistral_v11", "deepseek_v3", "deepseek_v31", "kimi_k2", "glm45", "harmony"),
)
"""Besides the first two, the tables of the proxy."""
REASONING_FORMATS = (AUTO, "none", "think", "think_brackets")
REASONING_FIELDS = ("reasoning_content", "reasoning")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Where the API listens, under which names, for which keys, and its limits."""

    served_model_name: tuple[str, ...] = option(
        (),
        separate=True,
        metavar="NAME",
        help="name of the model in the API, once for each name: /v1/models lists all, answers have the one that was "
        "asked for; default: the folder's name, or the hub id",
    )
    lora_modules: tuple[str, ...] = option(
        (),
        metavar="NAME=PATH",
        help="LoRA adapters of the model: what requests call one, and its folder, as PEFT saves it; also as JSON with "
        "name and path",
    )
    adapter_root: Path | None = option(
        None,
        metavar="FOLDER",
        help="let /v1/load_lora_adapter load adapters from folders inside this one; default: none are loaded later",
    )
    adapter_state: Path | None = option(
        None,
        metavar="FILE",
        help="file that keeps the names of adapters that were loaded and unloaded, which all proxies of the model can "
        "share; default: .baton-adapters.json inside --adapter-root",
    )
    chat_template: Path | None = option(
        None,
        metavar="FILE",
        help="chat template (Jinja) instead of the model's own, as of a base model that has none",
    )
    tool_format: str = option(
        AUTO,
        choices=TOOL_FORMATS,
        help="how the model writes tool calls: found from its chat template, not read at all, or in the format of this "
        "name",
    )
    reasoning_format: str = option(
        AUTO,
        choices=REASONING_FORMATS,
        help="how the model marks its reasoning: found from its chat template and vocabulary, not read at all, between "
        "<think> tags, or between [THINK] tags",
    )
    reasoning_field: str = option(
        "reasoning_content", choices=REASONING_FIELDS, help="name of the reasoning in answers of chats"
    )
    host: str = option("127.0.0.1", help="address of the HTTP API")
    port: int = option(8000, help="port of the HTTP API", minimum=0, maximum=65535)
    proxies: int = option(
        1,
        help="number of proxies that listen at --port together, on Linux; they divide --max-requests and --max-queue",
        minimum=1,
        maximum=64,
    )
    insecure_network: bool = option(
        False,
        help="let the API listen where other machines reach it; of a proxy without --secret-file, run links in the "
        "clear too",
    )
    api_key: tuple[str, ...] = option(
        (),
        separate=True,
        metavar="KEY",
        env=KEY_VARIABLE,
        help="key that clients must send, once for each key; guards every route but the probes. In a command line, "
        "other users of this machine can read it",
    )
    api_key_file: Path | None = option(
        None,
        metavar="FILE",
        help="file with more keys, one a line; empty lines and lines that begin with # do not count",
    )
    tenants: Path | None = option(
        None,
        metavar="FILE",
        help="TOML file of tenants with their keys (as SHA-256), models and limits, read again at SIGHUP; replaces "
        "--api-key and --api-key-file",
    )
    tls_cert: Path | None = option(
        None, metavar="FILE", help="serve HTTPS with this certificate (PEM, with its chain); default: HTTP"
    )
    tls_key: Path | None = option(None, metavar="FILE", help="key of the certificate, if it is in a file of its own")
    cors_origin: tuple[str, ...] = option(
        (),
        separate=True,
        metavar="ORIGIN",
        help="origin whose pages may use the API in a browser, such as https://chat.example.com, once for each; *: all",
    )
    allowed_host: tuple[str, ...] = option(
        (),
        separate=True,
        metavar="NAME",
        help="further name that requests may be sent to, once for each; *: all. A server without keys on the loopback "
        "answers only to IP addresses and names without a dot, as a web page could let its own name point there",
    )
    access_log: bool = option(
        False, help="log a line a request: method, path, status, milliseconds, id; no bodies and no keys"
    )
    max_requests: int = option(
        2048, unit="requests", help="most HTTP requests that are answered at once; further ones get a 429", minimum=1
    )
    max_body_mib: float = option(
        10.0, unit="MiB", help="largest body of a request; a larger one gets a 413", minimum=0.001, maximum=1024
    )
    max_prompts: int = option(64, help="most prompts in one completion request", minimum=1, maximum=4096)
    unknown_parameters: str = option(
        "warn",
        choices=("warn", "error"),
        help="parameters of a request that mean nothing here: name them in the log and in a header of the answer, or "
        "refuse the request; one that is nearly a known name is refused in any case",
    )
    max_n: int = option(16, help="most answers to one prompt (n)", minimum=1, maximum=1 << 16)

    def __post_init__(self) -> None:
        if self.adapter_state is not None and self.adapter_root is None:
            raise SettingsError("--adapter-state needs --adapter-root: without it no adapters are loaded")
        if not all(self.api_key):
            raise SettingsError("--api-key is empty; leave it out to serve without keys")
        if self.tenants is not None and (self.api_key or self.api_key_file is not None):
            raise SettingsError(f"--tenants holds all keys: leave out --api-key, --api-key-file and {KEY_VARIABLE}")
        if self.tls_key is not None and self.tls_cert is None:
            raise SettingsError("--tls-key needs --tls-cert")
        for name in self.allowed_host:
            if name != "*" and not _HOST_NAME.fullmatch(name):
                raise SettingsError(f"--allowed-host {name}: a name without scheme and port, or *")
        for origin in self.cors_origin:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise SettingsError(f"--cors-origin {origin}: an origin is scheme://host[:port] without a path, or *")


def api_keys(settings: ApiSettings) -> tuple[str, ...]:
    """All keys that clients may send; empty where none is needed. Raises SettingsError for a file without any."""
    return settings.api_key + (() if settings.api_key_file is None else _keys_of(settings.api_key_file))


def check_files(settings: ApiSettings) -> None:
    """Raises SettingsError for files of keys, tenants and certificates that cannot be used."""
    api_keys(settings)
    if settings.tenants is not None:
        read_tenants(settings.tenants)
    if settings.tls_cert is not None:
        check_certificate(settings.tls_cert, settings.tls_key)


def _keys_of(path: Path) -> tuple[str, ...]:
    try:
        if path.stat().st_size > MAX_KEY_FILE_BYTES:
            raise SettingsError(f"--api-key-file {path}: larger than {MAX_KEY_FILE_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"--api-key-file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--api-key-file {path}: not UTF-8") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise SettingsError(f"--api-key-file {path}: holds no key")
    return keys
