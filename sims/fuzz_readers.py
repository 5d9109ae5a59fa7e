"""The readers of files, and valid files that `sims.fuzz` changes. Each reader goes as far as a program goes with what it has
read: corpora are tagged, texts tokenised, configs validated, checkpoints loaded, stores filled.
"""

import copy
import gzip
import io
import json
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import safetensors.numpy
import tokenizers
import yaml

from fedkd_jax import HostStore, load_bert, local_only, mlp
from fedkd_jax.build import build_participation
from fedkd_jax.config import Experiment, ParticipationConfig, load_config, to_yaml
from fedkd_jax.data import encode_texts, load_tokenizer
from fedkd_jax.data.builders import read_idx
from fedkd_jax.data.news import read_behaviors, read_news
from fedkd_jax.data.readers import read_ade, read_psytar, read_relations, read_speeches, read_tagged, tag_spans
from fedkd_jax.journal import Journal
from sims.fuzz import Change, Target
from sims.report import read_csv, read_runs

BERT = {
    "model_type": "bert",
    "vocab_size": 9,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 6,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}

# ---- changes of what a file means, not of its bytes ------------------------------------------------------------------------

HOSTILE = [
    None,
    True,
    False,
    -1,
    0,
    2**31,
    2**63,
    -(2**70),
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\0",
    "é" * 300,
    [],
    {},
]
HOSTILE += [[[]] * 9, {"a": {"b": {}}}, [0, -1], [1, 0], [0, 2**62], "../x", "\ud800"]


def _changed(rng: random.Random, value: Any) -> Any:
    """One thing within, however deep, less, twice, or another."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            places.append((x, key))
            walk(x[key])

    walk(value)
    if not places:
        return rng.choice(HOSTILE)
    within, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        del within[key]
    elif what == 1 and isinstance(within, dict):
        within[rng.choice(("", "x", f"{key}s", str(key)))] = within.pop(key)
    elif what == 2:
        within[key] = copy.deepcopy(rng.choice([x[k] for x, k in places]))
    else:
        within[key] = rng.choice(HOSTILE)
    return value


def _json(rng: random.Random, data: bytes, other: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = _changed(rng, value)
    return json.dumps(value).encode()


def _json_lines(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], _json(rng, lines[i], lines[i]), *lines[i + 1 :]])


def _yaml(rng: random.Random, data: bytes, other: bytes) -> bytes:
    value = _changed(rng, yaml.safe_load(data))
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def _yaml_tags(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Tags, anchors and aliases, where values are."""
    tags = (
        "!!int",
        "!!float",
        "!!bool",
        "!!timestamp",
        "!!binary",
        "!!set",
        "!!omap",
        "!!python/object:os.system",
        "&a",
        "*a",
        "<<:",
    )
    lines = data.decode().split("\n")
    places = [i for i, line in enumerate(lines) if ": " in line]
    for i in rng.sample(places, min(2, len(places))):
        lines[i] = lines[i].replace(": ", f": {rng.choice(tags)} ", 1)
    bomb = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
    merge = "\n".join(
        ["m0: &m0 {x: 1}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12))]
    )
    return rng.choice(
        ("\n".join(lines), bomb, merge, f"{data.decode()}\nrounds: 3", "x: &x [*x]", "x: &x {<<: *x}")
    ).encode()


def _header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of safetensors: another header before the same tensors, or another length of it."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([name for name in head if name != "__metadata__"])
    tensor = head[name]
    start, stop = tensor["data_offsets"]
    offsets = (
        [stop, start],
        [start - 4, stop - 4],
        [start, stop + 4],
        [0, len(body)],
        [-4, 4],
        [2**63, 2**63 + 4],
        [start, start],
    )
    what = rng.randrange(6)
    if what == 0:
        tensor["data_offsets"] = list(rng.choice(offsets))
    elif what == 1:
        tensor["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I8", "I64", "BOOL", "U64", "C64", "X", "")
        )
    elif what == 2:
        tensor["shape"] = rng.choice(
            ([], [0], [-1], [2**40, 2**40], [*tensor["shape"], 1], tensor["shape"][::-1], [2**63])
        )
    elif what == 3:
        head = _changed(rng, head)
    elif what == 4:
        head[f"x{name}"] = rng.choice(list(head.values()))
    text = json.dumps(head).encode()
    size = len(text) if what != 5 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + text + body


