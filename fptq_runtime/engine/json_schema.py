"""JSON schemas as llguidance reads them: what it takes otherwise than validators do, and where it gives up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]

SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # subschemas by name
HOLDERS = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "additionalItems",
           "anyOf", "allOf")
VALUES = ("const", "enum", "default", "example", "examples")  # no schemas within
WHOLE = (*VALUES, "required", "dependencies", "dependentRequired", "dependentSchemas", "not", "if", "then", "else",
         "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties")  # enforced or not as they stand
OF_OBJECTS = {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"}
KEPT = ("$defs", "definitions", "$schema", "$id", "id", "$anchor")  # what a $ref needs

_DATE = ("(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
         "|02-(?:0[1-9]|1[0-9]|2[0-8]))|[0-9]{2}(?:0[48]|[2468][048]|[13579][26])-02-29)")
_TIME = "(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){2}(?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,14}"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
# Without 29 February of other years, leap seconds and lengths that no address may have; shorter than they may be.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "hostname": f"{_LABEL}(?:\\.{_LABEL}){{0,3}}",
    "email": f"{_ATOM}{{1,30}}(?:\\.{_ATOM}{{1,10}}){{0,3}}@{_LABEL}(?:\\.{_LABEL}){{1,3}}",
}
# That some draft defines; any other one is a note to the reader.
DEFINED_FORMATS = {*FORMATS, "duration", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri", "iri-reference",
                   "json-pointer", "regex", "relative-json-pointer", "uri", "uri-reference", "uri-template", "uuid"}
_SPACES = r"[\t\n\x0B\f\r \u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000\uFEFF]"
_ESCAPES = {"s": _SPACES, "S": "[^" + _SPACES[1:]}


def prepared(schema: Any) -> Any:
    """The schema with formats and patterns in the words that llguidance takes as ECMAScript does, and without keywords
    that forbid nothing: it does not look at them before it refuses them."""
    if isinstance(schema, list):
        return [prepared(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in SCHEMAS and isinstance(value, dict):
            rename = pattern if key == "patternProperties" else str
            made[key] = {rename(name): prepared(sub) for name, sub in value.items()}
        elif key == "pattern" and isinstance(value, str):
            made[key] = pattern(value)
        elif not _forbids_nothing(key, value, schema):
            made[key] = value if key in VALUES else prepared(value)
    name = made.get("format")
    if isinstance(name, str) and name in FORMATS:
        del made["format"]
        form = f"^(?:{FORMATS[name]})$"
        if "pattern" in made:
            made["allOf"] = [*made.get("allOf", ()), {"pattern": form}]
        else:
            made["pattern"] = form
    return made


def closed(schema: Any) -> Any:
    """The schema whose objects have no other properties than it names, where it names some and does not speak of
    others, which a weak model would write without end. Itself where it combines parts, which that could contradict."""
    return schema if _combines(schema) else _closed(schema)


def _combines(schema: Any) -> bool:
    if isinstance(schema, dict):
        for key in ("allOf", "oneOf", "anyOf", "$ref"):
            if key in schema and (key in ("allOf", "oneOf") or schema.keys() & OF_OBJECTS):
                branches = schema[key]
                if key == "$ref" or _closed(branches) != branches or "$ref" in str(branches):
                    return True
    return any(_combines(sub) for _, sub in _subschemas(schema))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: {name: _closed(sub) for name, sub in value.items()} if key in SCHEMAS and isinstance(value, dict)
            else value if key in WHOLE else _closed(value) for key, value in schema.items()}
    properties, required = schema.get("properties"), schema.get("required", [])
    if properties and isinstance(properties, dict) and isinstance(required, list) and properties.keys() >= set(
            map(str, required)) and not schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}:
        made["additionalProperties"] = False
    return made


def _forbids_nothing(key: str, value: Any, schema: dict[str, Any]) -> bool:
    match key:
        case "x-guidance":  # options of llguidance's, some of which loosen the schema
            return True
        case "format":
            return isinstance(value, str) and value not in DEFINED_FORMATS
        case "uniqueItems":
            return value is False
        case "if":
            return not schema.keys() & {"then", "else"}
        case "then" | "else":
            return "if" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
        case "propertyNames":
            return bool(value in (True, {}, {"type": "string"}))  # names are strings
        case "unevaluatedItems" | "unevaluatedProperties":
            return bool(value in (True, {}))
        case "not":
            return value is False
        case "dependencies" | "dependentRequired" | "dependentSchemas":
            return bool(value == {})
        case "minProperties":
            required = schema.get("required")
            return isinstance(required, list) and isinstance(value, int) and len(set(map(str, required))) >= value
    return False


def pattern(text: str) -> str:
    """An ECMAScript regular expression in Rust's syntax, as far as they differ in what is valid in both."""
    made: list[str] = []
    within = False  # a class
    for token in re.findall(r"\\.|\[\^?|.", text, re.DOTALL):
        if token[0] == "\\" and len(token) == 2:
            if within and token[1] == "s":  # not nested: a - beside it is itself, as in ECMAScript
                if made[-1] == "-":
                    made[-1] = r"\-"
                made.append(_SPACES[1:-1])
            else:
                made.append(_ESCAPES.get(token[1]) or (token if token[1].isalnum() else re.escape(token[1])))
        elif within:
            # [, && and the like nest and combine classes in Rust.
            special = token[0] in "[&~" or (token == "-" and made[-1] in ("-", _SPACES[1:-1]))
            made.append("".join("\\" + c if special else c for c in token))
            within = token != "]"
        else:
            made.append(r"[^\n\r\u2028\u2029]" if token == "." else token)
            within = token[0] == "["
    return "".join(made)


