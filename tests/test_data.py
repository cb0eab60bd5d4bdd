"""Data: no token lost or seen twice, and the batch of a step depends on data, seed and step alone."""

import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from seqlab.train.data import (
    ArraySource,
    Batches,
    DataSource,
    FileSource,
    TfdsSource,
    pack,
    validation_batches,
)
from seqlab.train.text import Text

ROOT = pathlib.Path(__file__).parent.parent


def corpus(count, seed=0):
    generator = np.random.default_rng(seed)
    return [
        generator.integers(1, 256, size=size, dtype=np.uint8)
        for size in generator.integers(1, 30, size=count)
    ]


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def texts(source):
    return [bytes(source[index]).decode() for index in range(len(source))]


def assert_batches_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


# Packing


def test_windows_by_hand():
    # The order of seed 1 is 2, 0, 1: it must never change, or runs would resume on other data.
    windows = pack(ArraySource([np.array([7]), np.array([8, 9, 10]), np.array([5, 6])]), length=4, seed=1)
    assert windows.stream.tolist() == [0, 5, 6, 0, 7, 0, 8, 9, 10]
    assert len(windows) == 2
    assert {name: value.tolist() for name, value in windows[0].items()} == {
        "inputs": [0, 5, 6, 0],
        "targets": [5, 6, 0, 7],
        "reset": [True, False, False, True],
        "valid": [True] * 4,
    }
    assert {name: value.tolist() for name, value in windows[1].items()} == {
        "inputs": [7, 0, 8, 9],  # begins inside a document, and so without a reset
        "targets": [0, 8, 9, 10],
        "reset": [False, True, False, False],
        "valid": [True] * 4,
    }
    assert {name: value.dtype for name, value in windows[0].items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "reset": np.bool_,
        "valid": np.bool_,
    }


def test_every_window_may_begin_with_the_first_token_of_documents():
    source = ArraySource([np.array([7]), np.array([8, 9, 10]), np.array([5, 6])])
    windows = pack(source, length=4, seed=1, lead=True)  # of the stream 0 5 6 0 7 0 8 9 10, three tokens each
    assert [item["inputs"].tolist() for item in windows] == [[0, 0, 5, 6], [0, 0, 7, 0], [0, 8, 9, 0]]
    assert [item["targets"].tolist() for item in windows] == [[0, 5, 6, 0], [0, 7, 0, 8], [8, 9, 10, 0]]
    assert [np.flatnonzero(item["reset"]).tolist() for item in windows] == [[1], [1, 3], [0]]
    assert windows[2]["valid"].tolist() == [True, True, True, False]
    assert windows.fingerprint != pack(source, length=4, seed=1).fingerprint
    with pytest.raises(ValueError, match="length: got 1, expected at least 2 steps a window"):
        pack(source, length=1, seed=1, lead=True)
    with pytest.raises(ValueError, match="length must be at least 2 with lead, got 1"):
        Text(length=1, lead=True)


def test_the_order_of_documents_is_pinned():
    windows = pack(ArraySource([np.array([n]) for n in range(1, 9)]), length=1, seed=12345)
    assert windows.stream[1::2].tolist() == [8, 1, 2, 6, 5, 7, 4, 3]


def test_the_last_window_is_padded_or_dropped():
    source = ArraySource([np.arange(1, 7, dtype=np.uint8)])
    kept = pack(source, length=4, seed=0)
    assert len(kept) == 2
    assert kept[1]["inputs"].tolist() == [4, 5, 0, 0]
    assert kept[1]["targets"].tolist() == [5, 6, 0, 0]
    assert kept[1]["valid"].tolist() == [True, True, False, False]
    assert not kept[1]["reset"].any()
    assert kept[-1]["inputs"].tolist() == kept[1]["inputs"].tolist()
    dropped = pack(source, length=4, seed=0, keep_last=False)
    assert len(dropped) == 1
    assert dropped[0]["inputs"].tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="window 1 of 1"):
        dropped[1]


