"""node.messages.versions: a peer of the version before reads what is written for it, and can be read.

`protocol_before.json` has the fields of all messages between a proxy and other nodes as the version before had them.
With a new PROTOCOL_VERSION, write it anew from the commit before that change, and empty NEW_FIELDS:

    python3 -P -m baton.tests.unit.node.test_versions > tests/unit/node/protocol_before.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.node.messages import versions
from baton.node.messages.base import PROTOCOL_VERSION, Message, encode
from baton.node.messages.control import (
    AdapterRef,
    DispatchBody,
    Heartbeat,
    Load,
    LoadAdapter,
    Refused,
    Register,
    Registered,
    Reserve,
    SamplingSpec,
)
from baton.node.messages.senders import SENT
from baton.node.messages.versions import NEW_FIELDS, NEW_VALUES, OLDEST_VERSION, NewField, NotInVersion, written_for

BEFORE = Path(__file__).with_name("protocol_before.json")
Fields = dict[str, dict[str, str]]


def _fields() -> Fields:
    """Type and bounds of each field of each structure, as they are now."""
    types = {message for nodes, messages in SENT.items() if "proxy" in nodes for message in messages}
    _, schemas = msgspec.json.schema_components(sorted(types, key=lambda each: each.__name__), ref_template="{name}")
    return {name: _fields_of(schema) for name, schema in sorted(schemas.items())}


def _fields_of(schema: dict[str, Any]) -> dict[str, str]:
    parts = schema["properties"] if "properties" in schema else dict(enumerate(schema["prefixItems"]))
    bare = {str(name): _bare(part) for name, part in parts.items()}
    bare.get("version", {}).pop("default", None)  # which differs
    return {name: json.dumps(part, sort_keys=True) for name, part in bare.items()}


def _bare(part: Any) -> Any:
    """Without the texts."""
    if isinstance(part, dict):
        return {name: _bare(each) for name, each in part.items() if name != "description"}
    return [_bare(each) for each in part] if isinstance(part, list) else part


def _structure_at(message: type[Message], path: str) -> tuple[str, str]:
    """Name of the structure and of the field in it that a path leads to."""
    owner: Any = message
    *outer, name = path.split(".")
    for each in outer:
        kind = next(info.type for info in msgspec.inspect.type_info(owner).fields if info.name == each)
        owner = next(one.cls for one in getattr(kind, "types", (kind,)) if hasattr(one, "cls"))
    return owner.__name__, name


def test_what_is_new_is_listed() -> None:
    """Guards a rolling update: nodes of the version before drop messages with a field that they do not know."""
    new = defaultdict(set)
    for message, added in NEW_FIELDS.items():
        for field in added:
            structure, name = _structure_at(message, field.path)
            new[structure].add(name)
    before: Fields = json.loads(BEFORE.read_text())
    now = {
        structure: {name: kind for name, kind in fields.items() if name not in new[structure]}
        for structure, fields in _fields().items()
        if structure in before  # one that is new is reached by new fields and new messages only
    }
    for message, values_of in NEW_VALUES.items():
        for name, values in values_of.items():
            kind = json.loads(now[message.__name__][name])
            kind["enum"] = [value for value in kind["enum"] if value not in values]
            now[message.__name__][name] = json.dumps(kind)
    assert now == before, "a message has changed: see docs/decisions/0011-two-versions-at-once.md"


REGISTER = Register(
    worker="d",
    incarnation=1,
    role="decode",
    model="m",
    namespace=b"n" * 32,
    block_tokens=16,
    total_blocks=5,
    max_num_seqs=8,
    max_model_len=512,
    address="tcp://x",
    revision="blue",
)


@pytest.mark.parametrize(
    "message",
    [
        REGISTER,
        Registered(proxy="p", incarnation=1, version=PROTOCOL_VERSION, peers=(("m/1", "tcp://m"),)),
        Refused(reason="no", version=PROTOCOL_VERSION),
        Heartbeat(worker="d", incarnation=1, load=Load(running=3), orphaned=True),
    ],
)
def test_new_fields_are_left_out_for_the_version_before(message: Message) -> None:
    assert written_for(PROTOCOL_VERSION, message) is message
    now = _by_path(msgspec.msgpack.decode(encode(message)))
    old = _by_path(msgspec.msgpack.decode(encode(written_for(OLDEST_VERSION, message))))
    assert set(now) - set(old) == {field.path for field in NEW_FIELDS[type(message)]}
    assert {name: now[name] for name in old} == old


def _by_path(fields: dict[str, Any], before: str = "") -> dict[str, Any]:
    """All fields, those of values inside too."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _by_path(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def test_new_messages_are_not_written_for_the_version_before() -> None:
    """A worker of that version would drop the link's count of messages with them."""
    with pytest.raises(NotInVersion, match="LoadAdapter"):
        written_for(OLDEST_VERSION, LoadAdapter(adapter=AdapterRef(b"a" * 32, "/a")))


def _reserve(sampling: SamplingSpec) -> Reserve:
    body = DispatchBody(
        token_ids=(1,), prompt_len=1, root=b"", block_hashes=(), sampling=sampling, deadline_s=1.0, contended=True
    )
    return Reserve(request_id="r", attempt=0, body=body)


def test_a_parameter_that_changes_answers_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the answer to a request whose parameter a worker of the version before would ignore."""
    added = (NewField("body.contended"), NewField("body.sampling.min_p", needed=True))
    monkeypatch.setitem(versions.NEW_FIELDS, Reserve, added)
    old = msgspec.msgpack.decode(encode(written_for(OLDEST_VERSION, _reserve(SamplingSpec(max_tokens=1)))))
    assert "contended" not in old["body"] and "min_p" not in old["body"]["sampling"]
    with pytest.raises(NotInVersion, match="min_p"):
        written_for(OLDEST_VERSION, _reserve(SamplingSpec(max_tokens=1, min_p=0.5)))


if __name__ == "__main__":
    print(json.dumps(_fields(), indent=1))