def culprit(schema: Any, error_of: Callable[[Any], str | None]) -> tuple[str, str] | None:
    """The JSON pointer of a keyword of a schema that does not compile, and what is wrong with it: where it stands alone
    of those that matter the schema does not compile, and without it it does. None where no keyword is to blame."""
    keywords = sorted(_keywords(schema, ()), key=_order)
    error = error_of(schema)
    if error is None or error_of(_without(schema, (), set(keywords))) is not None:
        return None
    bad, good = 0, len(keywords)  # without so many it does not compile, and does
    while good - bad > 1:
        middle = (bad + good) // 2
        if (other := error_of(_without(schema, (), set(keywords[:middle])))) is None:
            good = middle
        else:
            bad, error = middle, other
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in keywords[good - 1]), error


def _order(keyword: Path) -> tuple[int, int, bool]:
    """Inner ones go first, and what holds or names others last."""
    last = keyword[-1]
    return (2 if last in HOLDERS else 1 if last == "$ref" else 0), -len(keyword), last == "type"


def _keywords(schema: Any, path: Path) -> Iterator[Path]:
    for step, sub in _subschemas(schema):
        yield from _keywords(sub, (*path, *step))
    if isinstance(schema, dict):
        yield from ((*path, key) for key in schema if key not in KEPT)


def _subschemas(schema: Any) -> Iterator[tuple[Path, Any]]:
    for key, value in enumerate(schema) if isinstance(schema, list) else \
            schema.items() if isinstance(schema, dict) else ():
        if key in SCHEMAS and isinstance(value, dict):
            yield from (((key, name), sub) for name, sub in value.items())
        elif key not in WHOLE:
            yield (key,), value


def _without(schema: Any, path: Path, gone: set[Path]) -> Any:
    if isinstance(schema, list):
        return [_without(item, (*path, i), gone) for i, item in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if (*path, key) not in gone}
    for key, value in made.items():
        if key in SCHEMAS and isinstance(value, dict):
            made[key] = {name: _without(sub, (*path, key, name), gone) for name, sub in value.items()}
        elif key not in WHOLE:
            made[key] = _without(value, (*path, key), gone)
    return made
