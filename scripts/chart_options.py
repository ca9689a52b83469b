"""Writes the options of the nodes into the values schema of the Helm chart, out of their settings.

    python3 -m baton.scripts.chart_options   # after a change of a node's settings; a test compares the two

So an option that does not exist, or a value that its node would refuse, is an error before anything is installed.
What the chart sets itself, out of values of its own, is no option.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from baton.decode.settings import DecodeSettings
from baton.kvtransfer.store.settings import StoreSettings
from baton.node.settings import OptionInfo
from baton.prefill.settings import PrefillSettings
from baton.proxy.settings import ProxySettings
from baton.worker.stages.remote.settings import StageSettings

SCHEMA = Path(__file__).resolve().parents[1] / "deploy" / "helm" / "baton" / "values.schema.json"
NODES = {
    "proxy": ProxySettings,
    "prefill": PrefillSettings,
    "stage": StageSettings,
    "decode": DecodeSettings,
    "store": StoreSettings,
}
SET_BY_THE_CHART = {
    *("model", "served_model_name", "device", "gpu", "log_level", "drain_s", "probe_port"),
    *(
        "worker_id",
        "store_id",
        "revision",
        "proxy",
        "bind",
        "advertise_host",
        "store",
        "control_address",
        "secret_file",
        "insecure_network",
    ),
    *("host", "port", "proxies", "proxy_index", "group_folder"),
    *("api_key", "api_key_file", "tenants", "tls_cert", "tls_key"),
    *("stages_bind", "first"),
    *("ram_gib", "disk_gib", "path", "slo_ttft_ms", "slo_tpot_ms", "mixed"),
}
_TYPES = {int: "integer", float: "number", str: "string", Path: "string", bool: "boolean"}


def options_of(node: type) -> dict[str, Any]:
    """The schema of `options` of a node: what is left to users, by the names of the command line."""
    hints = typing.get_type_hints(node)
    fields = [each for each in dataclasses.fields(node) if each.name not in SET_BY_THE_CHART]
    properties = {
        each.name.replace("_", "-"): _option(each.metadata["option"], hints[each.name])
        for each in sorted(fields, key=lambda field: field.name)
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def with_options(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with the options of all nodes as the code has them."""
    options = {f"{name}Options": options_of(node) for name, node in NODES.items()}
    return {**schema, "definitions": {**schema["definitions"], **options}}


def text_of(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"


def _option(info: OptionInfo, hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return {"description": info.help, "type": "array", "items": _value(info, args[0])}
    if origin in (types.UnionType, typing.Union):
        hint = next(each for each in args if each is not type(None))
    return {"description": info.help, **_value(info, hint)}


def _value(info: OptionInfo, kind: type) -> dict[str, Any]:
    bounds = {"minimum": info.minimum, "maximum": info.maximum}
    return {
        "type": _TYPES[kind],
        **({"enum": list(info.choices)} if info.choices else {}),
        **{name: bound for name, bound in bounds.items() if bound is not None},
    }


if __name__ == "__main__":
    SCHEMA.write_text(text_of(with_options(json.loads(SCHEMA.read_text()))))
