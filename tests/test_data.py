"""Laws of `fedkd_jax.data`: partitions, splits, flat storage, and what the sources read. Nothing is downloaded."""

import gzip
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax.build import build_data
from fedkd_jax.config import ConfigError, DataConfig, Experiment
from fedkd_jax.data.federated import Examples, federate, take_clients, train_test_split
from fedkd_jax.data.partition import by_key, dirichlet, iid, shards
from fedkd_jax.data.sources import load
from fedkd_jax.plots import partition_plot

laws = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
label_arrays = st.lists(st.integers(0, 5), max_size=80).map(lambda labels: np.array(labels, np.int32))
ragged = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)

PARTITIONS = {
    "iid": lambda labels, n, seed: iid(labels, n, seed),
    "dirichlet": lambda labels, n, seed: dirichlet(labels, n, 0.3, seed),
    "shards": lambda labels, n, seed: shards(labels, n, 1 + seed % 2, seed),
    "by_key": lambda labels, n, seed: by_key(labels % n, seed),
}


def deal(counts, seed=0):
    """Index arrays of these sizes over a shuffled range."""
    order = np.random.default_rng(seed).permutation(sum(counts))
    return np.split(order, np.cumsum(counts)[:-1])


# ---- partitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTITIONS)
@given(labels=label_arrays, n=st.integers(1, 12), seed=seeds)
@laws
def test_a_partition_is_disjoint_covers_and_is_a_function_of_its_seed(name, labels, n, seed):
    if name == "shards" and 2 * n > len(labels):
        return
    clients = PARTITIONS[name](labels, n, seed)
    assert len(clients) == (len(np.unique(labels % n)) if name == "by_key" else n)
    assert all(ids.dtype == np.int64 and (np.diff(ids) > 0).all() for ids in clients)
    np.testing.assert_array_equal(np.sort(np.concatenate([np.zeros(0, int), *clients])), np.arange(len(labels)))
    again = PARTITIONS[name](labels, n, seed)
    assert all(np.array_equal(a, b) for a, b in zip(clients, again, strict=True))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "by_key"])
def test_another_seed_gives_another_partition(name):
    labels = np.repeat(np.arange(10), 30)
    a, b = (PARTITIONS[name](labels, 10, seed) for seed in (2, 4))
    assert not all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@given(n=st.integers(0, 60), clients=st.integers(1, 12), seed=seeds)
@laws
def test_iid_sizes_differ_by_at_most_one(n, clients, seed):
    sizes = [len(ids) for ids in iid(np.zeros(n, int), clients, seed)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_tends_to_iid_for_large_alpha_and_to_few_classes_for_small_alpha():
    labels = np.repeat(np.arange(10), 500)

    def top_share(alpha):  # the share of a client's most frequent class, mean over clients that hold anything
        held = [ids for ids in dirichlet(labels, 20, alpha, seed=3) if len(ids)]
        return np.mean([np.bincount(labels[ids]).max() / len(ids) for ids in held])

    shares = [top_share(alpha) for alpha in (1e-3, 0.1, 1.0, 100.0, 1e6)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7 and shares[-1] < 0.11
    counts = np.array([np.bincount(labels[ids], minlength=10) for ids in dirichlet(labels, 20, 1e6, seed=3)])
    assert abs(counts - 25).max() <= 1


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    alpha, n_clients, size = 0.5, 5, 1000
    draws = [dirichlet(np.zeros(size, int), n_clients, alpha, seed) for seed in range(400)]
    share = np.array([[len(ids) for ids in clients] for clients in draws]) / size
    mean, variance = 1 / n_clients, (1 / n_clients) * (1 - 1 / n_clients) / (n_clients * alpha + 1)
    np.testing.assert_allclose(share.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(share.var(0), variance, rtol=0.25)


@given(seed=seeds, minimum=st.integers(0, 8))
@laws
def test_dirichlet_keeps_min_examples(seed, minimum):
    clients = dirichlet(np.repeat(np.arange(4), 50), 5, 2.0, seed, min_examples=minimum, max_tries=500)
    assert min(len(ids) for ids in clients) >= minimum


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            dict(clients=200, alpha=1.0, min_examples=6),
            "min_examples=6 for clients=200 needs 1200 examples of the 1000",
        ),
        (
            dict(clients=100, alpha=1e-3, min_examples=5),
            "clients=100, alpha=0.001.*min_examples=5.*max_tries=100.*raise",
        ),
        (dict(clients=10, alpha=0.0), "alpha is 0.0"),
        (dict(clients=10, alpha=float("nan")), "alpha is nan"),
        (dict(clients=0, alpha=1.0), "clients is 0"),
        (dict(clients=3, alpha=1.0, min_examples=-1), "min_examples is -1; allowed: at least 0"),
        (dict(clients=3, alpha=1.0, max_tries=0), "max_tries is 0"),
    ],
)
def test_an_impossible_dirichlet_setting_is_an_error_soon(setting, words):
    start = time.monotonic()
    with pytest.raises(ValueError, match=words):
        dirichlet(np.repeat(np.arange(10), 100), seed=0, **setting)
    assert time.monotonic() - start < 2


