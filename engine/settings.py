"""The server's settings: one frozen dataclass, from defaults, a YAML file and flags, checked once.

A field is all there is of a flag: its key in the file, its option, help and errors are made of it
(kvc2/flags.py). A KTransformers file loads unchanged: the engine takes attn.page_size and
attn.chunk_size from it; its kvc2 keys are the daemon's, and its other sections are KTransformers'
own. Not responsible for the model's configuration (config.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine import spellings
from kvc2 import flags
from kvc2.errors import InvalidConfig
from kvc2.flags import (
    Flag,
    Values,
    above,
    at_least,
    between,
    check,
    matching,
    power_of_two,
    refused_as,
)
from kvc2.host import machine
from kvc2.host.address import Address
from kvc2.host.loopback import is_loopback
from kvc2.host.paths import user_path

Dtype = Literal["auto", "bfloat16", "float32"]
ExpertDtype = Literal["auto", "bf16", "int8", "int4", "int4-group128", "fp8"]
PlacementStrategy = Literal["uniform", "frequency", "front-loading", "random"]
CpuIsa = Literal["auto", "portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]
ToolFormat = Literal[
    "auto",
    "deepseek",
    "deepseek-v3.2",
    "glm",
    "harmony",
    "hermes",
    "kimi",
    "minimax",
    "mistral",
    "qwen3-coder",
    "template",
]
DEVICE = Flag(
    "Of model and pool; auto: CUDA, if found, which no GPU has run yet.",
    matching(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"),
)
PAGE_SIZE_MAX = 512
KV_MEMORY_GB = 2.0
THREADS_MAX = 1024  # more is a mistake; csrc/bindings/kernels.cpp refuses it too
EXPERT_FILES = (".json", ".safetensors")  # of counts of choices
# sections of a KTransformers file that say nothing to the engine
FOREIGN_SECTIONS = frozenset(
    {
        *("api", "assistant", "async_server", "db", "ext", "fileupload", "kvc2", "local_chat"),
        *("log", "long_context", "model", "prompts", "server", "user", "user_force_think", "web"),
    }
)


GRAPHS = Flag(
    "Decode steps of so many requests are captured as CUDA graphs when they first come; of fewer "
    "requests the next larger one is taken, of more none. off: none. On a CPU there are none.",
    matching(r"auto|off|[1-9]\d{0,3}(,[1-9]\d{0,3})*", "auto, off, or numbers by commas"),
    shown="1, 2, 4, 8 and so on, up to --max-running",
    example="1,2,4,8,16",
)
STRETCH = Flag(
    "How many times as long as without it a step with decodes may take for what it prefills.",
    above(1),
)
SPLIT_PAGES = Flag(
    "On CUDA attention sums a context so many pages at a time, whatever else is in the batch. It "
    "changes bits: KV is shared with engines of the same number only. 0: as the GPU is free, which "
    "is faster for few long contexts.",
    at_least(0),
)
HOST_MEMORY = Flag(
    "Host memory for KV and cold experts together, 10^9 bytes, without the daemon's arena. It "
    "moves between both by what each saves; --kv-memory-gb or --expert-memory-gb fixes one.",
    above(0),
    shown="each as it is given",
)


@dataclass(frozen=True)
class EngineConfig:
    """What `kvc2-engine serve` runs with. Raises InvalidConfig that names the field."""

    model: Annotated[
        Path,
        Flag(
            "Hugging Face directory of safetensors, with its tokenizer.",
            shown="none; it is needed",
            example="~/models/mixtral",
        ),
    ]
    kvc2: Annotated[
        str | None,
        Flag(
            "The cache daemon, unix:PATH (~ is a home) or HOST:PORT.",
            shown="no cache",
            example="unix:/run/user/1000/kvc2/kvc2.sock",
        ),
    ] = None
    host: Annotated[str, Flag("Address; one beyond loopback needs --api-keys.")] = "127.0.0.1"
    port: Annotated[int, Flag("Port; 0: any free one.", between(0, 65535))] = 30000
    device: Annotated[str, DEVICE] = "cpu"
    dtype: Annotated[Dtype, Flag("Of weights and KV; auto: the checkpoint's.")] = "auto"
    expert_dtype: Annotated[
        ExpertDtype, Flag("Of experts: bf16 (--dtype), or quantised; auto: the checkpoint's.")
    ] = "auto"
    expert_cache: Annotated[
        str,
        Flag("Keeps quantised experts for the next start; off: none.", shown="in the user's cache"),
    ] = ""
    page_size: Annotated[int, Flag("Tokens of a block.", power_of_two(PAGE_SIZE_MAX))] = 16
    chunk_size: Annotated[
        int, Flag("Tokens of a prefill chunk, a multiple of the page size.", at_least(1))
    ] = 256
    mixed_chunk_size: Annotated[
        int, Flag("Tokens that a step with decodes prefills at most.", at_least(1))
    ] = 256
    mixed_step_stretch: Annotated[float, STRETCH] = 2.5
    num_pages: Annotated[
        int | None, Flag("Pages of the KV pool.", at_least(2), shown="what --kv-memory-gb holds")
    ] = None
    kv_memory_gb: Annotated[
        float | None,
        Flag("The KV pool, beside the weights, 10^9 bytes.", above(0), shown="2"),
    ] = None
    gpu_memory_gb: Annotated[
        float | None,
        Flag(
            "Device memory for KV and hot experts together, 10^9 bytes. Divided by what "
            "--expert-statistics shows that each saves, if the most chosen are hot "
            "(--expert-placement-strategy frequency); --kv-memory-gb or --gpu-experts-ratio fixes "
            "one of them.",
            above(0),
            shown="each as it is given",
        ),
    ] = None
    host_memory_gb: Annotated[float | None, HOST_MEMORY] = None
    max_running: Annotated[int, Flag("Requests in a batch.", at_least(1))] = 16
    cuda_graph_sizes: Annotated[str, GRAPHS] = "auto"
    attention_split_pages: Annotated[int, SPLIT_PAGES] = 0
    max_queued: Annotated[
        int, Flag("Requests at once, running ones included; more get 429.", at_least(1))
    ] = 256
    token_budget: Annotated[
        int | None, Flag("Tokens of one step.", shown="the least, chunk size + max running")
    ] = None
    threads: Annotated[
        int,
        Flag("CPU threads; 0: one for each CPU allowed to this process.", between(0, THREADS_MAX)),
    ] = 0
    num_gpu_experts: Annotated[
        int | None,
        Flag(
            "Experts on the device, so many a layer times the layers; the others are computed by "
            "the CPU from its memory.",
            at_least(0),
            shown="all",
        ),
    ] = None
    gpu_experts_ratio: Annotated[
        float | None,
        Flag("The same as a part of all experts.", between(0, 1), shown="all"),
    ] = None
    expert_placement_strategy: Annotated[
        PlacementStrategy,
        Flag("Which they are; frequency takes the most chosen of --init-expert-location."),
    ] = "uniform"
    expert_placement_seed: Annotated[int, Flag("Of the strategy random.", at_least(0))] = 42
    init_expert_location: Annotated[
        Path | None,
        Flag(
            "How often each was chosen: --expert-statistics' file of an earlier run, or a .pt of "
            "SGLang or KTransformers with logical_count.",
            shown="--expert-statistics' own, if there is one",
        ),
    ] = None
    expert_statistics: Annotated[
        Path | None,
        Flag(
            "Counts of choices, .json or .safetensors: added to at the end and by POST "
            "/experts/save.",
            shown="not kept",
        ),
    ] = None
    enable_dynamic_expert_update: Annotated[
        bool, Flag("Experts move to the device while serving, by what is chosen.")
    ] = False
    expert_copies_per_s: Annotated[
        float, Flag("At most so many of them a second, on the mean.", above(0))
    ] = 100.0
    expert_memory_gb: Annotated[
        float | None,
        Flag(
            "Memory for cold experts, 10^9 bytes: the others stay in the checkpoint's files and "
            "are read when they are needed or soon.",
            above(0),
            shown="all of them",
        ),
    ] = None
    gpu_prefill_token_threshold: Annotated[
        int | None,
        Flag(
            "In a step of so many tokens the cold experts are copied to the device and computed "
            "there, a layer's while the layer before is; beside the hot experts it holds one "
            "layer's.",
            at_least(1),
            shown="never",
        ),
    ] = None
    max_deferred_experts_per_token: Annotated[
        int,
        Flag(
            "So many of a token's experts, the least weighed, are added one layer later, so that "
            "the CPU computes them beside the next attention. It changes the answers: KV is "
            "shared with engines of the same number only. 0: none.",
            at_least(0),
        ),
    ] = 0
    expert_nodes: Annotated[
        int,
        Flag(
            "Parts of each expert's inner size, one a NUMA node, whose threads read their own "
            "memory. Other bits: KV is shared with engines of the same number only.",
            between(1, 64),
        ),
    ] = 1
    device_threads: Annotated[
        int | None,
        Flag(
            "Of the CPU threads, those that play the device for the hot experts.",
            between(1, THREADS_MAX),
            shown="half",
        ),
    ] = None
    cpu_isa: Annotated[
        CpuIsa, Flag("Instruction set of the kernels; auto: the best that this machine has.")
    ] = "auto"
    share_unlike_cpus: Annotated[
        bool,
        Flag(
            "Share KV with other engines that have this flag, whose CPUs compute other bits.",
            shown="only with CPUs that compute the same bits",
        ),
    ] = False
    tenant: Annotated[str, Flag("The daemon's tenant for callers.", shown="default")] = ""
    api_keys: Annotated[
        Path | None,
        Flag("YAML file, API key to tenant; a request needs a key then.", shown="none"),
    ] = None
    served_model_name: Annotated[
        str | None, Flag("The model's name in the API.", shown="the directory's")
    ] = None
    max_body_mb: Annotated[float, Flag("Largest request body, 10^6 bytes.", above(0))] = 8.0
    access_log: Annotated[bool, Flag("Log a line for each request.", shown="off")] = False
    cors_origins: Annotated[
        str, Flag("Origins whose pages may ask, by commas; *: all.", shown="none")
    ] = ""
    drain_timeout_s: Annotated[
        int, Flag("For answers under way when it is told to stop, seconds.", at_least(1))
    ] = 5
    strict_fields: Annotated[
        bool, Flag("Refuse a body's unknown fields.", shown="they are ignored, logged once")
    ] = False
    tool_format: Annotated[
        ToolFormat, Flag("How the model writes calls of tools; auto: as its template shows.")
    ] = "auto"
    parse_special_tokens: Annotated[
        bool, Flag("Take literals as <|im_end|> in chats for control tokens.", shown="no")
    ] = False
    load_timeout_s: Annotated[
        float, Flag("A cached layer not there by then is computed, seconds.", above(0))
    ] = 10.0
    header_timeout_s: Annotated[
        float, Flag("A request's header is whole by then, seconds.", above(0))
    ] = 10.0
    body_timeout_s: Annotated[
        float, Flag("How long its body may stall, seconds, and 1 s for 10 kB of it.", above(0))
    ] = 30.0
    idle_timeout_s: Annotated[
        float, Flag("How long a connection is kept between requests, seconds.", above(0))
    ] = 75.0
    write_timeout_s: Annotated[
        float, Flag("How long a client may leave its answer unread, seconds.", above(0))
    ] = 30.0
    max_connections: Annotated[
        int, Flag("Beyond them only /health and /metrics are answered.", at_least(1))
    ] = 1000

    def __post_init__(self) -> None:
        check(self)
        if self.chunk_size % self.page_size:
            allowed = f"a multiple of page_size, {self.page_size}"
            raise InvalidConfig("chunk_size", self.chunk_size, allowed)
        least = self.chunk_size + self.max_running
        if self.token_budget is not None and self.token_budget < least:
            allowed = f"at least {least}, chunk_size + max_running"
            raise InvalidConfig("token_budget", self.token_budget, allowed)
        rows = graph_rows(self)
        if rows and rows[-1] > self.step_tokens:
            allowed = f"at most {self.step_tokens}, the tokens of a step"
            raise InvalidConfig("cuda_graph_sizes", self.cuda_graph_sizes, allowed)
        _check_experts(self)
        if self.kvc2 is not None:
            with refused_as("kvc2", self.kvc2):
                Address.of_daemon(self.kvc2)
        with refused_as("expert_cache", self.expert_cache):
            expert_directory(self)
        if not is_loopback(self.host) and self.api_keys is None:
            allowed = "only 127.0.0.1, ::1 or localhost may be served without api_keys"
            raise InvalidConfig("host", self.host, allowed)
        _check_name(self)

    @property
    def cpu_threads(self) -> int:
        """--threads, or what this process may use."""
        return self.threads or min(machine.cpus(), THREADS_MAX)

    @property
    def kv_bytes(self) -> int:
        """Of the pool, where --num-pages doesn't say it."""
        return int((KV_MEMORY_GB if self.kv_memory_gb is None else self.kv_memory_gb) * 1e9)

    @property
    def fixes_hot_experts(self) -> bool:
        """How many are on the device is given."""
        return self.num_gpu_experts is not None or self.gpu_experts_ratio is not None

    @property
    def places_experts(self) -> bool:
        """Some may be cold."""
        return self.fixes_hot_experts or self.gpu_memory_gb is not None

    @property
    def step_tokens(self) -> int:
        return self.token_budget or self.chunk_size + self.max_running

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name


