"""A grammar of command lines: all commands, options, configs and fields, and the mistakes that people
make."""

import importlib
import random
import typing

# What people type.
WORDS = [
    "",
    " ",
    "é",
    "🙂",
    "\udce9",
    "a" * 3000,
    "-",
    "nowhere",
    "~nobody/x",
    "None",
    "()",
    "[",
    "1,2",
    "{}",
    "*",
    "%s",
]
INTEGERS = [
    *["1", "2", "3", "7", "8", "16", "40"] * 4,
    "0",
    "-1",
    "64",
    "1000000",
    "1e3",
    "2.5",
    str(2**31),
    str(2**63),
    str(-(2**70)),
]
NUMBERS = [
    *["0", "0.5", "0.9", "1.3"] * 3,
    "0",
    "0.5",
    "1",
    "1.0",
    "-1",
    "1e-9",
    "1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "x",
    "0,5",
    "1_0",
]
RUNS = ["run", "attention", "truncated", "zeroed", "bare", "hollow", "garbled", "list", "nothing", "stranger"]
RUNS += ["gated", "benched", "config_is_a_folder", "empty", "corpus", "corpus/1.txt", "published", "unknown"]
RUNS += [
    "binary.gguf",
    "latin1.txt",
    "nowhere",
    "rnu",
    "",
    ".",
    "~nobody",
    "/dev/null",
    "é",
    "\udce9",
    "nobody/nothing",
]
PATHS = [
    "corpus",
    "corpus/1.txt",
    "empty",
    "zero.txt",
    "latin1.txt",
    "nowhere",
    "binary.gguf",
    "~nobody/x",
    "",
    "/dev/null",
]
PATHS += ["series.csv", "broken.csv", "\udce9", "corpus/1.txt/x", "run", "a" * 300]
CACHES = [
    "full(2048)",
    "full",
    "full(8)",
    "window(16)",
    "sinks(4)+window(12)",
    "window(16)+int4",
    "window(0)",
    "int4",
]
CACHES += [
    "sinks(-1)+window(3)",
    "duo(0.75)",
    "duo(2)",
    "moba(4,2)",
    "full(64)+int8",
    "full(64)+int3",
    "winodw(8)",
    "",
    "+",
]
CACHES += [
    "window(16)+",
    "os:getcwd",
    "seqlab.models:Mamba",
    "window(16",
    "full(1e9)",
    "full(99999999999)",
    "absolute",
    "é",
]
PARTS = [
    "Mamba",
    "RMSNorm",
    "Attention",
    "MLP",
    "Linear",
    "Embedding",
    "LanguageModel",
    "Backbone",
    "mamba",
    "Mabma",
]
PARTS += [
    "seqlab.models.images:Pooling",
    "seqlab.train.text:Text",
    "os:getcwd",
    "os:nothing",
    ":x",
    "x:",
    "nowhere:x",
]
PARTS += [
    "seqlab.train.optim:adamw",
    "seqlab.train.optim:named",
    "optax:adam",
    "seqlab.train.step:next_token_loss",
]
PARTS += [
    "seqlab.train.quality:accuracy",
    "seqlab.train.vision:top1",
    "builtins:len",
    "seqlab.models:ShortConv",
    "bad:x",
]
FIDDLERS = [
    "tiny",
    "mixer(mamba)",
    "mixer(attention, heads=3)",
    "mixer(RMSNorm)",
    "mixer",
    "mixer(mamba, nothing=1)",
]
FIDDLERS += [
    "width(0)",
    "width(-5)",
    "width(x)",
    "width(7)",
    "longer(0)",
    "longer(-1)",
    "longer(3)",
    "stretch(0)",
    "stretch(3)",
]
FIDDLERS += [
    "stretch(2)",
    "accumulate(0)",
    "accumulate(3)",
    "remat",
    "scan_layers",
    "bf16",
    "tinny",
    "tiny(1)",
    "longer(2",
    "",
]
FIDDLERS += [
    "longer(factor=2)",
    "longer(2, 3)",
    "mixer('os:getcwd')",
    "é(1)",
    "longer(1.5)",
    "longer(None)",
    "longer(True)",
]
STDIN = [b"", b"hello\n", "caf\xe9\n".encode("latin-1"), b"\x00\xff" * 10, b"line\n\nline\n"]


