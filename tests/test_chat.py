"""Chat templates as transformers renders them, in a sandbox: a template is a stranger's program."""

import json
import pathlib

import pytest
from flax import nnx

import seqlab
from seqlab.interop.chat import ChatError, render
from seqlab.models import Attention, LanguageModel

pytest.importorskip("jinja2")
MESSAGES = [{"role": "user", "content": "a b"}]
CHATML = (  # the template of ChatML models, with the marks that transformers has for training
    "{% for message in messages %}\n    {%- if loop.first and message.role != 'system' %}<|s|>system {{ "
    "bos_token }}{% endif %}"
    "<|s|>{{ message['role'] }} {% generation %}{{ message['content'] | trim }}{% endgeneration %}<|e|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant{% endif %}"
)


def test_a_conversation_is_written_as_its_template_says():
    text = "<|s|>system <s><|s|>user a b<|e|>"
    assert render(CHATML, MESSAGES, names={"bos_token": "<s>"}) == text + "<|s|>assistant"
    assert render(CHATML, MESSAGES, names={"bos_token": "<s>"}, answer=False) == text
    listed = "{{ messages | tojson }}{% for m in messages %}{% break %}{% endfor %}{{ think }}"
    assert (
        render(listed, [{"role": "user", "content": "é<"}], think=1) == '[{"role": "user", "content": "é<"}]1'
    )


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ('{0.__class__}').format(messages) }}",
    "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "{% set x = messages.append(1) %}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
    "{{ range(10 ** 9) | list }}",
    "{{ namespace.__init__ }}{{ dict.__subclasses__() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_leave_its_sandbox(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChatError) as error:
        text = render(template, MESSAGES)
        raise ChatError(text) if text in ("", "\n") else AssertionError(text)
    assert "\n" not in str(error.value).strip()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            MESSAGES,
            "refuses these messages: roles must alternate",
        ),
        ("{% for %}", MESSAGES, "refuses these messages"),
        ("{{ messages[0].content + 1 }}", MESSAGES, "fails on these messages: TypeError"),
        (CHATML, "hello", "messages: got 'hello', expected a list"),
        (CHATML, [], "messages: got .*, expected a list"),
        (CHATML, [{"content": "x"}], r"messages\[0\]: got .* expected an object with a role"),
    ],
)
def test_what_cannot_be_written_is_refused(template, messages, message):
    with pytest.raises(ChatError, match=message):
        render(template, messages)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "text", "list"])
def test_a_loaded_model_has_its_chat_template(place, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<|s|>", "<|e|>", "system", "user", "assistant", "a", "b"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="b")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.add_special_tokens(words[:3])
    seqlab.save_pretrained(LanguageModel(8, 16, 1, Attention, rngs=nnx.Rngs(0)), tmp_path)
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>"}
    if place == "chat_template.jinja":
        pathlib.Path(tmp_path / place).write_text(CHATML)
    elif place == "chat_template.json":
        pathlib.Path(tmp_path / place).write_text(json.dumps({"chat_template": CHATML}))
    else:
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
        settings["chat_template"] = CHATML if place == "text" else several
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    run = seqlab.load(tmp_path)
    # nothing goes in front: the template has said it all
    assert run.chat(MESSAGES).tolist() == [1, 3, 0, 1, 4, 6, 7, 2, 1, 5]
    seqlab.save_pretrained(run.model, tmp_path / "again")
    assert seqlab.load(tmp_path / "again").chat(MESSAGES, answer=False).tolist() == [1, 3, 0, 1, 4, 6, 7, 2]
    with pytest.raises(ChatError, match="has no chat template"):
        run._replace(tokenizer=seqlab.ByteTokenizer()).chat(MESSAGES)