def graph_rows(config: EngineConfig) -> tuple[int, ...]:
    """Of --cuda-graph-sizes, ascending."""
    if config.cuda_graph_sizes == "off":
        return ()
    if config.cuda_graph_sizes == "auto":
        powers = (1 << n for n in range(config.max_running.bit_length()))
        return tuple(sorted({*powers, config.max_running}))
    return tuple(sorted({int(rows) for rows in config.cuda_graph_sizes.split(",")}))


def experts_on_disk(config: EngineConfig) -> bool:
    """Memory need not hold all of them."""
    return config.expert_memory_gb is not None or config.host_memory_gb is not None


def pages_ahead(config: EngineConfig) -> int:
    """Of two steps, so that a grant of pages is there before it is needed."""
    return 2 * -(-config.step_tokens // config.page_size) + config.max_running


def _check_experts(config: EngineConfig) -> None:
    """The rules between flags of experts. Raises InvalidConfig."""
    if config.num_gpu_experts is not None and config.gpu_experts_ratio is not None:
        mend = "give this or num_gpu_experts, not both"
        raise InvalidConfig("gpu_experts_ratio", config.gpu_experts_ratio, mend)
    known = config.init_expert_location or config.expert_statistics
    if config.expert_placement_strategy == "frequency" and known is None:
        mend = "needs counts: --init-expert-location or --expert-statistics"
        raise InvalidConfig("expert_placement_strategy", "frequency", mend)
    if config.enable_dynamic_expert_update and not config.places_experts:
        mend = "needs --num-gpu-experts or --gpu-experts-ratio: else all are on the device"
        raise InvalidConfig("enable_dynamic_expert_update", True, mend)
    tokens = config.gpu_prefill_token_threshold
    if tokens is not None and not config.places_experts and not experts_on_disk(config):
        mend = "needs --num-gpu-experts or --gpu-experts-ratio: else all are on the device"
        raise InvalidConfig("gpu_prefill_token_threshold", tokens, mend)
    if config.host_memory_gb is not None and config.gpu_memory_gb is not None:
        mend = "KV is the device's with --gpu-memory-gb: give --expert-memory-gb instead"
        raise InvalidConfig("host_memory_gb", config.host_memory_gb, mend)
    if config.expert_dtype not in ("auto", "bf16") and experts_on_disk(config):
        by = "host" if config.expert_memory_gb is None else "expert"
        mend = f"is not read from disk: leave out --{by}-memory-gb, or take bf16"
        raise InvalidConfig("expert_dtype", config.expert_dtype, mend)
    for field in ("init_expert_location", "expert_statistics"):
        path: Path | None = getattr(config, field)
        endings = EXPERT_FILES if field == "expert_statistics" else (*EXPERT_FILES, ".pt")
        if path is not None and path.suffix not in endings:
            allowed = f"a file that ends with {', '.join(endings)}"
            raise InvalidConfig(field, str(path), allowed)


def _check_name(config: EngineConfig) -> None:
    try:
        config.model_name.encode()
    except UnicodeEncodeError as error:  # a directory's name need be no text
        mend = "can't be written in UTF-8; give the model another name by --served-model-name"
        raise InvalidConfig("served_model_name", config.model_name, mend) from error


def expert_directory(config: EngineConfig) -> Path | None:
    """Of --expert-cache, or the user's; None where nothing is kept."""
    if config.expert_cache == "off":
        return None
    if config.expert_cache:
        return user_path("expert_cache", config.expert_cache)
    kept = cache_directory()
    return None if kept is None else kept / "experts"


@dataclass(frozen=True)
class AttnSection:
    """The section `attn` of a KTransformers file."""

    page_size: int | None = None
    chunk_size: int | None = None


def cache_directory() -> Path | None:
    """Of this user, for what can be made again. None for one who has no home and no
    XDG_CACHE_HOME."""
    import platformdirs

    try:
        return platformdirs.user_cache_path("kvc2")
    except RuntimeError:
        return None


def load(config_file: Path | None, over: Values) -> EngineConfig:
    """Defaults, overlaid by the file, overlaid by `over`. Raises InvalidConfig."""
    values = read_file(config_file) if config_file is not None else {}
    return flags.build(EngineConfig, flags.overlay(values, over))


def read_file(path: Path) -> Values:
    """The settings in a YAML file, ours or KTransformers'. Raises InvalidConfig."""
    found = flags.read("config", path)
    attn = found.pop("attn", None)
    found = spellings.keys(found)
    known = {each.name for each in flags.fields_of(EngineConfig)}
    values = {
        key: value
        for key, value in found.items()
        if not (key in FOREIGN_SECTIONS and (isinstance(value, dict) or key not in known))
    }
    if attn is not None:
        section = flags.build(AttnSection, flags.mapping("attn", attn), "attn")
        values |= {key: value for key, value in asdict(section).items() if value is not None}
    return values
