"""The OpenAPI 3.1 document, drawn from the doors and their types; nothing of it is typed by hand twice."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

import msgspec

from interlock.api import policy_schemas, problems, schemas
from interlock.api.doors import Door
from interlock.service import policy_wishes, wishes

_TEMPLATE: Final = "#/components/schemas/{name}"
_EVERYWHERE: Final = (401, 403, 422, 503)
_WITH_BODY: Final = (400, 413, 415)
_KEYED: Final = "Idempotency-Key"


def document(doors: Iterable[Door], version: str, in_words: str) -> dict[str, Any]:
    """The whole document; `in_words` (Markdown) is what its language cannot say."""
    doors = tuple(doors)
    kinds = [schemas.Problem, schemas.Refusal]
    for door in doors:
        kinds += [
            kind
            for kind in (door.body, door.wrong, *door.answers.values())
            if kind is not None and not isinstance(kind, str)
        ]
    shapes, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    _describe_fields(components)
    known = {repr(kind): shape for kind, shape in zip(kinds, shapes, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for door in doors:
        paths.setdefault(door.path, {})[door.method.lower()] = _operation(door, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Interlock",
            "version": version,
            "summary": "Keeps the state of virtual machines.",
            "description": in_words,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        "security": [{"bearer": []}],
    }


def _describe_fields(components: dict[str, Any]) -> None:
    """Give every field the sentence that stands under it in the source."""
    for module in (schemas, policy_schemas, wishes, policy_wishes):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name in components:
                properties = components[name].get("properties", {})
                for field, sentence in _sentences(kind).items():
                    properties.get(field, {}).setdefault("description", sentence)


def _sentences(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        if not ancestor.__module__.startswith("interlock."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in pairwise(body.body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
                case _:
                    pass
    return found


def _operation(door: Door, known: Mapping[str, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {str(status): _answer(kind, known) for status, kind in door.answers.items()}
    statuses = {*_EVERYWHERE, *door.problems, *(_WITH_BODY if door.body is not None else ())}
    if any(parameter.where == "header" for parameter in door.parameters):
        statuses.add(400)
    for status in sorted(statuses):
        responses[str(status)] = _problem(status, "Problem")
    if door.refuses:
        responses["409"] = _problem(409, "Refusal", "Problem")
    if door.wrong is not None:
        responses["422"] = _problem(422, door.wrong.__name__, "Problem")
    operation: dict[str, Any] = {
        "operationId": f"{door.method.lower()}_{re.sub(r'[^a-z]+', '_', door.path.lower()).strip('_')}",
        "summary": door.summary,
        "tags": [door.tag],
        "parameters": [*_path_parameters(door), *(_parameter(one) for one in door.parameters)],
        "responses": responses,
    }
    if door.body is not None:
        content = {"application/json": {"schema": known[repr(door.body)]}}
        if door.text is not None:
            content[door.text] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": True, "content": content}
    if door.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": door.form}}}
    return operation


def _path_parameters(door: Door) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", door.path)
    ]


def _parameter(parameter: Any) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _answer(kind: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if kind is None:
        return {"description": "Done."}
    if isinstance(kind, str) and kind.startswith("image/"):
        return {"description": "A picture.", "content": {kind: {}}}
    if isinstance(kind, str):
        return {"description": "As text.", "content": {kind: {"schema": {"type": "string"}}}}
    return {"description": "Done.", "content": {"application/json": {"schema": known[repr(kind)]}}}


def _problem(status: int, *names: str) -> dict[str, Any]:
    kinds = [*problems.KINDS.values(), *problems.HTTP_KINDS.values()]
    title = "; or ".join(dict.fromkeys(kind.title for kind in kinds if kind.status == status)) or "Refused"
    shapes = [{"$ref": _TEMPLATE.format(name=name)} for name in names]
    schema = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return {"description": title, "content": {problems.MEDIA_TYPE: {"schema": schema}}}