@pytest.mark.parametrize("length", [1, 2, 7, 30, 64])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_every_token_is_predicted_once_and_every_document_begins_with_a_reset(length, dtype):
    documents = [document.astype(dtype) for document in corpus(40)]
    windows = pack(ArraySource(documents), length, seed=3)
    assert windows.stream.dtype == (np.uint8 if dtype == np.uint8 else np.int32)
    items = list(windows)
    joined = {
        name: np.concatenate([item[name][item["valid"]] for item in items])
        for name in ("inputs", "targets", "reset")
    }
    np.testing.assert_array_equal(joined["inputs"], windows.stream[:-1])
    np.testing.assert_array_equal(joined["targets"], windows.stream[1:])
    assert all(item["valid"].all() for item in items[:-1])
    # cut at the resets, the stream is the documents again, each behind its bos
    tokens = np.append(joined["inputs"], joined["targets"][-1])
    found = np.split(tokens, np.flatnonzero(joined["reset"])[1:])
    assert sorted(map(tuple, found)) == sorted((0, *document.tolist()) for document in documents)


def test_empty_documents_are_left_out_and_another_bos_may_be_named():
    windows = pack(
        ArraySource([np.zeros(0, np.uint8), np.array([3], np.uint8), np.zeros(0, np.uint8)]),
        length=1,
        seed=0,
        bos=300,
    )
    assert windows.stream.tolist() == [300, 3]


def test_zero_bytes_in_a_document_are_no_resets():
    assert pack(ArraySource([np.zeros(4, np.uint8)]), length=4, seed=0)[0]["reset"].tolist() == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        ([np.ones((2, 2), np.int32)], 1, r"document 0: got int32\(2, 2\), expected a 1-D array of integer"),
        ([np.ones(3)], 1, r"document 0: got float64\(3,\)"),
        ([np.array([1, -1])], 1, "document 0: tokens from -1 to 1, expected 0 to"),
        ([np.array([1, 2**31])], 1, "document 0: tokens from 1 to 2147483648"),
        (
            [np.array([1, 2, 3])],
            4,
            "too little data: 1 documents with 4 tokens, and one window of length 4 takes 5",
        ),
        ([], 4, "too little data: 0 documents with 0 tokens"),
        ([np.array([1])], 0, "length: got 0"),
    ],
)
def test_pack_refuses(documents, length, message):
    with pytest.raises(ValueError, match=message):
        pack(ArraySource(documents), length, seed=0)


def test_the_fingerprint_is_that_of_the_windows():
    documents = corpus(20)
    fingerprint = pack(ArraySource(documents), 8, seed=0).fingerprint
    assert pack(ArraySource(documents), 8, seed=0).fingerprint == fingerprint
    documents[3] = documents[3] ^ 1
    others = {
        pack(ArraySource(documents), 8, seed=0).fingerprint,
        pack(ArraySource(corpus(20)), 9, seed=0).fingerprint,
        pack(ArraySource(corpus(20)), 8, seed=1).fingerprint,
        pack(ArraySource(corpus(20)), 8, seed=0, keep_last=False).fingerprint,
    }
    assert len(others | {fingerprint}) == 5


# Files


def test_folders_are_read_in_order_without_hidden_and_excluded_names(tmp_path):
    write(
        tmp_path,
        {
            "b.py": "b",
            "a/z.py": "z",
            "a/y.txt": "y",
            ".git/x.py": "x",
            ".hidden.py": "h",
            "skip/s.py": "s",
            "empty.py": "",
        },
    )
    os.mkfifo(tmp_path / "pipe.py")  # opening it would wait for ever
    source = FileSource(tmp_path, include=("*.py",), exclude=("skip",), validation=0)
    assert texts(source) == ["z", "b"]
    assert source.files == [tmp_path / "a" / "z.py", tmp_path / "b.py"]
    assert source[0].dtype == np.uint8
    assert isinstance(source, DataSource)
    assert texts(FileSource(str(tmp_path), include=("a/*",), validation=0)) == ["y", "z"]
    assert texts(FileSource([tmp_path / "skip", tmp_path / "a", tmp_path / "a" / "z.py"], validation=0)) == [
        "s",
        "y",
        "z",
    ]


