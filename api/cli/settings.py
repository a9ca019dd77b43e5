"""Where settings come from, in one place: flags, then the environment, then a YAML file, then the defaults.

A setting has one name in all of them. `engine.max_num_seqs` is `max_num_seqs` under `engine:` in the file,
`VLM_SERVE_MAX_NUM_SEQS` in the environment and `--max-num-seqs` on the command line; those of `ingest` carry
its name (`VLM_SERVE_INGEST_WORKERS`, `VLM_SERVE_INGEST_LIMITS_CPU_SECONDS`).
"""

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlm_serve.config import GIB, MIB, Settings
from vlm_serve.errors import ConfigurationError

PREFIX = "VLM_SERVE_"
MAY_BE_ZERO = ("port", "speculative_tokens")
DTYPES = ("auto", "float32", "bfloat16", "float16")

SHIPPED_ADAPTER = Path(__file__).parent.parent.parent / "adapters" / "radiology"
"""That of the embedded default, in a clone of the repository: served with it where no others are asked for."""

_UNITS = {"": 1, "b": 1, "kib": 1024, "mib": MIB, "gib": GIB, "kb": 1000, "mb": 1000**2, "gb": 1000**3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?(?=\s*%)|\d*\.\d+)\s*(%?)")
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `512 MiB`, `1.5GB` or `1073741824`.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match.group(2).lower() not in _UNITS:
        raise ValueError("a size such as 2GiB, 512MiB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def parse_memory(text: str) -> int | float:
    """Bytes as `parse_size` reads them, or a share of a device's memory: `0.8` or `80%` is the float 0.8. A number with
    a point and without a unit is a share; 1 is a byte.

    Raises:
        ValueError: neither, or a share that is not above 0 and at most 1.
    """
    match = _SHARE.fullmatch(text.strip())
    try:
        if match is None:
            return parse_size(text)
        share = float(match.group(1)) / (100 if match.group(2) else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError("a size such as 2GiB, or on a GPU a share such as 0.8 or 80%")
    return share


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of `Settings`: its path (`engine`, `block_size`) and how its value is read."""

    path: tuple[str, ...]
    parse: Callable[[Any], Any]

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        words = self.path if self.path[0] == "ingest" else self.path[1:]
        return PREFIX + "_".join(words).upper()


def settings_table(cls: type[Any] = Settings, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every leaf of the settings, nested ones included."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint, here = hints[field.name], (*path, field.name)
        if is_dataclass(hint):
            yield from settings_table(typing.cast(type[Any], hint), here)
        else:
            yield Setting(here, _parser(field.name, hint))


def _parser(name: str, hint: Any) -> Callable[[Any], Any]:
    """Reads a value of a file, of the environment or of a flag; raises ValueError that says what it must be."""
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    kind = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint

    def parse(value: Any) -> Any:
        if optional and (value is None or value == ""):
            return None
        if kind is bool:
            if str(value).lower() not in _FLAGS:
                raise ValueError("true or false")
            return _FLAGS[str(value).lower()]
        if isinstance(value, bool | list | dict) or value is None:
            raise ValueError("a single value")
        if kind is Path:
            return Path(str(value)).expanduser()
        if kind is str:
            return str(value)
        if name == "kv_cache_memory":
            number = parse_memory(str(value))
        elif name.endswith("_bytes"):
            number = parse_size(str(value))
        else:
            number = _number(kind, str(value))
        if number < 0 or (number == 0 and name not in MAY_BE_ZERO):
            raise ValueError("above 0")
        return number

    return parse


def _number(kind: type, text: str) -> int | float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> Settings:
    """The settings of one process. `flags` maps names such as `engine.max_num_seqs` to what was typed.

    Raises:
        ConfigurationError: a file that cannot be read, an unknown name, or a value that has no meaning.
    """
    table = {setting.name: setting for setting in settings_table()}
    values: dict[str, Any] = {}
    for name, value in _from_file(file, table).items():
        values[name] = _parse(table[name], value, f"{name} in {file}")
    for setting in table.values():
        if setting.variable in environment:
            values[setting.name] = _parse(setting, environment[setting.variable], setting.variable)
    for name, value in flags.items():
        values[name] = _parse(table[name], value, "--" + name.rpartition(".")[2].replace("_", "-"))
    settings: Settings = _with_values(Settings(), values)
    shipped = (SHIPPED_ADAPTER / "adapter_config.json").is_file()
    if shipped and settings.model.model == "demo" and settings.model.adapters is None:
        settings = replace(settings, model=replace(settings.model, adapters=SHIPPED_ADAPTER))
    _check(settings)
    return settings


def _parse(setting: Setting, value: Any, origin: str) -> Any:
    try:
        return setting.parse(value)
    except ValueError as error:
        hint = ""
        if str(value).startswith("tcp://"):
            hint = " Kubernetes sets it for a service named vlm-serve; set enableServiceLinks: false in the pod."
        raise ConfigurationError(f"{origin} must be {error}.{hint}") from None


def _from_file(file: Path | None, table: Mapping[str, Setting]) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"The file of settings {file} cannot be read. Check --config.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"The file of settings {file} is not YAML{line}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"The file of settings {file} must hold sections: model, engine, ingest, server.")
    found = dict(_leaves(content, table))
    for name in found:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            remedy = f" Is {near[0]} meant?" if near else f" Known are {', '.join(table)}."
            raise ConfigurationError(f"Unknown setting {name} in {file}.{remedy}")
    return found


def _leaves(content: Mapping[Any, Any], table: Mapping[str, Setting], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and name not in table:
            yield from _leaves(value, table, name)
        elif value is None and any(known.startswith(f"{name}.") for known in table):
            continue  # a section left empty
        else:
            yield name, value


def _with_values(config: Any, values: Mapping[str, Any], path: str = "") -> Any:
    changes = {}
    for field in fields(config):
        name, current = f"{path}{field.name}", getattr(config, field.name)
        if is_dataclass(current):
            changes[field.name] = _with_values(current, values, f"{name}.")
        elif name in values:
            changes[field.name] = values[name]
    return replace(config, **changes)


def _check(settings: Settings) -> None:
    if settings.model.dtype not in DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, not {settings.model.dtype}.")
    if not 0 <= settings.server.port <= 65535:
        raise ConfigurationError("port must be between 0 and 65535; 0 takes a free one.")
    adapters = settings.model.adapters
    if adapters is not None and not adapters.is_dir():
        raise ConfigurationError(f"There is no folder {adapters}. --adapters takes a folder of adapter folders.")
