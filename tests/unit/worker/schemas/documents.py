"""Documents: settings of tools, manifests, records of APIs, and the data formats that schemas are published for."""

from __future__ import annotations

from baton.tests.unit.worker.schemas.words import (
    BOOL,
    INT,
    NULL,
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
    ref,
    text,
)

_VERSION = matching(r"^\d+\.\d+\.\d+(-[a-z]+)?$", maxLength=12)
_POSITION = {"type": "array", "prefixItems": [number(-180, 180), number(-90, 90)], "items": False, "minItems": 2}
_ENV = {
    "type": "object",
    "patternProperties": {"^[A-Z_]{1,8}$": text(8)},
    "additionalProperties": False,
    "maxProperties": 3,
}

DOCUMENTS: dict[str, Schema] = {
    "package": obj(
        {
            "name": matching("^[a-z][a-z0-9-]{0,15}$"),
            "version": _VERSION,
            "private": BOOL,
            "license": {"enum": ["MIT", "Apache-2.0", "BSD-3-Clause"]},
            "dependencies": named(matching(r"^[\^~]?\d+\.\d+\.\d+$", maxLength=10)),
            "bin": either(text(8), named(text(8))),
        },
        "name version",
    ),
    "tsconfig": obj(
        {
            "compilerOptions": obj(
                {
                    "target": one_of_words("es5 es2020 esnext"),
                    "strict": BOOL,
                    "lib": array(one_of_words("dom es2020"), 2),
                    "outDir": text(8),
                },
                "",
            ),
            "include": array(text(8), 2),
        },
        "compilerOptions",
    ),
    "eslint": obj({"root": BOOL, "rules": named({"oneOf": [integer(0, 2), one_of_words("off warn error")]})}),
    "prettier": obj(
        {
            "tabWidth": integer(0, 16),
            "semi": BOOL,
            "quoteProps": one_of_words("as-needed consistent preserve"),
            "endOfLine": one_of_words("lf crlf cr auto"),
        },
        "",
    ),
    "workflow": {
        **obj(
            {
                "name": text(12),
                "on": either(one_of_words("push pull_request"), array(one_of_words("push pull_request"), 2, 1)),
                "jobs": {
                    "type": "object",
                    "patternProperties": {"^[a-z_]{1,8}$": ref("job")},
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 2,
                },
            },
            "on jobs",
        ),
        "$defs": {
            "job": obj(
                {
                    "runs-on": one_of_words("ubuntu-latest macos-latest"),
                    "steps": array(ref("step"), 2, 1),
                    "timeout-minutes": integer(1, 360),
                },
                "runs-on steps",
            ),
            "step": either(
                obj({"run": text(16), "name": text(8)}, "run"),
                obj({"uses": matching("^[a-z]{1,8}/[a-z]{1,8}@v[0-9]$"), "with": named(text(6), most=2)}, "uses"),
            ),
        },
    },
    "dependabot": obj(
        {
            "version": {"const": 2},
            "updates": array(
                obj(
                    {
                        "package-ecosystem": one_of_words("pip npm docker"),
                        "directory": text(8),
                        "schedule": obj({"interval": one_of_words("daily weekly monthly")}),
                    }
                ),
                2,
                1,
            ),
        }
    ),
    "compose": obj(
        {
            "services": {
                "type": "object",
                "additionalProperties": obj(
                    {
                        "image": text(12),
                        "ports": array(matching("^[0-9]{1,5}:[0-9]{1,5}$"), 2),
                        "environment": _ENV,
                        "restart": one_of_words("no always"),
                    },
                    "image",
                ),
                "minProperties": 1,
                "maxProperties": 2,
            }
        }
    ),
    "pod": obj(
        {
            "apiVersion": {"const": "v1"},
            "kind": {"const": "Pod"},
            "metadata": obj({"name": matching("^[a-z0-9-]{1,12}$"), "labels": named(text(6), most=2)}, "name"),
            "spec": obj(
                {
                    "containers": array(
                        obj(
                            {
                                "name": text(8),
                                "image": text(12),
                                "ports": array(obj({"containerPort": integer(1, 65535)}), 1),
                                "resources": obj(
                                    {
                                        "limits": obj(
                                            {"cpu": matching("^[0-9]{1,4}m$"), "memory": matching("^[0-9]{1,4}Mi$")}, ""
                                        )
                                    },
                                    "",
                                ),
                            },
                            "name image",
                        ),
                        2,
                        1,
                    )
                }
            ),
        }
    ),
    "dashboard": obj(
        {
            "title": text(10),
            "panels": array(
                obj(
                    {
                        "id": INT,
                        "type": one_of_words("graph stat"),
                        "gridPos": obj({"x": integer(0, 24), "y": integer(0, 99)}),
                    }
                ),
                2,
            ),
        }
    ),
    "log line": obj(
        {
            "ts": form("date-time"),
            "level": one_of_words("debug info warn error"),
            "message": text(24),
            "fields": named(either(text(6), NUMBER, BOOL), most=2),
        },
        "ts level message",
    ),
    "trace": {
        **obj({"root": ref("span")}),
        "$defs": {
            "span": obj(
                {"id": matching("^[0-9a-f]{8}$"), "ms": number(0, 1e4), "children": array(ref("span"), 2)}, "id ms"
            )
        },
    },
    "point": obj({"type": {"const": "Point"}, "coordinates": _POSITION}),
    "geometry": {
        "oneOf": [
            obj({"type": {"const": "Point"}, "coordinates": _POSITION}),
            obj({"type": {"const": "LineString"}, "coordinates": array(_POSITION, 3, 2)}),
            obj({"type": {"const": "Polygon"}, "coordinates": array(array(_POSITION, 4, 3), 1)}),
        ]
    },
    "feature": obj(
        {
            "type": {"const": "Feature"},
            "geometry": nullable(obj({"type": {"const": "Point"}, "coordinates": _POSITION})),
            "properties": nullable(named(text(6), most=2)),
        }
    ),
    "resume": obj(
        {
            "basics": obj({"name": text(12), "email": form("email"), "url": form("uri")}, "name"),
            "work": array(
                obj(
                    {
                        "company": text(12),
                        "startDate": form("date"),
                        "endDate": nullable(form("date")),
                        "highlights": array(text(16), 2),
                    },
                    "company",
                ),
                2,
            ),
        },
        "basics",
    ),
    "recipe": obj(
        {
            "name": text(16),
            "servings": integer(1, 12),
            "ingredients": array(
                obj({"what": text(10), "amount": number(0, 1000), "unit": {"enum": ["g", "ml", None]}}), 3, 1
            ),
            "steps": array(text(20), 3, 1),
        }
    ),
    "book": obj(
        {
            "isbn": matching("^97[89][0-9]{10}$"),
            "title": text(20),
            "authors": array(text(12), 2, 1),
            "year": integer(1450, 2100),
            "price": {"type": "number", "exclusiveMinimum": 0, "maximum": 500},
        },
        "isbn title",
    ),
    "user": obj(
        {
            "id": form("uuid"),
            "name": text(12, 1),
            "email": form("email"),
            "roles": array(one_of_words("admin editor viewer"), 3),
            "created": form("date-time"),
            "manager": nullable(form("uuid")),
        },
        "id name",
    ),
    "page": obj(
        {
            "items": array(obj({"id": INT, "title": text(8)}), 3),
            "next": nullable(form("uri")),
            "total": {"type": "integer", "minimum": 0},
        }
    ),
    "error": obj(
        {
            "error": obj(
                {
                    "code": {"type": ["string", "integer", "null"], "maxLength": 6},
                    "message": text(20),
                    "details": array(True, 0),
                },
                "message",
            )
        }
    ),
    "rpc": obj(
        {
            "jsonrpc": {"const": "2.0"},
            "method": matching("^[a-z]{1,8}/[a-z]{1,8}$"),
            "params": either(array(INT), named(INT)),
            "id": either(INT, text(6), NULL),
        },
        "jsonrpc method",
    ),
    "patch": array(
        {
            "anyOf": [
                obj({"op": {"const": "add"}, "path": text(8), "value": either(INT, text(6))}),
                obj({"op": {"const": "remove"}, "path": text(8)}),
                obj({"op": {"const": "move"}, "from": text(8), "path": text(8)}),
            ]
        },
        3,
        1,
    ),
    "parameter": obj(
        {
            "name": text(8),
            "in": one_of_words("query header path cookie"),
            "required": BOOL,
            "schema": obj({"type": one_of_words("string integer"), "minimum": INT}, "type"),
        },
        "name in",
    ),
}