def test_a_file_named_by_itself_needs_no_pattern(tmp_path):
    write(tmp_path, {"notes": "0123456789"})
    assert texts(FileSource(tmp_path / "notes", include=("*.py",), validation=0)) == ["0123456789"]
    # a corpus of one file is cut
    assert texts(FileSource(tmp_path / "notes", validation=0.3)) == ["0123456"]
    assert texts(FileSource(tmp_path / "notes", split="validation", validation=0.3)) == ["789"]


def test_the_split_parts_the_files_and_does_not_move_when_files_are_added(tmp_path):
    write(tmp_path, {f"{n}.txt": f"text {n}" for n in range(200)})
    train, validation = (
        set(texts(FileSource(tmp_path, split, validation=0.1))) for split in ("train", "validation")
    )
    assert train | validation == {f"text {n}" for n in range(200)}
    assert not train & validation
    assert 10 <= len(validation) <= 30
    write(tmp_path, {f"new/{n}.txt": f"new {n}" for n in range(50)})
    assert train < set(texts(FileSource(tmp_path, "train", validation=0.1)))
    assert validation < set(texts(FileSource(tmp_path, "validation", validation=0.1)))
    # where the folder lies says nothing
    (tmp_path.parent / "elsewhere").mkdir()
    write(tmp_path.parent / "elsewhere", {f"{n}.txt": f"text {n}" for n in range(200)})
    assert set(texts(FileSource(tmp_path.parent / "elsewhere", "validation", validation=0.1))) == validation


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_small_corpus_leaves_no_side_empty(tmp_path, share):
    write(tmp_path, {"a": "one", "b": "two", "c": "three"})
    train, validation = (
        texts(FileSource(tmp_path, split, validation=share)) for split in ("train", "validation")
    )
    assert sorted(train + validation) == ["one", "three", "two"]
    assert len(validation) == (1 if share < 0.5 else 2)


def test_the_default_is_the_standard_library():
    train, validation = FileSource(), FileSource(split="validation")
    assert not {*train.files} & {*validation.files}
    files = [*train.files, *validation.files]
    assert all(
        path.suffix == ".py"
        and not {"test", "tests", "idle_test", "site-packages", "turtledemo"} & {*path.parts}
        for path in files
    )
    assert pathlib.Path(os.__file__).resolve() in [path.resolve() for path in files]
    assert 0.02 < len(validation) / len(files) < 0.1
    assert sum(path.stat().st_size for path in files) > 5_000_000
    index = [path.name for path in train.files].index("heapq.py")
    assert bytes(train[index]) == train.files[index].read_bytes()


def test_what_cannot_be_read_is_named_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"paths: {tmp_path}/nowhere does not exist"):
        FileSource([tmp_path, tmp_path / "nowhere"])
    write(tmp_path, {"a.txt": "a"})
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    with pytest.raises(OSError, match=f"{tmp_path}/link.txt"):
        FileSource(tmp_path)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})

    def refuse(path, mode):
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    # Permissions do not stop the root user.
    monkeypatch.setattr("seqlab.train.data.open", refuse, raising=False)
    with pytest.raises(PermissionError, match=f"{tmp_path}/b.txt"):
        FileSource(tmp_path)


def test_a_file_that_shrinks_is_an_error(tmp_path):
    write(tmp_path, {"a.txt": "0123456789"})
    source = FileSource(tmp_path, validation=0)
    (tmp_path / "a.txt").write_text("0")
    with pytest.raises(OSError, match=r"a\.txt: became shorter"):
        source[0]


