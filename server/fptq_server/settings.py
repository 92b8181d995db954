"""What a command is told besides its flags: FPTQ_… variables and a YAML file, with an entry for each flag."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, StrictFloat, StrictInt, StrictStr, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from fptq_runtime.errors import FptqError

PREFIX = "FPTQ_"
NEAR = 0.85  # of a variable's name to one of ours, from which it is a mistake and not another program's

Kind = Literal["flag", "value", "list", "object"]


def _listed(value: Any) -> Any:
    """A list, written in JSON where a variable holds it; anything else is one entry."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return json.loads(value)
    return value if isinstance(value, list) else [value]


_TYPES: dict[Kind, tuple[Any, str]] = {
    "flag": (bool, "true or false"),
    "value": (StrictStr | StrictInt | StrictFloat, "a text or a number"),
    "list": (Annotated[list[StrictStr], NoDecode, BeforeValidator(_listed)], "a text or a list of texts"),
    "object": (Annotated[dict[str, Any] | StrictStr, NoDecode], "an object"),
}


@dataclass(frozen=True)
class Given:
    """value: for the flag's own type to read. origin: the variable, or the key and its file."""

    value: Any
    origin: str


class _File(YamlConfigSettingsSource):
    """Keys are written as flags are, max-model-len; those without a value are not given."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        try:
            entries = super()._read_file(file_path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FptqError(f"{file_path} cannot be read: {error}") from None
        if not isinstance(entries, dict):
            raise FptqError(f"{file_path} must have a setting a line, as port: 8000")
        named = {str(key).replace("-", "_"): value for key, value in entries.items()}
        if len(named) < len(entries):
            raise FptqError(f"{file_path} has a setting twice, with - and with _")
        return {name: value for name, value in named.items() if value is not None}


def read_settings(kinds: Mapping[str, Kind], file: Path | None) -> dict[str, Given]:
    """What variables and the file give, variables first, by the names of flags with _ for -. Raises FptqError."""
    _refuse_misspelt_variables(kinds)

    class Sources(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", validate_default=False,
                                          str_strip_whitespace=True)

        @classmethod
        def settings_customise_sources(cls, *_: Any, **__: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            return environment, entries

    fields: dict[str, Any] = {name: (_TYPES[kind][0], None) for name, kind in kinds.items()}
    model = create_model("Settings", __base__=Sources, **fields)
    environment = EnvSettingsSource(model)
    environment.env_vars = {name: value for name, value in environment.env_vars.items()
                            if not _service_link(name, value)}
    entries = _File(model, file, "utf-8")
    origins = {name: f"{name.replace('_', '-')} in {file}" for name in entries()}
    origins |= {name: PREFIX + name.upper() for name in environment()}
    for name, value in environment().items():
        if not value.strip():
            raise FptqError(f"{origins[name]} is set but empty; give it a value, or unset it")
    try:
        settings = model()
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        if name in kinds:
            raise FptqError(f"{origins[name]} must be {_TYPES[kinds[name]][1]}") from None
        near = difflib.get_close_matches(name, kinds, 1)
        meant = f"did you mean {near[0].replace('_', '-')}?" if near else "`fptq config` lists what there is"
        raise FptqError(f"{origins[name]} is no setting; {meant}") from None
    return {name: Given(getattr(settings, name), origins[name]) for name in origins}


def _service_link(name: str, value: str | None) -> bool:
    """What Kubernetes sets for a Service that is named like our variables."""
    return bool(re.match("(tcp|udp|sctp)://", value or "") or
                re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)", name.upper()))


def _refuse_misspelt_variables(kinds: Mapping[str, Kind]) -> None:
    """Many programs' variables are in an environment, so only a near miss is told."""
    ours = [PREFIX + name.upper() for name in kinds]
    for variable, value in os.environ.items():
        if _service_link(variable, value):
            continue
        near = difflib.get_close_matches(variable.upper(), ours, 1, NEAR)
        if near and variable.upper() not in ours:
            raise FptqError(f"the variable {variable} is no setting; did you mean {near[0]}?")
