"""`GET /docs`: the OpenAPI document as a page, for people.

Made here, of nothing but HTML: boxes without a way to the internet have to show it too, and FastAPI's
own page loads its script and style from elsewhere.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any, Final

Object = dict[str, Any]

_HEAD: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%s</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
summary{cursor:pointer;padding:.2rem 0}b{display:inline-block;width:4.5rem}
pre{background:#8882;padding:.6rem;overflow:auto}table{border-spacing:.8rem 0}td{vertical-align:top}
</style><h1>%s</h1><p>As a document for tools: <a href="openapi.json">openapi.json</a></p>"""


def page(document: Object) -> str:
    """Write an OpenAPI document as HTML: its operations, by tags."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    tags: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            rows = tags.setdefault(operation.get("tags", ["other"])[0], [])
            rows.append(_operation(method.upper(), path, operation))
    parts = [f"<h2>{escape(tag)}</h2>{''.join(rows)}" for tag, rows in tags.items()]
    return "".join((_HEAD % (title, title), *parts))


def _operation(method: str, path: str, operation: Object) -> str:
    said = escape(operation.get("description") or operation.get("summary", ""))
    text = [f"<details><summary><b>{method}</b><code>{escape(path)}</code></summary><p>{said}</p>"]
    given = [
        (f"{each['name']} ({each['in']})", json.dumps(each.get("schema", {})))
        for each in operation.get("parameters", ())
    ]
    statuses = [(code, each["description"]) for code, each in operation["responses"].items()]
    for rows in (given, statuses):
        cells = (f"<tr><td><code>{escape(a)}</code><td>{escape(b)}" for a, b in rows)
        text.append(f"<table>{''.join(cells)}</table>")
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        schema = escape(json.dumps(body["schema"], indent=1))
        text.append(f"<p>Body, {escape(kind)}:</p><pre>{schema}</pre>")
    return "".join((*text, "</details>"))
