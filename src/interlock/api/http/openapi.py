"""Generator of the OpenAPI 3.1 document from the routes and their wire types."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Final

import msgspec

from interlock.api.http import problems
from interlock.api.http.route import Route
from interlock.api.schemas import hosts, inventory, networks, policy
from interlock.api.schemas import responses as schemas
from interlock.core.operations import CATALOGUE
from interlock.core.parameters import Parameters
from interlock.service import policy_requests, request_models

_TEMPLATE: Final = "#/components/schemas/{name}"
_EVERYWHERE: Final = (401, 403, 422, 503)
_WITH_BODY: Final = (400, 413, 415)
_KEYED: Final = "Idempotency-Key"


def document(routes: Iterable[Route], version: str, description: str) -> dict[str, Any]:
    """Return the document; `description` is Markdown, for what OpenAPI cannot describe."""
    routes = tuple(routes)
    kinds = [schemas.Problem, schemas.Refusal]
    for route in routes:
        kinds += [
            kind
            for kind in (route.body, route.error_422, *route.responses.values())
            if kind is not None and not isinstance(kind, str)
        ]
    parameters = tuple({entry.parameters: None for entry in CATALOGUE.values()})
    shapes, components = msgspec.json.schema_components([*kinds, *parameters], ref_template=_TEMPLATE)
    _describe_fields(components)
    _describe_operations(components, parameters)
    known = {repr(kind): shape for kind, shape in zip(kinds, shapes, strict=False)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Interlock",
            "version": version,
            "summary": "Manages the state of virtual machines.",
            "description": description,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        "security": [{"bearer": []}],
    }


def _describe_fields(components: dict[str, Any]) -> None:
    """Set each field's description to its docstring in the source."""
    for module in (schemas, inventory, hosts, networks, policy, request_models, policy_requests):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name in components:
                properties = components[name].get("properties", {})
                for field, text in _field_docstrings(kind).items():
                    properties.get(field, {}).setdefault("description", text)


def _describe_operations(components: dict[str, Any], parameters: Iterable[type[Parameters]]) -> None:
    """Describe each operation, and the parameters of a submission: one of the types of the catalogue."""
    lines = (f"* `{entry.operation.value}`: {entry.summary}" for entry in CATALOGUE.values())
    components["Operation"]["description"] = "\n".join(lines)
    for kind in parameters:
        takers = [f"`{entry.operation.value}`" for entry in CATALOGUE.values() if entry.parameters is kind]
        components[kind.__name__]["description"] = f"Parameters of {', '.join(takers)}."
    components["NewRequest"]["properties"]["parameters"] |= {
        "description": "Those of the operation.",
        "anyOf": [{"$ref": _TEMPLATE.format(name=kind.__name__)} for kind in parameters],
    }


def _field_docstrings(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__):
        if not ancestor.__module__.startswith("interlock."):
            continue
        source = _classes(ancestor.__module__).get(ancestor.__name__)
        # A type that is made from a table has its descriptions in its fields.
        for field, after in pairwise(() if source is None else source.body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
                case _:
                    pass
    return found


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module as they are written, by name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _operation(route: Route, known: Mapping[str, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {str(status): _response(kind, known) for status, kind in route.responses.items()}
    statuses = {*_EVERYWHERE, *route.problems, *(_WITH_BODY if route.body is not None else ())}
    if "{" in route.path:
        statuses.add(404)
    if any(parameter.where == "header" for parameter in route.parameters):
        statuses.add(400)
    for status in sorted(statuses):
        responses[str(status)] = _problem(status, "Problem")
    if route.can_be_denied:
        responses["409"] = _problem(409, "Refusal", "Problem")
    if route.error_422 is not None:
        responses["422"] = _problem(422, route.error_422.__name__, "Problem")
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z]+', '_', route.path.lower()).strip('_')}",
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": [*_path_parameters(route), *(_parameter(one) for one in route.parameters)],
        "responses": responses,
    }
    if route.body is not None:
        content = {"application/json": {"schema": known[repr(route.body)]}}
        if route.text is not None:
            content[route.text] = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
    return operation


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]


def _parameter(parameter: Any) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _response(kind: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if kind is None:
        return {"description": "Success."}
    if isinstance(kind, str) and kind.startswith("image/"):
        return {"description": "An image.", "content": {kind: {}}}
    if isinstance(kind, str):
        return {"description": "Text.", "content": {kind: {"schema": {"type": "string"}}}}
    return {"description": "Success.", "content": {"application/json": {"schema": known[repr(kind)]}}}


def _problem(status: int, *names: str) -> dict[str, Any]:
    kinds = [*problems.PROBLEM_TYPES.values(), *problems.HTTP_PROBLEM_TYPES.values()]
    title = "; or ".join(dict.fromkeys(kind.title for kind in kinds if kind.status == status)) or "Error"
    shapes = [{"$ref": _TEMPLATE.format(name=name)} for name in names]
    schema = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    return {"description": title, "content": {problems.MEDIA_TYPE: {"schema": schema}}}
