"""A model that says any text on demand: each token names its successor.

A script's pieces are tokens of their own, and the chat template ends a prompt with the token that
begins the script whose name the last message holds. The model mixes nothing: its embeddings are
one-hot, attention and experts add nothing, and the head gives each token's successor the best
logit. So tools, reasoning and grammars are tested on text that no small model would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from engine.batch import Batch
from tests.doubles.byte_tokenizer import VOCAB_SIZE, add_tokenizer
from tests.doubles.checkpoints import make_mixtral

END_ID = 2
LOGIT = 20.0
# Qwen's, in short: tools in the system's message, calls and answers of them as Hermes has them
TEMPLATE = """{% if tools %}<|turn|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools></s>{% endif %}\
{% for m in messages %}<|turn|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</s>{% endfor %}<|turn|>assistant
"""


class Script:
    """What a model says. `pieces` are its tokens, text or the literals of special tokens."""

    def __init__(self, scripts: Mapping[str, Sequence[str]], special: Sequence[str] = ()) -> None:
        self.scripts = scripts
        self.special = special
        self.successors: dict[int, int] = {}
        self.vocab_size = VOCAB_SIZE

    def write(self, folder: Path, template: str = TEMPLATE) -> Path:
        """The tokenizer and chat template of such a model into a folder."""
        add_tokenizer(folder)
        made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.add_special_tokens(list(self.special))
        branches = ""
        for number, (name, pieces) in enumerate(self.scripts.items()):
            words = [f"<|begin{number}|>", *pieces]
            ids = [self._token(made, word) for word in words]
            assert not set(ids) & set(self.successors), f"{name}: a piece is in another script too"
            self.successors |= dict(zip(ids, [*ids[1:], END_ID], strict=True))
            test = f"{name!r} in messages[-1].content"
            branches += f"{{% {'elif' if branches else 'if'} {test} %}}<|begin{number}|>"
        made.save(str(folder / "tokenizer.json"))
        self.vocab_size = made.get_vocab_size()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = template + branches + ("{% endif %}" if branches else "")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if not (folder / "config.json").exists():
            (folder / "config.json").write_text('{"model_type": "mixtral"}')
        return folder

    @staticmethod
    def _token(made: tokenizers.Tokenizer, word: str) -> int:
        if word.startswith("<|begin"):
            made.add_special_tokens([word])
        elif made.token_to_id(word) is None:
            made.add_tokens([AddedToken(word, special=False, normalized=False)])
        found = made.token_to_id(word)
        assert found is not None
        return int(found)

    def checkpoint(self, folder: Path, template: str = TEMPLATE, **fields: Any) -> Path:
        """The whole model's directory."""
        self.write(folder, template)
        size = -(-self.vocab_size // 16) * 16
        given = {"vocab_size": size, "hidden_size": size, "max_position_embeddings": 4096}
        config = given | {"num_hidden_layers": 1, "tie_word_embeddings": False} | fields
        make_mixtral(folder, **config)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("embed_tokens.weight"):
                tensor.copy_(torch.eye(size))
            elif name.endswith("lm_head.weight"):
                tensor.zero_()
                for token, following in self.successors.items():
                    tensor[following, token] = 1.0
            elif "o_proj" in name or "w2" in name or "down_proj" in name:
                tensor.zero_()
            elif "norm" in name:
                tensor.fill_(1.0)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    def compute(self) -> Successors:
        """In the runner's place, without a checkpoint. `write` comes first."""
        return Successors(self.successors, self.vocab_size)


class Successors:
    """engine.runner.Runner's place: the logits of the token that follows."""

    def __init__(self, successors: Mapping[int, int], vocab_size: int) -> None:
        self._successors = successors
        self._vocab_size = vocab_size

    def step(self, batch: Batch, layer_ready: Callable[[int], None] | None = None) -> torch.Tensor:
        last = batch.token_ids[batch.logits_rows].tolist()
        logits = torch.zeros(len(last), self._vocab_size)
        for row, token in enumerate(last):
            logits[row, self._successors.get(token, END_ID)] = LOGIT
        return logits
