"""Settings from an untrusted YAML file: plain values only, and every problem is reported with its line."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from cbam.errors import ConfigError, MissingExtraError

_SYNONYMS = {"learning_rate": "lr"}  # common synonyms of settings
MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_DEPTH = 20


def read_config(path: str, kind: type) -> dict[str, Any]:
    """Read the settings in a YAML file, for the fields of the dataclass `kind`.

    Raises:
        ConfigError: the file is unreadable, not YAML, larger than MAX_BYTES, or has more than MAX_ALIASES
            aliases or MAX_DEPTH levels; a tag, a duplicate key, an unknown key (with the nearest known one),
            or a value of the wrong type. All problems with keys and values are reported together.
        MissingExtraError: PyYAML is not installed.
    """
    root = _compose(path)
    if root is None:
        return {}
    known = {field.name: field for field in dataclasses.fields(kind)}
    settings, problems = {}, []
    for key, value in _pairs(root, path):
        name, line = str(key.value).replace("-", "_"), f"{path}:{key.start_mark.line + 1}"
        if name in settings:
            problems.append(f"duplicate key {key.value!r} ({line})")
        elif name not in known:
            near = difflib.get_close_matches(name, [*known, *_SYNONYMS], 1, 0.4)
            hint = (
                f"; did you mean {_SYNONYMS.get(near[0], near[0])!r}?"
                if near
                else f"; known: {', '.join(known)}"
            )
            problems.append(f"unknown key {key.value!r} ({line}){hint}")
        else:
            settings[name], problem = _convert(value, known[name])
            if problem:
                problems.append(f"{key.value} {problem} ({line})")
    if problems:
        raise ConfigError("; ".join(problems))
    return settings


def _compose(path: str):
    """Parse the file into YAML nodes: no objects are constructed, so a tag cannot run code."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError.of("a YAML config", "cli") from error
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"config {path}: larger than {MAX_BYTES // 1024} KiB")
    try:
        _refuse_bombs(yaml.parse(data, yaml.SafeLoader), path)
        return yaml.compose(data, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_bombs(events, path: str) -> None:
    """Count aliases and levels in the event stream, before anything is built from it."""
    import yaml

    aliases = depth = 0
    for event in events:
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > MAX_ALIASES or depth > MAX_DEPTH:
            raise ConfigError(f"config {path}: more than {MAX_ALIASES} aliases or {MAX_DEPTH} levels")


def _pairs(root, path: str) -> list:
    import yaml

    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config {path}: expected `key: value` lines")
    return root.value


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 2e-05, valid in JSON but a string in YAML 1.1
_TAGS = {"int": int, "float": float, "str": str, "bool": lambda text: text.lower() in ("true", "yes", "on")}


def _convert(node, field: dataclasses.Field) -> tuple[Any, str]:
    """Convert a node to the type of the field; returns the value, or None and what is wrong."""
    import yaml

    if isinstance(node, yaml.SequenceNode) and "tuple" in str(field.type):
        return _convert_list(node, field)
    if not isinstance(node, yaml.ScalarNode):
        return None, f"must be {expected_type(field)}, got a list or a mapping"
    kind = node.tag.rpartition(":")[2]
    if kind == "null" and field.default is None:
        return None, ""
    allowed = _allowed(field)
    if kind == "int" and "float" in allowed:
        kind = "float"
    if kind == "str" and node.style is None and "float" in allowed and _EXPONENT.fullmatch(node.value):
        kind = "float"
    if "str" in allowed and kind in ("int", "float", "bool", "timestamp"):
        kind = "str"  # a folder may be named 2024
    if kind not in allowed or not node.tag.startswith("tag:yaml.org,2002:"):
        return None, f"must be {expected_type(field)}, got {node.value!r}"
    try:
        value = _TAGS[kind](node.value)
    except ValueError:
        return None, f"must be {expected_type(field)}, got {node.value!r}"
    return ((value,) if "tuple" in str(field.type) else value), ""


def _convert_list(node, field: dataclasses.Field) -> tuple[Any, str]:
    import yaml

    whole = "int" in str(field.type)
    if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return None, f"must be a list of {'whole numbers' if whole else 'names'}"
    try:
        return tuple(int(item.value) if whole else item.value for item in node.value), ""
    except ValueError:
        return None, "must be a list of whole numbers"


def _allowed(field: dataclasses.Field) -> list[str]:
    return [name for name in _TAGS if name in str(field.type)]


def expected_type(field: dataclasses.Field) -> str:
    """The type of a field, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
    return words[_allowed(field)[0]]
