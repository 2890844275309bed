"""Compares a double's requests with a published description of the monitor's API (Swagger 2 or
OpenAPI 3, YAML or JSON): described.py firecracker|cloud_hypervisor FILE. A double may refuse what
is described, since no test needs it, and never take what is not. Ends with 1 and a line for each
difference, and with 77 where no YAML can be read. DOUBLE_VERSION says which version the double is
of; Firecracker's descriptions say it themselves."""

import importlib
import json
import os
import re
import sys

# Of the tests alone.
OWN = re.compile(r"^/?test[/.]")
TYPES = {str: "string", bool: "boolean", int: "integer"}


def load(path):
    text = open(path).read()
    if path.endswith(".json"):
        return json.loads(text)
    try:
        import yaml
    except ImportError:
        print("there is no module yaml (python3-yaml)")
        sys.exit(77)
    return yaml.safe_load(text)


def resolved(api, schema):
    while "$ref" in schema:
        found = api
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def body_of(api, operation):
    """The schema of a request's body, and None where there is none."""
    for parameter in operation.get("parameters", []):
        parameter = resolved(api, parameter)
        if parameter["in"] == "body":
            return parameter["schema"]
    if "requestBody" in operation:
        content = resolved(api, operation["requestBody"])["content"]
        return content["application/json"]["schema"]
    return None


def differences(api, wanted, schema, where):
    schema = resolved(api, schema)
    kind = schema.get("type")
    if isinstance(wanted, dict):
        if kind not in ("object", None):
            yield f"{where} is described as {kind}, and taken as an object"
            return
        described = schema.get("properties", {})
        known = {name.lstrip("*"): name.startswith("*") for name in wanted}
        for name, value in wanted.items():
            name = name.lstrip("*")
            if name not in described:
                yield f"{where}.{name} is not described"
            else:
                yield from differences(api, value, described[name], f"{where}.{name}")
        for name in schema.get("required", []):
            if not known.get(name):
                yield f"{where}.{name} is needed, and the double does without"
    elif isinstance(wanted, list):
        if kind != "array":
            yield f"{where} is described as {kind}, and taken as a list"
        else:
            yield from differences(api, wanted[0], schema["items"], f"{where}[]")
    elif isinstance(wanted, tuple):
        for value in set(wanted) - set(schema.get("enum", [])):
            yield f"{where} is never {value!r} by the description"
    elif kind != TYPES.get(wanted):
        yield f"{where} is described as {kind}, and taken as {wanted.__name__}"
    elif "enum" in schema:
        yield f"{where} is one of {schema['enum']}, and taken as any"


def compare(api, requests):
    """Requests by method and path, or by the path of a PUT."""
    paths = {re.sub(r"\{\w+\}", "{}", path): of for path, of in api["paths"].items()}
    for request, wanted in requests.items():
        method, path = request if isinstance(request, tuple) else ("PUT", request)
        if OWN.match(path):
            continue
        path = re.sub(r"\{\w+\}", "{}", "/" + path.lstrip("/"))
        operation = paths.get(path, {}).get(method.lower())
        if operation is None:
            yield f"{method} {path} is not described"
            continue
        schema = body_of(api, operation)
        if (schema is None) != (wanted is None):
            yield f"{method} {path} has a body in one of the two alone"
        elif schema is not None:
            yield from differences(api, wanted, schema, f"{method} {path} body")


def main():
    _, name, path = sys.argv
    api = load(path)
    if name == "firecracker":
        os.environ.setdefault("DOUBLE_VERSION", api["info"]["version"])
    found = list(compare(api, importlib.import_module(name).REQUESTS))
    for line in found:
        print(line)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