def _values(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of safetensors: tensors that are valid but not what was wanted."""
    tensors = safetensors.numpy.load(data)
    name = rng.choice(list(tensors))
    x = tensors[name]
    tensors[name] = rng.choice(
        (x * np.nan, x.astype(np.float16), x.astype(np.int8), x[None], x.ravel(), x[:0], x + np.inf)
    )
    if rng.random() < 0.2:
        tensors[f"bert.{name}"] = tensors.pop(name)
    return safetensors.numpy.save(tensors)


def _archive(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of a store's index: other arrays under the same names, compressed ones, ones that need pickle."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    x, out = arrays[name], io.BytesIO()
    others = [
        x[:0] if x.ndim else x[None],
        x.astype(object),
        np.array([x, x]),
        np.array(["../x", "/etc/passwd", "rows.bin"]),
    ]
    if x.dtype.kind in "iu":
        wide = x.astype(np.int64)
        others += [wide - 9, wide + 2**40, -wide, wide * 0, x.astype(np.float64), x.astype(np.uint64) + 2**63]
    arrays[name] = rng.choice(others)
    if rng.random() < 0.2:
        del arrays[name]
    (np.savez_compressed if rng.random() < 0.2 else np.savez)(out, **arrays)
    return out.getvalue()


def _npy(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another header before the same numbers, an array of another type, or an archive."""
    out, trace = io.BytesIO(), np.load(io.BytesIO(data))
    arrays = (
        trace.astype(object),
        trace.astype(float),
        trace[0],
        trace[:0],
        trace[None],
        trace & False,
        trace.view("S1"),
    )
    if rng.random() < 0.3:
        np.save(out, rng.choice(arrays), allow_pickle=True)
        return out.getvalue()
    if rng.random() < 0.1:
        np.savez(out, trace)
        return out.getvalue()
    shape = rng.choice(
        (
            "(2, 3)",
            "(2**60, 2)",
            f"({10**12}, {10**6})",
            "(-1, 6)",
            "(6,)",
            "()",
            "(0, 6)",
            "((((",
            "(2, 3L)",
            "x",
            "[2, 3]",
        )
    )
    kind = rng.choice(("'|b1'", "'|O'", "'<f8'", "'<U999999999'", "[('a', '|b1')]", "'x'", "None"))
    head = f"{{'descr': {kind}, 'fortran_order': {rng.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    size = rng.choice((len(head), 0, 65535))
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + head.encode() + data[-6:]


def _zipped(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Of a gzip: what is inside is changed, or is followed by a lot of it."""
    raw = bytearray(gzip.decompress(data))
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(min(20, len(raw)))] = rng.choice((0, 1, 8, 28, 127, 128, 255))
    more = b"\0" * rng.choice((0, 0, 0, 1, 10**7))
    return gzip.compress(bytes(raw) + more, 1)


# ---- targets ---------------------------------------------------------------------------------------------------------------


def _file(now: pathlib.Path, read: Callable[[pathlib.Path], object]) -> Callable[[int, bytes], object]:
    def of_bytes(i: int, data: bytes) -> object:
        now.write_bytes(data)
        return read(now)

    return of_bytes


def relations(now: pathlib.Path) -> Target:
    """DRUG-AE.rel, as far as the words' tags.

    >>> import tempfile
    >>> target = relations(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])[0]
    (['Lithium', 'coma', '.'], ['B-Drug', 'B-Effect', 'O'])
    """
    lines = "7|Lithium coma.|coma|18|22|Lithium|10|17", "8|Rash, a rash on aspirin.|rash|15|19|aspirin|23|30"
    lines += ("9|Fièvre due to Äb.|Fièvre|4|10|Äb|18|20", "9|Fièvre due to Äb.|due|11|14|Äb|18|20")
    read = lambda path: [tag_spans(text, spans) for (_, text), spans in read_relations(path).items()]  # noqa: E731
    return Target(["\n".join(lines).encode(), lines[0].encode() + b"\r\n"], _file(now, read), (ValueError,))


def negatives(now: pathlib.Path) -> Target:
    """ADE-NEG.txt, beside a DRUG-AE.rel.

    >>> import tempfile
    >>> target = negatives(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> len(target.read(0, target.valid[0]))
    3
    """
    good = now.with_suffix(".rel")
    good.write_text("7|Lithium coma.|coma|18|22|Lithium|10|17\n")
    text = b"7 NEG A case report.\n8 NEG Nothing is NEG in it.\n"
    return Target([text], _file(now, lambda path: read_ade(good, path)), (ValueError,))


def psytar(now: pathlib.Path) -> Target:
    """The tables of PsyTAR.

    >>> import tempfile
    >>> target = psytar(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])[1]
    ('It "works"', 0)
    """
    text = 'id\tsentences\tADR\tWD\n1\tI felt dizzy.\t1\t0\n2\t"It ""works"""\t0\t0\n3\t"Two\nlines"\t1\t1\n'
    return Target([text.encode()], _file(now, read_psytar), (ValueError,))


def tagged(now: pathlib.Path) -> Target:
    """Words with IOB tags.

    >>> import tempfile
    >>> target = tagged(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> len(target.read(0, target.valid[0]))
    2
    """
    text = "No\tO\nlung\tB-Disease\ncancer\tI-Disease\n\nFièvre\tI-Disease\n.\tO\n"
    return Target([text.encode()], _file(now, lambda path: read_tagged(path, ["Disease"])), (ValueError,))


def speeches(now: pathlib.Path) -> Target:
    """Plays.

    >>> import tempfile
    >>> target = speeches(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> len(target.read(0, target.valid[0]))
    3
    """
    text = "All:\nResolved.\nresolved.\n\nFirst Citizen:\nHe said:\nNo.\n\nNobody:\n\n"
    return Target([text.encode()], _file(now, read_speeches), (ValueError,))


def news(now: pathlib.Path) -> Target:
    """news.tsv of MIND.

    >>> import tempfile
    >>> target = news(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> len(target.read(0, target.valid[0]))
    2
    """
    text = "N7\tsports\tgolf\tA hole in one\tHow\thttps://x\t[]\t[]\nN8\tnews\tworld\tRain\n"
    return Target([text.encode()], _file(now, lambda path: list(read_news(path))), (ValueError,))


def behaviors(now: pathlib.Path) -> Target:
    """behaviors.tsv of MIND, as far as the users' array.

    >>> import tempfile
    >>> target = behaviors(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0]).tolist()
    ['U1', 'U2']
    """
    text = "1\tU1\t11/11/2019 9:05:58 AM\tN8 N9\tN8-0 N7-1\n2\tU2\t11/12/2019 9:05:58 AM\t\tN7 N9\n"

    def read(path: pathlib.Path) -> np.ndarray:
        rows = list(read_behaviors(path))
        assert all(len(row["clicked"]) == len(row["candidates"].split(" ")) for row in rows), (
            "a label for each candidate"
        )
        return np.array([row["user"] for row in rows])

    return Target([text.encode()], _file(now, read), (ValueError,))


def idx(now: pathlib.Path) -> Target:
    """Gzipped idx files of images.

    >>> import tempfile
    >>> target = idx(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0]).shape
    (2, 3, 2)
    """
    raw = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2, *range(12)])
    return Target([gzip.compress(raw)], _file(now, read_idx), (ValueError,), {"inside": _zipped})