def test_shards_have_equal_size_and_few_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    clients = shards(labels, clients=30, shards_per_client=2, seed=1)
    assert {len(ids) for ids in clients} == {20}
    assert max(len(np.unique(labels[ids])) for ids in clients) <= 2
    with pytest.raises(ValueError, match=r"400 times shards_per_client=2 is 800 shards.*600 examples"):
        shards(labels, clients=400, shards_per_client=2, seed=1)


def test_by_key_follows_the_sorted_keys_and_a_seed_only_renumbers():
    keys = np.array(["carl", "ann", "bob", "ann", "carl", "ann"])
    clients = by_key(keys)
    assert [ids.tolist() for ids in clients] == [[1, 3, 5], [2], [0, 4]]
    renumbered = by_key(keys, seed=1)
    assert sorted(ids.tolist() for ids in renumbered) == sorted(ids.tolist() for ids in clients)


@pytest.mark.parametrize("n_clients", [1, 12, 60, 400])
def test_partition_plot_writes_a_file(tmp_path, n_clients):
    labels = np.random.default_rng(0).integers(0, 10, 3000)
    clients = dirichlet(labels, n_clients, 0.1, seed=0)
    names = [f"class {i}" for i in range(10)]
    figure = partition_plot(labels, clients, names, tmp_path / "who.png")
    assert (tmp_path / "who.png").stat().st_size > 5000
    ax = figure.axes[0]
    assert ax.get_xlabel() and ax.get_ylabel() == ("client" if n_clients <= 60 else "class")
    if n_clients <= 60:
        assert [text.get_text() for text in ax.get_legend().get_texts()] == names
        assert sum(bar.get_width() for bar in ax.patches) == len(labels)
    if n_clients <= 30:
        own = [f"client {i}" for i in range(n_clients)]
        ax = partition_plot(labels, clients, names, unit="words", client_names=own).axes[0]
        assert [text.get_text() for text in ax.get_yticklabels()] == own
        assert ax.get_xlabel() == "words" and "3,000 words" in ax.get_title()
    mine = matplotlib.figure.Figure()
    assert partition_plot(labels, clients, names, mine.add_subplot()) is mine


# ---- splits and flat storage -----------------------------------------------------------------------------------------


@given(counts=ragged, fraction=st.floats(0, 0.99), seed=seeds, stratify=st.booleans())
@laws
def test_a_split_divides_each_client(counts, fraction, seed, stratify):
    clients = deal(counts)
    labels = np.arange(sum(counts)) % 3 if stratify else None
    train, test = train_test_split(clients, fraction, seed, labels)
    for ids, a, b in zip(clients, train, test, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([a, b])), np.sort(ids))
        assert a.dtype == b.dtype == np.int64
        if fraction == 0 or len(ids) < 2:
            assert len(b) == 0
        else:
            assert len(a) >= 1 and len(b) >= 1
            assert len(b) == np.clip(round(len(ids) * fraction), 1, len(ids) - 1)
    # The others do not matter: a client whose neighbours are emptied is split as before.
    alone = [ids if i == len(clients) - 1 else ids[:0] for i, ids in enumerate(clients)]
    np.testing.assert_array_equal(train_test_split(alone, fraction, seed, labels)[1][-1], test[-1])


def test_a_stratified_split_keeps_the_classes_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    _, test = train_test_split([np.arange(100)], 0.3, seed=0, labels=labels)
    assert abs(np.bincount(labels[test[0]]) - np.array([15, 9, 6])).max() <= 1


