"""The server's settings: one frozen dataclass, from defaults, a YAML file and flags, checked once.

A key of the file is a field's name is a flag (`max_running: 8` is --max-running 8). A KTransformers
file loads unchanged: the engine takes attn.page_size and attn.chunk_size from it; its kvc2 keys are
the daemon's, and its other sections are KTransformers' own. Not responsible for the model's
configuration (config.py).
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from engine.config import DTYPES
from kvc2.address import Address
from kvc2.errors import InvalidConfig, InvalidRequest
from kvc2.paths import user_path

PAGE_SIZE_MAX = 512
CLIENT_TIMEOUTS = ("header_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s")
# sections of a KTransformers file that say nothing to the engine
FOREIGN_SECTIONS = frozenset(
    {
        *("api", "assistant", "async_server", "db", "ext", "fileupload", "kvc2", "local_chat"),
        *("log", "long_context", "model", "prompts", "server", "user", "user_force_think", "web"),
    }
)


@dataclass(frozen=True)
class EngineConfig:
    """What `kvc2-engine serve` runs with. Raises InvalidConfig that names the field."""

    model: Path
    kvc2: str | None = None  # the daemon's address; None: no daemon, no hits
    host: str = "127.0.0.1"
    port: int = 30000  # 0: any free one
    dtype: str = "auto"
    page_size: int = 16  # tokens of a block
    chunk_size: int = 256  # tokens of a prefill chunk, a multiple of page_size
    num_pages: int | None = None  # of the KV pool; None: as kv_memory_gb says
    kv_memory_gb: float = 2.0  # of the KV pool, in 10^9 bytes
    max_running: int = 16  # requests in a batch
    max_queued: int = 256  # requests at once, running ones included; more are refused with 429
    token_budget: int | None = None  # tokens of a step; None: chunk_size + max_running
    threads: int = 0  # of the CPU kernels; 0: as many as there are cores
    tenant: str = ""  # of the daemon; empty: its default
    api_keys: Path | None = None  # YAML file, API key -> tenant; None: no key is asked for
    served_model_name: str | None = None  # None: the directory's name
    max_body_mb: float = 8.0
    parse_special_tokens: bool = False  # in the messages of a chat, by their literals
    load_timeout_s: float = 10.0  # a layer of a cached prefix that isn't there by then is computed
    header_timeout_s: float = 10.0  # a request's header is whole by then, or its connection ends
    body_timeout_s: float = 30.0  # how long its body may stall
    idle_timeout_s: float = 75.0  # how long a connection is kept between requests
    write_timeout_s: float = 30.0  # how long a client may leave unread what was sent
    max_connections: int = 1000  # beyond them only /health and /metrics are answered

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidConfig("dtype", self.dtype, f"must be auto, {' or '.join(DTYPES)}")
        size = self.page_size
        if not 1 <= size <= PAGE_SIZE_MAX or size & (size - 1):
            raise InvalidConfig("page_size", size, "must be a power of two from 1 to 512")
        if self.chunk_size < size or self.chunk_size % size:
            raise InvalidConfig("chunk_size", self.chunk_size, f"must be a multiple of {size}")
        self._at_least("max_running", 1)
        self._at_least("max_queued", 1)
        self._at_least("max_connections", 1)
        self._at_least("threads", 0)
        if self.num_pages is not None:
            self._at_least("num_pages", 2)
        for name in ("model", "api_keys"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, path_of(name, getattr(self, name)))
        if self.kvc2 is not None:
            try:
                Address.of_daemon(self.kvc2)
            except InvalidRequest as error:
                raise InvalidConfig("kvc2", self.kvc2, f"must be {error.allowed}") from error
        if not 0 <= self.port < 65536:
            raise InvalidConfig("port", self.port, "must be 0 to 65535")
        for name in ("kv_memory_gb", "max_body_mb", "load_timeout_s", *CLIENT_TIMEOUTS):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidConfig(name, getattr(self, name), "must be over 0")
        least = self.chunk_size + self.max_running
        if self.token_budget is not None and self.token_budget < least:
            mend = f"must be at least {least}, chunk_size + max_running"
            raise InvalidConfig("token_budget", self.token_budget, mend)
        if not is_loopback(self.host) and self.api_keys is None:
            mend = "only 127.0.0.1, ::1 or localhost may be served without api_keys"
            raise InvalidConfig("host", self.host, mend)
        self._check_name()

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise InvalidConfig(name, getattr(self, name), f"must be at least {least}")

    def _check_name(self) -> None:
        try:
            self.model_name.encode()
        except UnicodeEncodeError as error:  # a directory's name need be no text
            mend = "can't be written in UTF-8; give the model another name by --served-model-name"
            raise InvalidConfig("served_model_name", self.model_name, mend) from error

    @property
    def step_tokens(self) -> int:
        return self.token_budget or self.chunk_size + self.max_running

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def path_of(field: str, text: str | Path) -> Path:
    """An absolute path; a leading ~ is a home. Raises InvalidConfig."""
    try:
        return user_path(field, text)
    except InvalidRequest as error:
        raise InvalidConfig(field, str(text), f"must be {error.allowed}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service bound to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(config_file: Path | None, flags: Mapping[str, Any]) -> EngineConfig:
    """Defaults, overlaid by the file, overlaid by the flags that are not None. Raises
    InvalidConfig."""
    values = read_file(path_of("config", config_file)) if config_file is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if "model" not in values:
        raise InvalidConfig("model", None, "a model directory is needed (--model DIR)")
    return EngineConfig(**values)


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, ours or KTransformers', as EngineConfig's fields."""
    found = _read_mapping("config", path)
    attn = found.pop("attn", None)
    known = {field.name: str(field.type) for field in fields(EngineConfig)}
    values: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict) and key in FOREIGN_SECTIONS:
            continue
        if key not in known:
            if key in FOREIGN_SECTIONS:  # some of KTransformers' are plain values
                continue
            raise _unknown(key, known)
        values[key] = _typed(key, value, known[key])
    if attn is not None:
        if not isinstance(attn, dict):
            raise InvalidConfig("attn", attn, "must be a section with page_size and chunk_size")
        for key, value in attn.items():
            if key not in ("page_size", "chunk_size"):
                raise _unknown(f"attn.{key}", ("attn.page_size", "attn.chunk_size"))
            values[key] = _typed(f"attn.{key}", value, "int")
    return values