def test_an_empty_corpus_says_where_it_looked(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.py": ""})
    with pytest.raises(
        ValueError, match=rf"no data for train: looked in {tmp_path} for \*.py and found 0 files"
    ):
        FileSource(tmp_path, include=("*.py",))
    with pytest.raises(ValueError, match=r"no data for validation.*found 1 files.*share 0\)"):
        FileSource(tmp_path, split="validation", validation=0)
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        FileSource(tmp_path, split="valid")
    with pytest.raises(ValueError, match="validation: got 1, expected a share"):
        FileSource(tmp_path, validation=1)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the data set `toy_text`, stored with random access."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # what is on disk must do

        class ToyText(tfds.core.GeneratorBasedBuilder):
            __module__ = "toy_text"  # from the name of a test module tfds would make a package
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "text": tfds.features.Text(),
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                    "score": tfds.features.Scalar(dtype=np.float32),
                }
                # dataset_info_from_configs would take this test's folder for a data set's package
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

            def _generate_examples(self, count):
                for n in range(count):
                    yield n, {"text": "é" * n, "tokens": np.arange(n, dtype=np.int32) * 1000, "score": 0.5}

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    ToyText(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_text_and_integers(prepared):
    text = TfdsSource("toy_text", data_dir=prepared)
    assert texts(text) == ["", "é", "éé", "ééé", "éééé"]
    assert text[1].dtype == np.uint8
    assert texts(TfdsSource("toy_text", "train[40%:]", data_dir=prepared)) == ["éé", "ééé", "éééé"]
    tokens = TfdsSource("toy_text", "test", key="tokens", data_dir=str(prepared))
    assert [tokens[n].tolist() for n in range(len(tokens))] == [[], [0]]
    windows = pack(TfdsSource("toy_text", key="tokens", data_dir=prepared), length=3, seed=0)
    assert windows.stream.max() == 3000
    assert len(windows.starts) == 4
    assert "tensorflow" not in sys.modules


def test_tfds_errors_say_what_to_do(prepared, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    with pytest.raises(
        ValueError, match=r"'toy_text' is not in .*tfds.builder\('toy_text', .*file_format='array_record'\)"
    ):
        TfdsSource("toy_text", data_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"'mnist' is not prepared in .*tfds.builder\('mnist', .*download_and_prepare\(\)"
    ):
        TfdsSource("mnist", data_dir=tmp_path)
    assert not [*tmp_path.iterdir()]  # nothing was begun
    with pytest.raises(ValueError, match=r"no feature 'txt', but .*'text'"):
        TfdsSource("toy_text", key="txt", data_dir=prepared)
    with pytest.raises(ValueError, match="expected Text or 1-D integers"):
        TfdsSource("toy_text", key="score", data_dir=prepared)
    with pytest.raises(ValueError, match="trian"):
        TfdsSource("toy_text", "trian", data_dir=prepared)


# Batches


@pytest.fixture(scope="module")
def windows():
    return pack(ArraySource(corpus(27)), length=16, seed=0)


def rows(batch):
    return sorted(map(tuple, np.concatenate([batch["inputs"], batch["targets"]], axis=1).tolist()))


def test_a_batch_is_rows_of_windows_and_an_epoch_is_all_of_them(windows):
    assert len(windows) == 29
    everything = rows({name: np.stack([item[name] for item in windows]) for name in ("inputs", "targets")})
    batches = Batches(windows, 4, seed=0, process_index=0, process_count=1)
    assert batches[0]["inputs"].shape == (4, 16)
    assert {name: value.dtype for name, value in batches[0].items()} == {
        name: value.dtype for name, value in windows[0].items()
    }
    # 29 batches of 4 = 4 epochs of 29
    four_epochs = [row for step in range(29) for row in rows(batches[step])]
    assert sorted(four_epochs) == sorted(everything * 4)
    first = np.concatenate([batches[step]["inputs"] for step in range(8)])
    assert sorted(map(tuple, first[:29].tolist())) == sorted(
        map(tuple, np.stack([item["inputs"] for item in windows]).tolist())
    )


def test_the_order_depends_on_seed_and_epoch(windows):
    def order(seed, epoch):
        batches = Batches(windows, 1, seed)
        return [tuple(batches[step]["inputs"][0]) for step in range(29 * epoch, 29 * (epoch + 1))]

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    # Seed 1 does not begin with the second epoch of seed 0
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert order(1, 2) == orders[5]
    assert all(sorted(a) == sorted(orders[0]) for a in orders)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_same_global_batch(windows, count):
    whole = Batches(windows, 8, seed=5, process_index=0, process_count=1)
    parts = [Batches(windows, 8, seed=5, process_index=index, process_count=count) for index in range(count)]
    for step in (0, 3, 4, 1000):  # 3 and 4 cross the end of an epoch
        merged = {name: np.empty_like(value) for name, value in whole[step].items()}
        for index, part in enumerate(parts):
            for name, value in part[step].items():
                merged[name][index::count] = value
        assert_batches_equal(merged, whole[step])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_iteration_gives_the_batch_of_every_step_for_any_number_of_workers(windows, workers):
    expected = Batches(windows, 8, seed=5, process_index=1, process_count=2)
    iterator = Batches(windows, 8, seed=5, process_index=1, process_count=2, workers=workers).iterate(3)
    for step in range(3, 10):
        assert_batches_equal(next(iterator), expected[step])
    iterator.close()
    assert list(iterator) == []


def test_a_run_interrupted_twice_sees_what_an_uninterrupted_one_sees(windows):
    batches = Batches(windows, 3, seed=1)
    whole = [batch for _, batch in zip(range(40), batches.iterate(), strict=False)]
    pieces = [
        batch
        for begin, end in ((0, 11), (11, 12), (12, 40))
        for _, batch in zip(range(begin, end), Batches(windows, 3, seed=1).iterate(begin), strict=False)
    ]
    for actual, expected in zip(pieces, whole, strict=True):
        assert_batches_equal(actual, expected)


def test_too_little_data_and_wrong_numbers(windows):
    with pytest.raises(ValueError, match="too little data: 29 windows, and one batch takes batch_size = 30"):
        Batches(windows, 30, seed=0)
    with pytest.raises(
        ValueError, match="batch_size: got 6, expected a positive multiple of the number of processes, 4"
    ):
        Batches(windows, 6, seed=0, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="process_index: got 2 of process_count 2"):
        Batches(windows, 6, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="process_index: got 0 of process_count None"):
        Batches(windows, 6, seed=0, process_index=0)
    with pytest.raises(ValueError, match="workers: got -1"):
        Batches(windows, 6, seed=0, workers=-1)
    with pytest.raises(IndexError, match="step: got -1"):
        Batches(windows, 6, seed=0)[-1]
    with pytest.raises(IndexError, match="step: got -1"):
        Batches(windows, 6, seed=0).iterate(-1)


def test_items_may_hold_anything():
    class Images:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": np.full((2, 2, 3), index, np.float32), "label": np.int32(index)}

    batch = Batches(Images(), 5, seed=0)[0]
    assert sorted(batch["label"].tolist()) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert [batch["label"].tolist() for batch in validation_batches(Images(), 5)] == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="items with image, label have no `valid`"):
        validation_batches(Images(), 4)[1]


def test_validation_is_in_order_finite_and_padded(windows):
    batches = validation_batches(windows, 8)
    assert len(batches) == 4
    for _ in range(2):  # the same every time
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in windows[0]}
        for name, value in joined.items():
            np.testing.assert_array_equal(
                value[:29], np.stack([item[name] for item in windows]), err_msg=name
            )
            assert not value[29:].any()
    assert all(batch["inputs"].shape == (8, 16) for batch in batches)
    assert len(validation_batches(windows, 8, limit=3)) == 3
    assert len(validation_batches(windows, 8, limit=9)) == 4
    assert_batches_equal(validation_batches(windows, 8, limit=3)[2], batches[2])
    assert_batches_equal(batches[-1], batches[3])


@pytest.mark.parametrize("count", [2, 4])
def test_validation_is_shared_by_processes(windows, count):
    whole = validation_batches(windows, 8)
    parts = [validation_batches(windows, 8, None, index, count) for index in range(count)]
    for step, expected in enumerate(whole):
        for index, part in enumerate(parts):
            assert_batches_equal(part[step], {name: value[index::count] for name, value in expected.items()})


def test_validation_refuses(windows):
    with pytest.raises(ValueError, match="limit: got 0"):
        validation_batches(windows, 8, limit=0)
    with pytest.raises(ValueError, match="too little data: no windows"):
        validation_batches([], 8)


def test_importing_it_imports_none_of_the_heavy_packages():
    heavy = {"grain", "tensorflow_datasets", "orbax", "tensorflow"}
    code = f"import sys, seqlab.train.data; print({heavy} & {{*sys.modules}})"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "set()\n"
    )
