"""GGUF files (llama.cpp): the configuration, the weights and the tokenizer of a model in one file.

The optional package `gguf` dequantizes the blocks. The file's metadata are translated to
a config.json and handled like one; unknown metadata are refused.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seqlab.checks import UserError
from seqlab.interop import gguf_file
from seqlab.interop.folder import Folder, PretrainedError
from seqlab.tokenizers import FileTokenizer

# GGUF architecture -> equivalent family.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_KEYS = {  # without the architecture prefix
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# These must equal the head width; otherwise it is another kind of model.
_SAME = ("attention.value_length", "rope.dimension_count")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizers by their GGUF names; None: GPT-2's.
_CUTS = {
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"\p{N}" + _REST,
}
_CONTROL, _USER = 3, 4  # kinds of tokens
_BLOCKS, _ROWS = 256, 128  # blocks in a row, and rows dequantized at a time
_PREFIXED = ("llama-bpe",)  # texts begin with bos by default


class GGUF(Mapping[str, np.ndarray]):
    """A GGUF file: `described` as a config.json, and its tensors in float32 by their published names, read on
    demand.

    Raises:
      PretrainedError: the package gguf is missing; the file is damaged, or of an architecture or with options
        that are not supported.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        try:
            import gguf
        except ImportError as error:
            raise PretrainedError(f"reading {path} needs the gguf package: pip install gguf") from error
        self._gguf = gguf
        try:
            self.fields, listed = gguf_file.read(self.path, gguf.GGML_QUANT_SIZES)
        except (ValueError, OSError, OverflowError, MemoryError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise PretrainedError(f"{self.path} is damaged or no GGUF file: {reason}") from error
        tensors = {tensor.name: tensor for tensor in listed}
        self.architecture = self.fields.get("general.architecture")
        self._tensors = {self._published(name): tensor for name, tensor in tensors.items()}
        self.described = self._describe()

    def _published(self, name: str) -> str:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if found is None or found.group(2) not in _NAMES:
            raise PretrainedError(f"{self.path}: tensor {name!r} has no place in a {self.architecture}")
        layer = "" if found.group(1) is None else f"model.layers.{found.group(1)}."
        return f"{layer}{_NAMES[found.group(2)]}.{found.group(3)}"

    def _describe(self) -> dict[str, Any]:
        if self.architecture not in _FAMILIES:
            raise PretrainedError(
                f"{self.path}: general.architecture: got {self.architecture!r}, expected one of "
                f"{', '.join(_FAMILIES)}"
            )
        front = self.architecture + "."
        given = {
            name.removeprefix(front): value for name, value in self.fields.items() if name.startswith(front)
        }
        described = {_KEYS[name]: value for name, value in given.items() if name in _KEYS}
        described["model_type"] = _FAMILIES[self.architecture]
        described["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        described.setdefault("rope_theta", 10_000.0)
        if "model.layers.0.self_attn.q_proj.bias" in self._tensors and self.architecture != "qwen2":
            described["attention_bias"] = True
        if "hidden_size" in described and "num_attention_heads" in described:
            described.setdefault("head_dim", described["hidden_size"] // described["num_attention_heads"])
        described.setdefault("vocab_size", len(self.fields.get("tokenizer.ggml.tokens", ())))
        if given.pop("rope.scaling.type", "none") != "none":
            raise PretrainedError(
                f"{self.path}: {front}rope.scaling.type: scaled positions are not supported"
            )
        for name, value in given.items():
            if name in _SAME and value == described.get("head_dim"):
                continue
            if name not in _KEYS and value not in (0, False, None):
                raise PretrainedError(f"{self.path}: {front}{name}: got {value!r}, which is not supported")
        return described

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            value = self._numbers(tensor).reshape(tensor.shape[::-1])
        except (ValueError, NotImplementedError, KeyError, TypeError) as error:
            raise PretrainedError(f"{self.path}: tensor {tensor.name} cannot be read: {error}") from error
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if self.architecture == "llama" and f"self_attn.{part}." in name:
                # llama.cpp turns neighbours, the published weights halves of a head
                pairs = value.reshape(self.described[heads], -1, 2, *value.shape[1:])
                value = pairs.swapaxes(1, 2).reshape(value.shape)
        return value

    def _numbers(self, tensor: gguf_file.Tensor) -> np.ndarray:
        """The numbers of a tensor, in one array and little more memory: a part of its blocks at a time, in
        long rows, since the package goes through rows in Python."""
        kind, blocks = self._gguf.GGMLQuantizationType(tensor.kind), tensor.count // tensor.block
        row = math.gcd(blocks, _BLOCKS)
        out = np.empty((blocks // row, math.prod(tensor.shape) // max(1, blocks // row)), np.float32)
        for begin in range(0, len(out), _ROWS):
            part = out[begin : begin + _ROWS]
            size = len(part) * row * tensor.block
            place = tensor.begin + begin * row * tensor.block
            stored = np.fromfile(self.path, np.uint8, size, offset=place).reshape(len(part), -1)
            part[:] = self._gguf.dequantize(stored, kind).reshape(part.shape)
        return out

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tokenizer(self) -> FileTokenizer:
        """The tokenizer: from a tokenizer.json next to the file, else from the file's own tokens if its
        pre-tokenizer is known.

        Raises:
          PretrainedError: neither is available.
        """
        text = {name.removeprefix("tokenizer."): value for name, value in self.fields.items()}
        text = {name.removeprefix("ggml."): value for name, value in text.items()}
        tokens = text.get("tokens") or []

        def written(name: str) -> str | None:
            number = text.get(name)
            return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None

        names = {"bos_token": written("bos_token_id"), "eos_token": written("eos_token_id")}
        settings: dict[str, Any] = {name: token for name, token in names.items() if token is not None}
        for edge in ("bos", "eos"):
            if isinstance(text.get(f"add_{edge}_token"), bool):
                settings[f"add_{edge}_token"] = text[f"add_{edge}_token"]
        if text.get("pre") in _PREFIXED:
            settings.setdefault("add_bos_token", True)
        ends = [text[name] for name in ("eos_token_id", "eot_token_id") if isinstance(text.get(name), int)]
        beside = Folder(self.path.parent).file("tokenizer.json")
        template = text.get("chat_template")
        try:
            return FileTokenizer(
                self.path if beside is None else beside,
                eos=ends or None,
                settings=settings,
                template=template if isinstance(template, str) else None,
                start=text.get("bos_token_id"),
                content=None if beside is not None else self._own(text, tokens),
            )
        except (ImportError, UserError) as error:
            raise PretrainedError(str(error)) from error

    def _own(self, text: Mapping[str, Any], tokens: list[str]) -> str:
        """The content of a tokenizer.json built from the file's own tokens."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        if text.get("model") != "gpt2" or text.get("pre") not in _CUTS:
            raise PretrainedError(
                f"{self.path} has a tokenizer of the kind {text.get('model')!r} ({text.get('pre')!r}), of "
                "which only "
                f"{', '.join(_CUTS)} can be made from it: put the model's tokenizer.json beside it"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in text.get("merges") or []]
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        cut = _CUTS[text["pre"]]
        if cut == "digits":
            first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
        else:
            first = [] if cut is None else [pre_tokenizers.Split(Regex(cut), "isolated")]
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))
        made.pre_tokenizer = pre_tokenizers.Sequence([*first, plain])
        made.decoder = decoders.ByteLevel()
        kinds = text.get("token_type") or []
        for token, kind in zip(tokens, kinds, strict=False):
            if kind == _CONTROL:
                made.add_special_tokens([AddedToken(token, normalized=False, special=True)])
            elif kind == _USER:
                made.add_tokens([AddedToken(token, normalized=False)])
        return made.to_str()
