"""Parameters of functions, as agents and MCP servers declare them."""

from __future__ import annotations

from baton.tests.unit.worker.schemas.words import (
    BOOL,
    FREE,
    INT,
    NUMBER,
    Schema,
    array,
    either,
    form,
    integer,
    matching,
    named,
    nullable,
    number,
    obj,
    one_of_words,
    opened,
    ref,
    text,
)

_POINT = obj({"lat": number(-90, 90), "lon": number(-180, 180)})
_PERSON = obj({"name": text(16), "email": form("email")}, "email")

FUNCTIONS: dict[str, Schema] = {
    "weather": obj({"location": text(20), "unit": one_of_words("celsius fahrenheit")}, "location"),
    "weather, strict": obj({"location": text(20), "unit": nullable(one_of_words("celsius fahrenheit"))}),
    "forecast": obj({"place": either(text(12), _POINT), "days": integer(1, 14), "hourly": BOOL}),
    "calculator": obj({"expression": matching(r"^[0-9+*/(). -]{1,20}$"), "precision": integer(0, 12)}, "expression"),
    "web search": obj(
        {"query": text(24), "num_results": integer(1, 50), "safe": BOOL, "site": form("hostname")}, "query"
    ),
    "fetch": obj({"url": form("uri"), "max_length": integer(1, 10**6), "raw": BOOL}, "url"),
    "http request": obj(
        {
            "method": one_of_words("GET POST PUT PATCH DELETE"),
            "url": text(24),
            "headers": named(text(10)),
            "timeout_s": number(0, 60),
        },
        "method url",
    ),
    "read file": obj({"path": text(24), "head": integer(1, 1000), "tail": integer(1, 1000)}, "path"),
    "write file": obj({"path": text(20), "content": text(40)}),
    "edit file": obj(
        {
            "path": text(20),
            "edits": array(obj({"old_text": text(16), "new_text": text(16)}), 3, 1),
            "dry_run": {"type": "boolean", "default": False},
        },
        "path edits",
    ),
    "search files": obj({"path": text(16), "pattern": text(8), "exclude": array(text(8))}, "path pattern"),
    "list directory": obj({"path": text(20), "sort_by": one_of_words("name size"), "recursive": BOOL}, "path"),
    "shell": obj({"command": array(text(10), 5, 1), "workdir": text(16), "timeout_ms": INT}, "command"),
    "git commit": obj(
        {"message": text(30, 1), "files": array(text(12), 4), "amend": BOOL, "sign_off": BOOL}, "message"
    ),
    "git log": obj({"max_count": integer(1, 100), "since": form("date"), "author": text(12)}, ""),
    "create issue": obj(
        {
            "owner": matching("^[a-z0-9-]{1,12}$"),
            "repo": matching("^[A-Za-z0-9._-]{1,12}$"),
            "title": text(24),
            "labels": array(text(8)),
            "assignees": array(text(8), 2),
            "milestone": nullable(INT),
        },
        "owner repo title",
    ),
    "create pull request": obj(
        {"title": text(20), "head": text(10), "base": text(10), "draft": BOOL, "body": nullable(text(30))}
    ),
    "merge": obj(
        {"number": integer(1, 99999), "method": one_of_words("merge squash rebase"), "sha": matching("^[0-9a-f]{40}$")},
        "number",
    ),
    "sql": obj(
        {
            "statement": text(40),
            "parameters": array(either(text(8), NUMBER, BOOL, {"type": "null"})),
            "read_only": {"const": True},
        }
    ),
    "table": obj(
        {
            "name": matching("^[a-z_]{1,16}$"),
            "columns": array(
                obj(
                    {
                        "name": matching("^[a-z_]{1,8}$"),
                        "type": one_of_words("text integer real blob"),
                        "nullable": BOOL,
                    }
                ),
                3,
                1,
            ),
        }
    ),
    "book flight": obj(
        {
            "from": matching("^[A-Z]{3}$"),
            "to": matching("^[A-Z]{3}$"),
            "depart": form("date"),
            "return": nullable(form("date")),
            "cabin": one_of_words("economy premium business first"),
            "passengers": integer(1, 9),
        }
    ),
    "calendar event": obj(
        {
            "title": text(20),
            "start": form("date-time"),
            "end": form("date-time"),
            "attendees": array(_PERSON, 2),
            "reminders_min": array(integer(0, 1440), 3),
        },
        "title start end",
    ),
    "reminder": obj(
        {"text": text(20), "at": form("time"), "every": one_of_words("day week month"), "for": form("duration")},
        "text at",
    ),
    "send mail": obj(
        {"to": array(form("email"), 2, 1), "subject": text(20), "body": text(40), "cc": array(form("email"), 1)},
        "to subject body",
    ),
    "send message": obj(
        {"channel": matching("^[#@][a-z0-9_-]{1,12}$"), "text": text(30), "thread_ts": matching(r"^\d{10}\.\d{6}$")},
        "channel text",
    ),
    "contact": obj(
        {
            "name": text(16),
            "phones": array(obj({"kind": one_of_words("home work"), "number": matching(r"^\+[0-9]{6,14}$")}), 2),
        }
    ),
    "route": obj(
        {
            "stops": array(_POINT, 3, 2),
            "mode": one_of_words("car bike foot"),
            "avoid": array(one_of_words("tolls ferries"), 2),
        },
        "stops mode",
    ),
    "order": obj(
        {
            "items": array(obj({"sku": matching("^[A-Z]{2}-[0-9]{4}$"), "quantity": integer(1, 99)}), 3, 1),
            "currency": one_of_words("EUR USD GBP"),
            "total": {"type": "number", "minimum": 0, "exclusiveMaximum": 100000},
            "ship_to": obj({"street": text(16), "zip": matching("^[0-9]{5}$"), "country": matching("^[A-Z]{2}$")}),
        }
    ),
    "payment": either(
        obj({"kind": {"const": "card"}, "number": matching("^[0-9]{16}$"), "cvc": matching("^[0-9]{3}$")}),
        obj({"kind": {"const": "transfer"}, "iban": matching("^[A-Z]{2}[0-9]{10,20}$")}),
    ),
    "thought": obj(
        {
            "thought": text(40),
            "next": BOOL,
            "number": integer(1, 20),
            "total": integer(1, 20),
            "revises": nullable(INT),
        },
        "thought next number total",
    ),
    "entities": obj(
        {"entities": array(obj({"name": text(10), "type": text(8), "observations": array(text(12), 2)}), 2)}
    ),
    "relations": obj({"relations": array(obj({"from": text(8), "to": text(8), "relation": text(8)}), 3)}),
    "todo": obj(
        {
            "todos": array(
                obj({"content": text(16, 1), "status": one_of_words("pending in_progress completed"), "id": text(4)}), 4
            )
        }
    ),
    "browser": obj(
        {
            "action": one_of_words("click type scroll"),
            "selector": nullable(text(16)),
            "x": nullable(integer(0, 4096)),
            "y": nullable(integer(0, 4096)),
        }
    ),
    "screenshot": obj({"name": text(8), "width": integer(1, 3840), "height": integer(1, 2160)}, "name"),
    "render chart": obj(
        {
            "type": one_of_words("bar line pie"),
            "series": array(obj({"label": text(8), "values": array(number(-1e6, 1e6), 4, 1)}), 2, 1),
            "stacked": BOOL,
        },
        "type series",
    ),
    "image": obj(
        {
            "prompt": text(40),
            "size": {"enum": ["256x256", "512x512", "1024x1024"]},
            "n": integer(1, 4),
            "seed": integer(0, 2**31),
        },
        "prompt",
    ),
    "translate": obj(
        {"text": text(30), "from": nullable(matching("^[a-z]{2}$")), "to": matching("^[a-z]{2}(-[A-Z]{2})?$")}
    ),
    "classify": obj({"label": one_of_words("positive negative neutral"), "confidence": number(0, 1)}),
    "extract": obj(
        {"people": array(obj({"name": text(12), "age": nullable(integer(0, 130))}), 3), "dates": array(form("date"), 2)}
    ),
    "answer": obj({"reasoning": text(40), "answer": one_of_words("A B C D")}),
    "steps": obj({"steps": array(obj({"explanation": text(20), "output": text(12)}), 3, 1), "final_answer": text(12)}),
    "rate": obj(
        {
            "scores": obj({"style": integer(1, 5), "content": integer(1, 5), "grammar": integer(1, 5)}),
            "comment": text(20),
        }
    ),
    "filter": {
        **obj({"where": ref("clause")}),
        "$defs": {
            "clause": either(
                obj({"field": text(6), "op": one_of_words("eq lt gt"), "value": either(text(6), NUMBER)}),
                obj({"and": array(ref("clause"), 2, 1)}),
                obj({"not": ref("clause")}),
            )
        },
    },
    "any arguments": opened({"tool": text(8)}, "tool", maxProperties=2),
    "no arguments": obj({}),
    "free text": obj({"text": FREE}),
    "device": obj(
        {
            "id": form("uuid"),
            "ip": form("ipv4"),
            "ip6": form("ipv6"),
            "on": BOOL,
            "level": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        }
    ),
}
