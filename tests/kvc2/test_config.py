"""Configuration: every wrong key or value is named, with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvc2 import flags
from kvc2.commands import config_file
from kvc2.config import ServeConfig
from kvc2.errors import InvalidConfig
from tests import ROOT

CONFIGS = ROOT / "configs"

# As KTransformers ships it (ktransformers/configs/config.yaml): section names, the keys we read.
KTRANSFORMERS = """
log: {dir: logs, level: debug}
server: {ip: 0.0.0.0, port: 10002}
db: {type: sqllite}
user: {algorithm: HS256}
model: {type: balance_serve, device: "cuda:0"}
web: {mount: False}
ext: {cpu_infer: 10}
long_context: {max_seq_len: 32000, token_step: }
local_chat: {prompt_file: ""}
async_server: {kvc2_metrics_port: 54391}
attn:
  page_size: 256
  chunk_size: 256
kvc2:
  gpu_only: false
  utilization_percentage: 0.5
  cpu_memory_size_GB: 500
  disk_path: DISK
"""


TLS = {"certificate": "/c", "key": "/k", "client_ca": "/a"}
NAMED = {"name": "a", "secret_file": "/s", "certificate_names": ["a"]}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_of_configs_loads(path: Path) -> None:
    config_file.load(path, {})


def test_a_ktransformers_file_loads_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(KTRANSFORMERS.replace("DISK", str(tmp_path / "kv")))
    found = config_file.load(file, {})
    assert found.cpu.memory_bytes == 250 * 10**9 // 4096 * 4096
    assert found.disk.path == tmp_path / "kv"
    assert found.disk.size_bytes > 0
    assert (found.attn.page_size, found.attn.chunk_size) == (256, 256)
    assert not found.gpu_only


def test_gpu_only_means_no_arena_and_no_disk(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = KTRANSFORMERS.replace("gpu_only: false", "gpu_only: true")
    file.write_text(text.replace("DISK", str(tmp_path / "kv")))
    found = config_file.load(file, {})
    assert found.gpu_only
    assert found.disk.path is None


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cpu: {memory_size_gb: 8}\ndrain_timeout_s: 5\n")
    found = config_file.load(file, {"cpu": {"memory_size_gb": 9.0}})
    assert found.cpu.memory_size_gb == 9.0
    assert found.drain_timeout_s == 5.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lisen": "unix:/x"}, "lisen: unknown key; did you mean listen?"),
        ({"cpu": {"memory_gb": 1}}, "cpu.memory_gb: unknown key; did you mean memory_size_gb?"),
        ({"cpu": {"memory_size_gb": "much"}}, "cpu.memory_size_gb = 'much'"),
        ({"cpu": {"memory_size_gb": -1}}, "cpu.memory_size_gb = -1"),
        ({"cpu": {"memory_size_gb": float("nan")}}, "cpu.memory_size_gb = nan"),
        ({"cpu": 5}, "cpu = 5: a mapping"),
        ({"gpu_only": "yes"}, "gpu_only = 'yes': a value of type bool"),
        ({"metrics_port": True}, "metrics_port = True"),
        ({"write_policy": "bak"}, "write_policy = 'bak': one of behind, back, through"),
        ({"load_policy": "never"}, "load_policy = 'never': one of faster, always"),
        ({"eviction_policy": "lfu"}, "one of hazard, lru, arc, s3fifo"),
        ({"slab_bytes": 100_001}, "slab_bytes = 100001: a multiple of 4096"),
        ({"disk": {"size_gb": 5}}, "disk.size_gb = 5.0: only with disk.path"),
        ({"low_watermark": 0.2, "high_watermark": 0.1}, "high_watermark = 0.1: at least low"),
        ({"attn": {"page_size": 48}}, "attn.page_size = 48: a power of two"),
        ({"attn": {"page_size": 32, "chunk_size": 48}}, "attn.chunk_size = 48: a multiple"),
        ({"limits": {"max_sessions": 0}}, "limits.max_sessions = 0: 1 to 4096"),
        ({"tenants": [{"name": "a"}]}, "tenants.secret_file: a path, for a"),
        ({"tenants": [{"name": "../a", "secret_file": "x"}]}, "tenants.name = '../a'"),
        ({"tenants": [{"name": "default", "secret_file": "x"}]}, "none for default"),
        ({"tenants": [{"name": "default", "uids": [1]}]}, "tenants.uids = (1,): none for default"),
        ({"listen": "0.0.0.0:50051"}, "a public one needs TLS"),
        ({"listen": "example.org:50051"}, "a public one needs TLS"),
        ({"tls": {"key": "/k"}}, "tls.certificate: a path, with tls.key"),
        (
            {"listen": "0.0.0.0:1", "tls": {"key": "/k", "certificate": "/c"}},
            "tls.client_ca: a path, with tls.certificate; or token_file",
        ),
        ({"tls": {"client_ca": "/a"}}, "tls.certificate: a path, with tls.client_ca"),
        (
            {"tls": {"key": "/k", "certificate": "/c", "administrators": ["a"]}},
            "tls.administrators = ('a',): only with tls.client_ca",
        ),
        ({"listen": "0.0.0.0:1", "token_file": "/t"}, "a public one needs TLS"),
        (
            {"listen": "unix:/k", "token_file": "/t"},
            "token_file = '/t': only with listen on HOST:PORT",
        ),
        (
            {
                "listen": "127.0.0.1:1",
                "token_file": "/t",
                "tenants": [{"name": "administrator", "secret_file": "/s"}],
            },
            "tenants.name = 'administrator': another name",
        ),
        (
            {"listen": "unix:/k", "tls": TLS},
            "tls.certificate = '/c': only with listen on HOST:PORT",
        ),
        ({"listen": "0.0.0.0:1", "tls": TLS}, "tls.administrators = (): a name, here or in"),
        ({"tls": {"administrators": ["a"]}}, "tls.administrators = ('a',): only with tls.client"),
        ({"tls": TLS | {"administrators": ["a\nb"]}}, "names of 1 to 256 printable ASCII"),
        ({"tls": TLS | {"administrators": "a"}}, "tls.administrators = 'a': a value of type"),
        ({"tenants": [NAMED]}, "tenants.certificate_names = ['a']: none without tls.client_ca"),
        ({"listen": "unix:/" + "x" * 120}, "unix:PATH of 1 to"),
        ({"listen": "127.0.0.1"}, "unix:PATH or HOST:PORT"),
    ],
)
def test_what_is_wrong_is_named(values: flags.Values, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        flags.build(ServeConfig, values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu_only", "gpu_onli", "kvc2.gpu_onli: unknown key; did you mean gpu_only?"),
        ("attn:", "atn:", "atn: unknown; did you mean attn?"),
        ("percentage: 0.5", "percentage: 50", "kvc2.utilization_percentage = 50.0"),
        ("page_size: 256", "page_size: 100", "attn.page_size = 100"),
    ],
)
def test_a_mistake_in_a_ktransformers_file_is_named(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(KTRANSFORMERS.replace("DISK", str(tmp_path)).replace(old, new, 1))
    with pytest.raises(InvalidConfig) as caught:
        config_file.load(file, {})
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n", "5", "a: [", "\x00", "1: 2", "a: !!python/object:x {}"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfig):
        config_file.load(file, {})