def test_every_example_is_as_likely_to_be_test():
    drawn = np.concatenate([train_test_split([np.arange(7)], 0.3, seed)[1][0] for seed in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn) / 2000, 2 / 7, atol=0.05)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_a_test_fraction_outside_0_1_is_an_error(fraction):
    with pytest.raises(ValueError, match="test_fraction is"):
        train_test_split([np.arange(4)], fraction, seed=0)


@given(counts=ragged, seed=seeds)
@laws
def test_federate_and_take_clients_give_each_client_its_own(counts, seed):
    clients = deal(counts, seed)
    n = sum(counts)
    inputs = {"ids": np.arange(2 * n).reshape(n, 2), "x": np.random.default_rng(seed).normal(size=(n, 3, 1))}
    labels = np.arange(n) % 4
    data = federate(inputs, labels, clients)
    assert data.start.dtype == data.count.dtype == np.int32
    assert data.count.tolist() == counts and data.max_count == max(counts)
    cohort = np.random.default_rng(seed).integers(0, len(counts), 4)
    taken = jax.jit(take_clients)(data, jnp.asarray(cohort))
    assert taken.max_count == data.max_count
    for row, i in enumerate(cohort):
        span = slice(int(taken.start[row]), int(taken.start[row] + taken.count[row]))
        np.testing.assert_array_equal(taken.inputs["ids"][span], inputs["ids"][clients[i]])
        np.testing.assert_allclose(taken.inputs["x"][span], inputs["x"][clients[i]], rtol=1e-6)
        np.testing.assert_array_equal(taken.labels[span], labels[clients[i]])


def test_take_clients_shares_the_flat_arrays_and_takes_a_scalar():
    data = federate(np.zeros((5, 2), np.float32), np.zeros(5, np.int32), [np.arange(3), np.array([]), np.arange(3, 5)])
    one = take_clients(data, jnp.int32(2))
    assert one.inputs is data.inputs and one.labels is data.labels
    assert one.start.shape == () and (int(one.start), int(one.count)) == (3, 2)


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ([np.array([0, 5])], r"clients\[0\] holds index 0..5; allowed: 0..4"),
        ([np.array([0]), np.array([-1])], r"clients\[1\] holds index -1..-1"),
        ([np.array([0.5])], "float64"),
        ([np.array([], int)] * 3, "3 clients without any example"),
        ([], "0 clients without any example"),
    ],
)
def test_federate_refuses(clients, words):
    with pytest.raises(ValueError, match=words):
        federate(np.zeros((5, 2)), np.zeros(5, int), clients)
    with pytest.raises(ValueError, match=r"inputs has \[4\] rows but labels has 5"):
        federate(np.zeros((4, 2)), np.zeros(5, int), [np.array([0])])


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def fashion_mnist_folder():
    root = os.environ.get("FEDKD_DATA_DIR") or pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(root, "fashion_mnist")
    return folder if folder.exists() else pathlib.Path(root)


def python(code, *args, **kwargs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1, **kwargs)


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def tiny_fashion(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 40), ("t10k", 10)):
        arrays[split] = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", arrays[split][0])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", arrays[split][1])
    return tmp_path, arrays


def test_digits_are_those_of_scikit_learn(cache):
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    for _ in range(2):  # prepared, then read again
        examples, test = load(cache_dir=cache)
        assert isinstance(examples, Examples) and test is None
        assert examples.inputs.dtype == np.float32 and examples.labels.dtype == np.int32
        np.testing.assert_array_equal(examples.inputs[..., 0] * 16, digits.images)
        np.testing.assert_array_equal(examples.labels, digits.target)
        assert examples.classes == tuple("0123456789")
    part, rest = load("digits", cache_dir=cache, split="train[:10%]", test_split="train[10%:]")
    np.testing.assert_array_equal(np.concatenate([part.inputs, rest.inputs]), examples.inputs)


def test_reading_imports_no_tensorflow_and_importing_imports_no_tfds(cache):
    code = (
        "import sys; from fedkd_jax.data.sources import load; assert 'tensorflow_datasets' not in sys.modules\n"
        "load('digits', cache_dir=sys.argv[1]); assert 'tensorflow_datasets' in sys.modules\n"
        "assert 'tensorflow' not in sys.modules; print('done')"
    )
    out, err = python(code, cache).communicate(timeout=60)
    assert out == "done\n", err  # and nothing of tfds' own notices on stdout


