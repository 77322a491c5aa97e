"""The API's description: an OpenAPI 3.1 document, and the same as an HTML page without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.server.schemas import ErrorBody

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'self'"
_TEMPLATE = "#/components/schemas/{model}"
_STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}code{font-size:.9em}table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid #8884}
h2{margin-top:2.5rem}h2 b{font-weight:600;color:#0f766e}"""


@dataclass(frozen=True)
class Operation:
    """One route. path: with {name} for what varies. answer, body, query: models, None for none.

    upload: the body is a form with a file. errors: statuses that it may answer with beside 200.
    """

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    upload: bool = False
    errors: tuple[int, ...] = ()


def openapi_document(operations: Sequence[Operation], title: str, version: str) -> dict[str, Any]:
    """The OpenAPI document."""
    models = {model for o in operations for model in (ErrorBody, o.answer, o.body) if model is not None}
    ordered: list[type[BaseModel]] = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_TEMPLATE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").strip("_")
    described: dict[str, Any] = {"operationId": name, "summary": operation.summary}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    if operation.query is not None:
        schema = operation.query.model_json_schema()
        parameters += [
            {"name": key, "in": "query", "required": False, "schema": value}
            for key, value in schema["properties"].items()
        ]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.body)}
    if operation.upload:
        properties = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}}
        form = {"type": "object", "properties": properties, "required": ["file"]}
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    answer = {"text/plain": {}} if operation.answer is None else _json(operation.answer)
    responses: dict[str, Any] = {"200": {"description": "Done", "content": answer}}
    for status in operation.errors:
        responses[str(status)] = {"description": "An error", "content": _json(ErrorBody)}
    described["responses"] = responses
    return described


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=model.__name__)}}}


def docs_page(document: dict[str, Any]) -> str:
    """The document as HTML."""
    title = escape(document["info"]["title"])
    schemas = document["components"]["schemas"]
    parts = [f"<h1>{title}: the API</h1><p>For programs: <a href='openapi.json'>openapi.json</a>.</p>"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation['summary'])}</p>")
            for parameter in operation.get("parameters", ()):
                parts.append(f"<p><code>{escape(parameter['name'])}</code> ({parameter['in']})</p>")
            content = operation.get("requestBody", {}).get("content", {})
            if reference := content.get("application/json", {}).get("schema", {}).get("$ref"):
                parts.append(_fields(schemas[reference.rpartition("/")[2]], schemas))
    parts += ["<h2>What a message holds</h2>"]
    for name in sorted(schemas):
        if schemas[name].get("type") == "object" and name != "ChatBody":
            parts.append(f"<h3 id='{escape(name)}'>{escape(name)}</h3>")
            parts.append(
                f"<p>{escape(schemas[name].get('description', ''))}</p>{_fields(schemas[name], schemas)}"
            )
    style = f"<style>{_STYLE}</style>"
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    return f"<!doctype html><html lang='en'><head>{head}{style}</head><body>{''.join(parts)}</body></html>"


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = []
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        note = " (required)" if name in required else ""
        meaning = escape(field.get("description", ""))
        rows.append(f"<tr><td><code>{escape(name)}</code>{note}<td>{_kind(field, schemas)}<td>{meaning}</tr>")
    return f"<table><tr><th>Field<th>Values<th>Meaning</tr>{''.join(rows)}</table>"


def _kind(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    """The type of a field in a few words, with links to object types."""
    if reference := field.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"<a href='#{escape(name)}'>{escape(name)}</a>"
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = dict.fromkeys(_kind(inner, schemas) for inner in field[key])
            return " or ".join(kinds)
    if "enum" in field:
        return " or ".join(escape(str(value)).lower() for value in map(_plain, field["enum"]))
    if "const" in field:
        return escape(_plain(field["const"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(field.get('items', {}), schemas)}"
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in names.items() if name in field]
    return escape(" ".join([kind, *bounds]))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else str(value).replace("None", "null")