def misspelt(rng: random.Random, word: str) -> str:
    """`word` with one slip of a finger."""
    if len(word) < 2:
        return word + "x"
    i = rng.randrange(len(word) - 1)
    slips = [
        word[:i] + word[i + 1 :],
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + "q" + word[i:],
    ]
    return rng.choice([*slips, word.upper(), word + " "])


class Grammar:
    """Command lines, drawn with a generator of random numbers."""

    def __init__(self, rng: random.Random):
        from seqlab import kernels
        from seqlab.train import config

        def specs(op: str):
            return importlib.import_module(f"seqlab.kernels.{op}.specs")

        self.rng, self.configs = rng, config.names()
        self.mild = False
        self.shapes = {
            op: [*typing.get_type_hints(type(next(iter(specs(op).BENCHMARKS.values()))))]
            for op in kernels.__all__
        }
        self.fields = {
            name: sorted(config._leaves(config.tree(config.load(name), defaults=True)))
            for name in self.configs
        }

    def some(self, *choices: list[str]) -> str:
        return self.rng.choice(self.rng.choice(choices))

    def maybe(self, share: float, *words: str) -> list[str]:
        return list(words) if self.rng.random() < share * (1 - self.mild / 2) else []

    def command(self) -> list[str]:
        rng = self.rng
        self.mild = rng.random() < 0.6  # one mistake or none: the first of several hides the others
        kinds = {
            self.train: 34,
            self.stream: 22,
            self.compare: 8,
            self.eval: 8,
            self.cache_bench: 8,
            self.export: 5,
        }
        kinds |= {self.show: 3, self.bench: 9, self.other: 3}
        line = rng.choices(list(kinds), list(kinds.values()))[0]()
        if rng.random() < 0.08 and not self.mild:  # a slip somewhere
            i = rng.randrange(len(line))
            change = rng.randrange(4)
            line[i : i + 1] = [[misspelt(rng, line[i])], [], [line[i], line[i]], [self.some(WORDS)]][change]
        if rng.random() < 0.03:
            rng.shuffle(line)
        return self.maybe(0.02, "--traceback")[:0] + line

    def config(self) -> str:
        rng = self.rng
        if self.mild or rng.random() < 0.7:
            return rng.choice(["lm_mamba", "lm_attention", "demo", "lm_hybrid", *self.configs])
        extra = [
            "mine.py",
            "bad.py",
            "none.py",
            "nowhere.py",
            "corpus",
            "./mine.py",
            "corpus/1.txt",
            "",
            "os",
            "../x.py",
        ]
        return rng.choice([*extra, misspelt(rng, rng.choice(self.configs)), self.some(WORDS)])

    def change(self, config: str) -> str:
        rng = self.rng
        paths = self.fields.get(config, ["model.dim", "model.mixers", "data.paths", "steps"])
        path = (
            rng.choice(paths)
            if rng.random() < 0.6
            else rng.choice(
                [
                    "model.norm",
                    "model.channel_mixer",
                    "model.mixers",
                    "model",
                    "loss",
                    "metric",
                    "optimizer",
                    "data",
                    "model.dim",
                ]
            )
        )
        if rng.random() < 0.12:
            path = rng.choice(
                [misspelt(rng, path), path + ".x", path + "[0]", path + "[99]", "x", "", path.split(".")[0]]
            )
        small = path.startswith(("data", "batch", "valid")) or any(
            word in path
            for word in ("depth", "repeat", "groups", "heads", "length", "capacity", "order", "patch")
        )
        numbers = [text for text in INTEGERS if not small or len(text) < 5]
        value = self.some(
            PARTS, numbers, numbers, NUMBERS, WORDS, PATHS if path.startswith("data") else PARTS
        )
        value = rng.choice(
            [value, value, value, f"({value},)", f"[{value}, {value}]", f"'{value}'", "True", "None"]
        )
        return rng.choice(
            [f"{path}={value}"] * 20 + [path, f"={value}", f"{path}:{value}", f"{path} = {value}"]
        )

    def changes(self, config: str) -> list[str]:
        rng, line = self.rng, []
        tiny = rng.random() < 0.93
        fiddlers = ["tiny"] * tiny + [
            rng.choice(FIDDLERS)
            for _ in range(rng.choice([0] * 6 + [1] if self.mild else [0, 0, 0, 1, 1, 2]))
        ]
        line += ["--fiddler", *fiddlers] if fiddlers else []
        sets = [
            self.change(config) for _ in range(rng.choice([0, 1, 1, 1] if self.mild else [0, 1, 1, 1, 2, 3]))
        ]
        sets += ["data.paths=corpus"] * (config.startswith(("lm", "demo", "mine")) and rng.random() < 0.85)
        return line + (["--set", *sets] if sets else [])

    def train(self) -> list[str]:
        config = self.config()
        line = ["train", config, *self.changes(config)]
        line += self.maybe(0.6, "--workdir", self.some([f"new{self.rng.randrange(10**6)}"], [*RUNS, *PATHS]))
        line += self.maybe(0.1, "--extend")
        spec = ["auto", "x", "127.0.0.1:1,2,2", "127.0.0.1:x,1,0", "127.0.0.1:1,1,0", "", ":1,1,0", "1,2,3"]
        return line + self.maybe(0.05, "--distributed", self.rng.choice(spec))

    def compare(self) -> list[str]:
        configs = [self.config() for _ in range(self.rng.choice([1, 1, 2]))]
        specs = [
            "mamba",
            "mamba,attention(heads=2)",
            "mamba,mamba",
            "",
            ",",
            "mamba(",
            "RMSNorm",
            "mamba(x=1)",
            "os:getcwd",
            "é",
        ]
        line = [
            "compare",
            *configs,
            *self.maybe(0.6, "--mixers", self.rng.choice(specs)),
            *self.changes(configs[0]),
        ]
        line += self.maybe(0.3, "--steps", self.some(INTEGERS)) + self.maybe(0.2, "--json")
        return line + self.maybe(0.4, "--workdir", self.some([f"cmp{self.rng.randrange(10**6)}"], RUNS))

    def run(self) -> list[str]:
        rng = self.rng
        line = [rng.choice(["run", "attention"] if self.mild else ["run", "run", "attention", *RUNS])]
        line += self.maybe(0.12, "--step", self.some(INTEGERS)) + self.maybe(0.1, "--trust")
        return line + self.maybe(
            0.1, "--dtype", rng.choice(["float32", "bfloat16", "float64", "flaot32", "int8", ""])
        )

    def stream(self) -> list[str]:
        rng, line = self.rng, ["stream", *self.run()]
        line += self.maybe(0.8, "--prompt", self.some(["abc", "line 1", "-", "x" * 400], WORDS))
        line += self.maybe(0.85, "--max-tokens", rng.choice(["0", "1", "3", "9", *INTEGERS]))
        line += self.maybe(0.3, "--temperature", self.some(NUMBERS)) + self.maybe(
            0.2, "--top-k", self.some(INTEGERS)
        )
        line += self.maybe(0.2, "--top-p", self.some(NUMBERS)) + self.maybe(
            0.2, "--min-p", self.some(NUMBERS)
        )
        for name in ("repetition", "presence", "frequency"):
            line += self.maybe(0.1, f"--{name}-penalty", self.some(NUMBERS))
        bias = ["3=1", "3=-inf", "3=inf", "3=nan", "x=1", "3", "=", "999=1", "-1=1", "3=1=2", ""]
        line += self.maybe(0.15, "--bias", rng.choice(bias)) + self.maybe(0.1, "--bias", rng.choice(bias))
        line += self.maybe(0.2, "--seed", self.some(INTEGERS)) + self.maybe(
            0.25, "--stop", self.some(["e", "line", "\n"], WORDS)
        )
        line += self.maybe(0.2, "--cache", rng.choice(CACHES)) + self.maybe(
            0.15, "--top-logprobs", self.some(INTEGERS)
        )
        line += self.maybe(0.08, "--chat") + self.maybe(0.05, "--system", self.some(WORDS))
        return line + self.maybe(0.1, rng.choice(["--include-stop", "--no-include-stop"]))

    def eval(self) -> list[str]:
        line = [
            "eval",
            *self.run(),
            *self.maybe(0.4, "--set", self.change("lm_mamba")),
            *self.maybe(0.2, "--json"),
        ]
        line += self.maybe(0.3, "--text", self.some(PATHS), *self.maybe(0.3, self.some(PATHS)))
        return line + self.maybe(0.2, "--length", self.some(INTEGERS))

    def cache_bench(self) -> list[str]:
        rng, line = self.rng, ["cache-bench", *self.run()]
        line += self.maybe(
            0.6, "--caches", ",".join(rng.choice(CACHES) for _ in range(rng.choice([1, 1, 2, 3])))
        )
        for name in ("--length", "--rows", "--items", "--turns"):
            line += self.maybe(0.2, name, self.some(["16", "40"], INTEGERS))
        line += self.maybe(0.1, "--fit-gates", rng.choice(["0", "-1", "x", "1.5", "1"])) + self.maybe(
            0.1, "--json"
        )
        line += self.maybe(0.2, "--text", self.some(PATHS))
        return line + self.maybe(0.15, "--out", self.some(["figures"], RUNS))

    def export(self) -> list[str]:
        rng = self.rng
        line = ["export", *self.run(), *self.maybe(0.3, "--chunk", self.some(INTEGERS))]
        line += self.maybe(
            0.3, "--platforms", rng.choice(["cpu", "cpu,cpu", "", "cpu,", "gpu", "tpu", "nvidia", "é"])
        )
        line += self.maybe(0.3, "--cache", rng.choice(CACHES))
        return line + self.maybe(0.3, "--out", self.some(["exported"], RUNS))

    def show(self) -> list[str]:
        line = ["show", *self.run(), *self.maybe(0.4, "--count", self.some(INTEGERS))]
        return line + self.maybe(0.3, "--output", self.some(["picture.png", "picture.xyz"], PATHS))

    def bench(self) -> list[str]:
        rng = self.rng
        ops = [
            "attention",
            "conv",
            "decode_attention",
            "linear_attention",
            "scan",
            "lmu",
            "dwt",
            "block_attention",
        ]
        line = ["bench", rng.choice([*ops, *ops, "sacn", "", "é"])]
        fields = [*self.shapes.get(line[1], ()), *self.shapes.get(line[1], ()), "x", ""]
        values = ["0", "1", "2", "3", "8", "33", "-1", "x", "none", "true", "", "1.5", str(2**70)]
        words = [f"{rng.choice(fields)}={rng.choice(values)}" for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        words += self.maybe(0.2, self.some(WORDS, ["small", "step", "long"]))
        line += ["--shape", *words] if words else []
        line += self.maybe(
            0.3, "--impl", rng.choice(["xla", "reference", "pallas_tpu", "triton_gpu", "xal", ""])
        )
        line += self.maybe(0.2, "--dtype", rng.choice(["float32", "bfloat16", "float16", "float64", "x"]))
        line += (
            self.maybe(0.2, "--backward")
            + self.maybe(0.1, "--interpret")
            + self.maybe(0.2, "--rounds", self.some(INTEGERS))
        )
        return (
            line
            + self.maybe(0.1, "--json", self.some(["b.json"], PATHS))
            + self.maybe(0.1, "--tune", self.some(["t.json"], PATHS))
        )

    def other(self) -> list[str]:
        words = [
            ["--help"],
            ["--version"],
            [],
            ["trane", "demo"],
            ["list", "x"],
            ["doctor", "--jsn"],
            ["-h"],
            ["stream"],
        ]
        words += [["train"], ["bench"], ["train", "--help"], ["stream", "--help"], ["--nothing"], [""], ["é"]]
        return list(self.rng.choice(words))