def test_fashion_mnist_is_what_the_files_hold(cache):
    folder = fashion_mnist_folder()
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("no Fashion-MNIST: set FEDKD_DATA_DIR")
    splits = load("fashion_mnist", data_dir=folder, cache_dir=cache)
    for examples, stem, n in zip(splits, ("train", "t10k"), (60_000, 10_000), strict=True):
        pixels = np.frombuffer(
            gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
        )
        labels = np.frombuffer(
            gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
        )
        assert examples.inputs.shape == (n, 28, 28, 1) and len(examples.classes) == 10
        np.testing.assert_array_equal(examples.inputs.ravel(), pixels.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(examples.labels, labels)


def test_another_folder_is_not_taken_for_the_prepared_one(tiny_fashion, cache, monkeypatch):
    folder, arrays = tiny_fashion
    monkeypatch.setenv("FEDKD_DATA_DIR", str(folder))
    monkeypatch.setenv("FEDKD_CACHE_DIR", str(cache))
    examples, test = load("fashion_mnist")
    np.testing.assert_array_equal(examples.labels, arrays["train"][1])
    np.testing.assert_array_equal(test.labels, arrays["t10k"][1])
    labels = (arrays["train"][1] + 1) % 10
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    np.testing.assert_array_equal(load("fashion_mnist")[0].labels, labels)


def test_a_missing_file_is_an_error_at_once(tiny_fashion, cache, monkeypatch):
    folder, _ = tiny_fashion
    monkeypatch.delenv("FEDKD_DATA_DIR", raising=False)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="FEDKD_DATA_DIR"):
        load("fashion_mnist", cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte.gz in .*nowhere.*FEDKD_DATA_DIR"):
        load("fashion_mnist", data_dir=folder / "nowhere", cache_dir=cache)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1-ubyte.gz"):
        load("fashion_mnist", data_dir=folder, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"no prepared mnist in .*download=True"):
        load("tfds:mnist", data_dir=folder, cache_dir=cache)
    with pytest.raises(ValueError, match="knows no set named 'no_such_set'"):
        load("tfds:no_such_set", cache_dir=cache, download=True)
    with pytest.raises(ValueError, match="name is 'mnist'"):
        load("mnist", cache_dir=cache)
    assert time.monotonic() - start < 10


def test_a_download_without_tensorflow_says_so(cache):
    pytest.importorskip("tensorflow_datasets")
    if "tensorflow" in sys.modules or __import__("importlib.util").util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    with pytest.raises(ModuleNotFoundError, match="preparing mnist needs TensorFlow, once"):
        load("tfds:mnist", cache_dir=cache, download=True)


def test_a_damaged_file_leaves_nothing_behind(tiny_fashion, tmp_path):
    folder, _ = tiny_fashion
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load("fashion_mnist", data_dir=folder, cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*array_record*"))
    path.write_bytes(whole)
    assert len(load("fashion_mnist", data_dir=folder, cache_dir=tmp_path / "c")[0]) == 40


# A reader that waits for its brothers with the set unprepared, so that all of them prepare.
RACE = """
import pathlib, sys, time
import fedkd_jax.data.builders as builders
from fedkd_jax.data.sources import load
cache, me, others = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
generate = builders.Digits._generate_examples
def wait(self):
    (cache / me).touch()
    while not all((cache / other).exists() for other in others):
        time.sleep(0.01)
    yield from generate(self)
builders.Digits._generate_examples = wait
print(len(load("digits", cache_dir=cache)[0]))
"""


def test_two_processes_may_prepare_at_once_and_a_third_be_killed(tmp_path):
    killed = python(RACE, tmp_path, "killed", "never")
    while not (tmp_path / "killed").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    assert list(tmp_path.rglob("incomplete*")), "it was killed while it was preparing"
    processes = [python(RACE, tmp_path, "a", "b"), python(RACE, tmp_path, "b", "a")]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out == "1797\n", err
    assert len(load("digits", cache_dir=tmp_path)[0]) == 1797


def own_builder(name, features, rows, supervised_keys=None):
    """A tfds builder in the style of a user's own; `rows` is a list of examples."""
    import tensorflow_datasets as tfds

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features(tfds.features)),
            supervised_keys=supervised_keys,
            disable_shuffling=True,
        )

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, dl: {"train": self._generate_examples()},
        "_generate_examples": lambda self: enumerate(rows),
        "__module__": __name__,
    }
    return type(name, (tfds.core.GeneratorBasedBuilder,), body)