def config(now: pathlib.Path) -> Target:
    """Configs, validated.

    >>> import tempfile
    >>> target = config(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(1, target.valid[1]).rounds
    3
    """
    small = b"rounds: 3\ndata: {alpha: 0.1}\nmethods:\n  a: &a {codec: svd, t_start: 0.9}\n  b: {<<: *a, t_end: 0.9}\n"
    kinds: dict[str, Change] = {"values": _yaml, "tags": _yaml_tags}
    return Target([to_yaml(Experiment()).encode(), small], _file(now, load_config), (ValueError,), kinds)


def _bert(rng: np.random.Generator) -> dict[str, np.ndarray]:
    width, inner = BERT["hidden_size"], BERT["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (BERT["vocab_size"], width),
        "embeddings.position_embeddings.weight": (BERT["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (BERT["type_vocab_size"], width),
    }
    norms = "embeddings.LayerNorm", *(f"encoder.layer.0.{name}.LayerNorm" for name in ("attention.output", "output"))
    square = (f"encoder.layer.0.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense"))
    sizes = dict.fromkeys(square, (width, width))
    sizes |= {"encoder.layer.0.intermediate.dense": (inner, width), "encoder.layer.0.output.dense": (width, inner)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, (out, into) in sizes.items():
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _in_checkpoint(now: pathlib.Path, name: str) -> Callable[[int, bytes], object]:
    folder = now.with_suffix(".bert")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BERT))
    safetensors.numpy.save_file(_bert(np.random.default_rng(0)), folder / "model.safetensors")

    def of_bytes(i: int, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return load_bert(folder)

    return of_bytes


def bert_config(now: pathlib.Path) -> Target:
    """A checkpoint's config.json.

    >>> import tempfile
    >>> target = bert_config(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])[0].width
    4
    """
    valid = [json.dumps(BERT).encode(), json.dumps(BERT, indent=1).encode("utf-8-sig")]
    kinds: dict[str, Change] = {"values": lambda rng, data, other: _json(rng, valid[0], other)}
    return Target(valid, _in_checkpoint(now, "config.json"), (ValueError,), kinds)


def bert(now: pathlib.Path) -> Target:
    """A checkpoint's model.safetensors.

    >>> import tempfile
    >>> target = bert(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> sorted(target.read(0, target.valid[0])[1])
    ['embeddings', 'layers']
    """
    valid = [safetensors.numpy.save(_bert(np.random.default_rng(i))) for i in (0, 1)]
    kinds: dict[str, Change] = {"header": _header, "more headers": _header, "tensors": _values}
    return Target(valid, _in_checkpoint(now, "model.safetensors"), (ValueError,), kinds)


def tokenizer(now: pathlib.Path) -> Target:
    """A checkpoint's tokenizer.json, and texts that it then reads.

    >>> import tempfile
    >>> target = tokenizer(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0]).tolist()
    [[2, 5, 7, 3, 0, 0], [2, 4, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0]]
    """
    folder = now.with_suffix(".tokenizer")
    folder.mkdir(exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "head", "a", "##ache", "rash"]
    valid = []
    for model in (tokenizers.models.WordPiece, tokenizers.models.WordLevel):
        made = tokenizers.Tokenizer(model({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.BertNormalizer()
        made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        made.add_special_tokens(pieces[:4])
        valid.append(made.to_str().encode())

    def read(i: int, data: bytes) -> object:
        (folder / "tokenizer.json").write_bytes(data)
        return encode_texts(["a rash", "head", ""], load_tokenizer(folder), 6)

    return Target(valid, read, (ValueError,), {"values": _json, "more values": _json})


def trace(now: pathlib.Path) -> Target:
    """Traces of who was there when, as NumPy saves them.

    >>> import tempfile
    >>> target = trace(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> callable(target.read(0, target.valid[0]).available)
    True
    """
    out = io.BytesIO()
    np.save(out, np.array([[True, False, True], [False, True, True]]))
    config = Experiment(participation=ParticipationConfig(trace=str(now)))
    kinds: dict[str, Change] = {"header": _npy, "more headers": _npy}
    return Target([out.getvalue()], _file(now, lambda path: build_participation(config)), (ValueError,), kinds)


def index(now: pathlib.Path) -> Target:
    """What a store left in its folder: the index of its rows.

    >>> import tempfile
    >>> target = index(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])
    2
    """
    algorithm, key = local_only(mlp((4, 2)), optimizer=optax.sgd(0.1), batch=2), jax.random.key(0)
    folder, store = now.with_suffix(".store"), HostStore()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    store.open(algorithm, key, 9)
    opened = vars(store).copy()
    store.write(np.array([7, 3]), store.take(np.array([7, 3])))
    store.save(folder, 1)
    path = folder / "index-1.npz"
    own = {
        name: value
        for name, value in opened.items()
        if name in ("_shapes", "_key", "_population", "layout", "row_bytes", "_spans")
    }

    def read(i: int, data: bytes) -> int:
        path.write_bytes(data)
        new = HostStore()
        vars(new).update(own)
        new.load(folder, [1], 1)
        return len(new)

    kinds: dict[str, Change] = {"arrays": _archive, "more arrays": _archive}
    return Target([path.read_bytes()], read, (ValueError, OSError), kinds)


def journal(now: pathlib.Path) -> Target:
    """What a run noted down after its last rounds; what is not whole does not count.

    >>> import tempfile
    >>> target = journal(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])[0]["round"]
    3
    """
    folder = now.with_suffix(".journal")
    folder.mkdir(exist_ok=True)
    made = Journal(folder)
    made.write({"round": 3, "index": []}, [np.arange(5)])
    made.close()
    path = made.paths[0]

    def read(i: int, data: bytes) -> object:
        path.write_bytes(data)
        return Journal(folder).newest()

    return Target([path.read_bytes()], read, ())


def records(now: pathlib.Path) -> Target:
    """The records of a run, as `sims.report` reads them.

    >>> import tempfile
    >>> target = records(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> list(target.read(0, target.valid[0]))
    ['FedKD']
    """
    folder = now.with_suffix(".run")
    folder.mkdir(exist_ok=True)
    (folder / "table.csv").write_text("method,accuracy %\nFedKD,90\n")
    row = {
        "method": "FedKD",
        "seed": 0,
        "round": 1,
        "seconds": 0.5,
        "model/accuracy": None,
        "model/accuracy_of_client": [0.5, None],
    }
    text = "\n".join(json.dumps({**row, "round": i}) for i in range(3)).encode() + b"\n"

    def read(i: int, data: bytes) -> object:
        (folder / "metrics.jsonl").write_bytes(data)
        return read_runs(folder)

    return Target([text], read, (ValueError, FileNotFoundError), {"values": _json_lines})


def table(now: pathlib.Path) -> Target:
    """The tables of a run.

    >>> import tempfile
    >>> target = table(pathlib.Path(tempfile.mkdtemp(), "now"))
    >>> target.read(0, target.valid[0])[0]["method"]
    'FedKD'
    """
    text = b'method,model,accuracy %\nFedKD,student,90.1 \xc2\xb1 0.2\n"a,b",teacher,"9""1"\n'
    return Target([text], _file(now, read_csv), (ValueError,))


TARGETS: dict[str, Callable[[pathlib.Path], Target]] = {
    target.__name__: target
    for target in (
        relations,
        negatives,
        psytar,
        tagged,
        speeches,
        news,
        behaviors,
        idx,
        config,
        bert_config,
        bert,
        tokenizer,
        trace,
        index,
        journal,
        records,
        table,
    )
}