def read_api_keys(path: Path) -> dict[str, str]:
    """API key -> tenant. Raises InvalidConfig; never shows a key."""
    found = _read_mapping("api_keys", path)
    for key, tenant in found.items():
        if not isinstance(key, str) or not key or not isinstance(tenant, str):
            raise InvalidConfig(
                "api_keys", str(path), "must map keys to tenants' names, as strings"
            )
    if not found:
        raise InvalidConfig("api_keys", str(path), "holds no key, so that nobody could call")
    return found


def _read_mapping(field: str, path: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidConfig(field, str(path), f"can't be read: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidConfig(field, str(path), "must hold keys and values")
    return found


def _unknown(key: object, known: Any) -> InvalidConfig:
    close = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    nearest = f"; nearest: {close[0]}" if close else ""
    return InvalidConfig(str(key), "...", f"unknown key{nearest}")


def _typed(key: str, value: Any, kind: str) -> Any:
    """A value of the file as the field's type."""
    if value is None and "None" in kind:
        return None
    if "Path" in kind and isinstance(value, str):
        return Path(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if "float" in kind and type(value) in (int, float):
        return float(value)
    if "int" in kind and type(value) is int:
        return value
    if "str" in kind and isinstance(value, str):
        return value
    raise InvalidConfig(key, value, f"must be of type {kind}")