def png(array):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, format="png")
    file.seek(0)
    return file


def test_any_set_is_read_by_its_tfds_name(tmp_path):
    digits, _ = load("digits", cache_dir=tmp_path)
    named, test = load("tfds:digits", data_dir=tmp_path, cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(np.rint(named.inputs * 255), digits.inputs * 16)
    assert test is None

    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3)).astype(np.uint8)
    rows = [{"image": png(image), "label": i % 2} for i, image in enumerate(images)]
    own_builder(
        "Pictures", lambda f: {"image": f.Image(shape=(6, 5, 3)), "label": f.ClassLabel(names=["a", "b"])}, rows
    )
    pictures, _ = load("tfds:pictures", cache_dir=tmp_path, download=True)
    np.testing.assert_array_equal(pictures.inputs, images.astype(np.float32) / np.float32(255))
    assert pictures.classes == ("a", "b") and pictures.labels.tolist() == [0, 1, 0]

    rows = [{"text": text, "label": i} for i, text in enumerate(["short", "längere Wörter"])]
    own_builder("Sentences", lambda f: {"text": f.Text(), "label": np.int32}, rows, ("text", "label"))
    sentences, _ = load("tfds:sentences", cache_dir=tmp_path, download=True)
    assert sentences.inputs.tolist() == ["short", "längere Wörter"] and sentences.classes == ("0", "1")

    text = Experiment(data=DataConfig(name="tfds:sentences", dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"data.name is 'tfds:sentences'; allowed: images or numbers"):
        build_data(text)

    rows = [{"tokens": np.arange(4) + i, "label": 1} for i in range(2)]
    own_builder("Tokens", lambda f: {"tokens": f.Tensor(shape=(4,), dtype=np.int64), "label": np.int64}, rows)
    with pytest.raises(ValueError, match=r"no input feature named image; its features are \['label', 'tokens'\]"):
        load("tfds:tokens", cache_dir=tmp_path, download=True)

    own_builder("Unlabelled", lambda f: {"image": f.Tensor(shape=(2,), dtype=np.float64)}, [{"image": np.ones(2)}])
    with pytest.raises(ValueError, match=r"unlabelled/1.0.0 has no integer feature named label"):
        load("tfds:unlabelled", cache_dir=tmp_path, download=True)


def test_the_natural_partition_follows_a_feature_of_the_set(tmp_path):
    writers = ["bob", "ann", "bob", "cat", "bob", "ann", "cat", "cat"]
    rows = [{"image": np.full(2, i, np.float32), "label": i % 2, "writer": w} for i, w in enumerate(writers)]
    features = lambda f: {"image": f.Tensor(shape=(2,), dtype=np.float32), "label": np.int64, "writer": f.Text()}  # noqa: E731
    own_builder("Letters", features, rows)
    examples, _ = load("tfds:letters", cache_dir=tmp_path, download=True, natural="writer")
    assert examples.natural.tolist() == writers
    where = {"name": "tfds:letters", "dir": str(tmp_path), "partition": "natural"}
    clients = build_data(Experiment(data=DataConfig(**where, natural="writer")))
    assert [part.tolist() for part in clients.parts] == [[1, 5], [0, 2, 4], [3, 6, 7]]
    assert (clients.train.count + clients.test.count).tolist() == [2, 3, 3]
    with pytest.raises(ConfigError, match="cohort is 4; allowed: 1 to the number of clients in tfds:letters, 3"):
        build_data(Experiment(cohort=4, data=DataConfig(**where, natural="writer")))
    with pytest.raises(ValueError, match=r"natural is 'reader'; .*its are \['image', 'label', 'writer'\]"):
        build_data(Experiment(data=DataConfig(**where, natural="reader")))


def test_a_set_stored_in_another_format_is_a_clear_error(tmp_path):
    source = tmp_path / "digits"
    load("digits", cache_dir=tmp_path)
    info = next(source.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="not stored as array_record"):
        load("tfds:digits", data_dir=tmp_path, cache_dir=tmp_path / "other")
