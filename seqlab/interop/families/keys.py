"""The keys of a published config.json: each is used, known to have no effect, or refused by name.

Silently ignoring a key could change the model, so a family reads every key through `Keys`, with transformers'
default, and ends with `done`.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from seqlab.checks import nearest
from seqlab.interop.folder import PretrainedError

# Without effect on the logits: tokens of texts, training, formats, generation, origin.
_WITHOUT_INFLUENCE = """
    model_type architectures dtype torch_dtype transformers_version name_or_path license tags language
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class
    prefix
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop dropout use_cache pretraining_tp
    gradient_checkpointing return_dict output_hidden_states output_attentions output_router_logits torchscript
    use_bfloat16 attn_implementation tie_encoder_decoder tf_legacy_loss pruned_heads finetuning_task
    id2label label2id num_labels problem_type task_specific_params keys_to_ignore_at_inference
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    max_new_tokens is_llama_config model_max_length
"""
_ANY = frozenset(_WITHOUT_INFLUENCE.split())
_ANY_PREFIXES = ("_", "unsloth", "transformers.")
# Values that all families require if given, since transformers' classes support no others.
_PLAIN: dict[str, Any] = {
    "is_causal": True,
    "is_decoder": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "use_bidirectional_attention": False,
    "per_layer_config": {},
    "rope_interleaved": False,
}
_REQUIRED = object()


class Keys:
    """Reader of a config.json, key by key.

    Args:
      described: the content of config.json.
      irrelevant: further keys without effect, of this family.

    Every reading method raises PretrainedError with the key, its value and what was expected.
    """

    def __init__(self, described: Mapping[str, Any], irrelevant: Sequence[str] = ()):
        self._given = dict(described)
        self._left = set(described) - _ANY - set(irrelevant)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` if the key is missing."""
        self._left.discard(name)
        return self._given.get(name, default)

    def has(self, name: str) -> bool:
        """Whether the key is present and not null."""
        return self._given.get(name) is not None

    def size(self, name: str, default: Any = _REQUIRED, most: int = 2**31 - 1) -> int:
        """A positive integer of at most `most`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise PretrainedError(f"{name}: got {value!r}, expected an integer from 1 to {most}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise PretrainedError(f"{name}: got {value!r}, expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise PretrainedError(f"{name}: got {value!r}, expected true or false")
        return value

    def expect(self, name: str, *values: Any) -> None:
        """Refuse every value but `values`; the key may be missing."""
        value = self.get(name, values[0])
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            raise PretrainedError(f"{name}: got {value!r}, expected {values[0]!r}: nothing else is supported")

    def done(self, architecture: str) -> None:
        """Refuse unread keys. `architecture` is the family's class in transformers."""
        for name, value in _PLAIN.items():
            if value is None:
                self.get(name)
            elif self.has(name):
                self.expect(name, value)
        _check_plain_weights(self.get("quantization_config"))
        if self.has("auto_map"):
            raise PretrainedError(
                "auto_map: the model has code of its own, which is not run; where it computes what the "
                "family does, "
                "remove this key"
            )
        named = self._given.get("architectures")
        if named and architecture not in named:
            raise PretrainedError(f"architectures: got {named!r}, expected ['{architecture}']")
        self.get("auto_map")
        left = self.unread()
        if left:
            known = sorted(set(self._given) - set(left))
            raise PretrainedError(
                f"{left[0]}: got {self._given[left[0]]!r}, and no {self._given.get('model_type')} has this "
                "key here: "
                "where it changes nothing, remove it"
                + nearest(left[0], known).partition(" Valid")[0].rstrip(".")
            )

    def unread(self) -> list[str]:
        """Unread keys that may have an effect; null values have none."""
        return sorted(
            name
            for name in self._left
            if self._given[name] is not None and not name.startswith(_ANY_PREFIXES)
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and name in self._given and default is _REQUIRED:
            raise PretrainedError(f"{name}: got null, expected a value")
        if value is None:
            value = default
        if value is _REQUIRED:
            raise PretrainedError(f"{name} is missing")
        return value


def _check_plain_weights(quantization: Any) -> None:
    """Refuse quantized weights. An entry of transformers about a GGUF file only describes the origin of the
    weights."""
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method != "gguf":
        raise PretrainedError(
            f"quantization_config: the weights are quantized ({method!r}), which is not supported: save "
            "them in "
            "float32, bfloat16 or float16"
        )
