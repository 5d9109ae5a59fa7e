"""Laws of `fedkd_jax.tasks`, of the recommender, and of text from a config's files to a round."""

import csv
import dataclasses
import functools
import json
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import CONFIG, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fedkd_jax import Layout, evaluate, init_state, simulate
from fedkd_jax.build import build_algorithm, build_data, build_models, load_tokenizer
from fedkd_jax.config import ConfigError, DataConfig, Experiment, MethodConfig, ModelConfig, to_yaml, validate
from fedkd_jax.data import encode_texts, evaluation_rows, federate, load, load_news, training_rows
from fedkd_jax.data.corpus_builders import TaggedWords
from fedkd_jax.models import TransformerConfig, load_bert, recommender
from fedkd_jax.models.recommender import Recommender
from fedkd_jax.models.transformer import HIDDEN
from fedkd_jax.tasks import SCORED_NEWS, Clients, next_character, recommendation, subset
from sims import common, compare, hardware, placement

KEY = jax.random.key(5)
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "rash", "after", "Lithium", "no", "news", "today", "and", "rain"]
SMALL = ModelConfig(kind="transformer", depth=2, pretrained=False, width=16, heads=4, inner=24, positions=16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint with a tokenizer, and a little of every corpus in its own format."""
    monkeypatch.setenv("FEDKD_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = tmp_path / "bert"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    ade, reviews, cdr = (tmp_path / name for name in ("ade_corpus_v2", "psytar", "bc5cdr"))
    for each in (ade, reviews / "all", reviews / "binary", cdr):
        each.mkdir(parents=True)
    relation = "{i}|A rash after Lithium {word}.|rash|{a}|{b}|Lithium|{c}|{d}"
    unique = [" ".join(["a", "and"][int(bit)] for bit in f"{i:04b}") for i in range(12)]
    lines = [relation.format(i=i, word=unique[i], a=2, b=6, c=13, d=20) for i in range(12)]
    (ade / "DRUG-AE.rel").write_text("\n".join(lines) + "\n")
    (ade / "ADE-NEG.txt").write_text("".join(f"{i} NEG no {unique[i]} today\n" for i in range(12)))
    for part, own in (("train", "a"), ("dev", "today"), ("test", "rain")):
        table = "".join(f"{unique[i]} {own}\t{i % 2}\n" for i in range(12))
        (reviews / "binary" / f"{part}.csv").write_text("sentences\tADR\n" + table)
        lines = f"{own}\tO\nrash\tB-ADR\n\nno\tO\n{own}\tO\n\n" * 3
        (reviews / "all" / f"{part}.txt").write_text(lines)
    for part, own in (("train", "a"), ("devel", "today"), ("test", "rain")):
        (cdr / f"{part}.tsv").write_text(f"Lithium\tB-Chemical\n{own}\tO\nrash\tB-Disease\n\n" * 4)
    for part, shift in (("train", 2), ("test", 3)):
        where = tmp_path / "posts" / part
        where.mkdir(parents=True)
        news = [f"N{i}\tx\ty\t{' '.join(WORDS[4 + (i + j) % 9] for j in range(3))}\n" for i in range(9)]
        (where / "news.tsv").write_text("".join(news))
        user = lambda i, part=part: "U9" if part == "test" and i == 4 else f"U{min(i % 5, 2)}"  # noqa: E731
        shown = lambda i, shift=shift: f"N{(i + shift) % 9}-1 N{(i + shift + 2) % 9}-0"  # noqa: E731
        rows = [f"{i}\t{user(i)}\tnow\tN{i} N{(i + 1) % 9}\t{shown(i)}\n" for i in range(9)]
        (where / "behaviors.tsv").write_text("".join(rows))
    shakespeare = tmp_path / "tiny_shakespeare"
    shakespeare.mkdir()
    rng = np.random.default_rng(0)
    speeches = [f"{who}:\n{''.join(rng.choice(list('abcdef'), 40))}\n\n" for who in ("All", "First Citizen") * 3]
    (shakespeare / "input.txt").write_text("".join(speeches))
    return tmp_path


def experiment(folder, task, name, **data):
    usual = {"length": 12}
    if task in ("classification", "recommendation"):
        usual["clients"] = 3
    if task == "recommendation":
        usual["history"] = 3
    data = DataConfig(task=task, name=name, dir=str(folder), **{**usual, **data})
    student = dataclasses.replace(SMALL, depth=1)
    checkpoint = None if task == "characters" else str(folder / "bert")
    return Experiment(batch=4, data=data, teacher=SMALL, student=student, checkpoint=checkpoint, rounds=2)


TASKS = {
    "detection": ("classification", "ade_corpus_v2", dict(partition="iid"), 3, ("precision", "recall", "f1")),
    "reviews": (
        "classification",
        "psytar",
        dict(partition="iid", split="train+test"),
        3,
        ("precision", "recall", "f1"),
    ),
    "tagging": ("tagging", "psytar+ade_corpus_v2+bc5cdr", {}, 3, ("precision", "recall", "f1")),
    "recommendation": ("recommendation", "posts", dict(partition="iid"), 3, ("mrr", "ndcg@5", "ndcg@10", "auc")),
    "readers": ("recommendation", "posts", dict(partition="natural", natural="user"), 3, ("auc",)),
    "characters": ("characters", "tiny_shakespeare", dict(test_fraction=0.5, length=6), 2, ("accuracy",)),
}


@pytest.mark.parametrize("case", TASKS)
@pytest.mark.parametrize("validation", [False, True])
def test_every_task_gives_clients_with_examples_and_a_model(folder, case, validation):
    task, name, options, size, scores = TASKS[case]
    config = experiment(folder, task, name, **options, validation=validation)
    validate(config)
    clients = build_data(config)
    assert len(clients.parts) == clients.train.start.shape[0] == clients.test.start.shape[0] == size
    assert clients.scores[-len(scores) :] == scores
    assert set(clients.scores) <= set(clients.metrics)
    algorithm = build_algorithm(config, MethodConfig(codec="svd"), clients)
    state = jax.eval_shape(lambda: init_state(algorithm, size, KEY))
    example = jax.tree.map(lambda x: x[:2], clients.test.inputs)
    for predict in algorithm.predict.values():
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.clients)
        logits = jax.eval_shape(predict, state.server, one, example).logits
        if task == "recommendation":
            assert logits.shape == clients.test.labels[:2].shape
        else:
            assert logits.shape[:-1] == clients.test.labels[:2].shape
    if validation:  # none of the test is trained on or evaluated
        whole = build_data(dataclasses.replace(config, data=dataclasses.replace(config.data, validation=False)))
        if task != "tagging":  # some corpora have a validation split of their own
            assert int(clients.train.count.sum()) < int(whole.train.count.sum())
        seen = [_rows(data) for data in (clients.train, clients.test, whole.test)]
        assert all(seen)
        assert sum(map(len, seen)) == len(set().union(*seen))


def _rows(data):
    """What is asked of each example, as a set."""
    leaves = [x.reshape(len(x), -1).tolist() for x in jax.tree.leaves(data.inputs)]
    return {tuple(map(tuple, row)) for row in zip(*leaves, strict=True)}


@pytest.mark.parametrize("case", ["detection", "tagging", "recommendation"])
def test_pretrained_embeddings_are_held_once_and_never_sent(folder, case):
    task, name, options, size, _ = TASKS[case]
    config = experiment(folder, task, name, **options)
    pretrained = {
        model: ModelConfig(kind="transformer", depth=depth) for model, depth in (("teacher", 3), ("student", 1))
    }
    config = dataclasses.replace(config, **pretrained)
    clients = build_data(config)
    _, weights = load_bert(folder / "bert")
    for algorithm, owner in (("fedkd", "teacher"), ("fedavg", "model")):
        algorithm = build_algorithm(config, MethodConfig(algorithm=algorithm), clients)
        state = jax.eval_shape(lambda algorithm=algorithm: init_state(algorithm, size, KEY))
        moving = [x.shape for x in jax.tree.leaves((state.server.params, state.clients))]
        assert moving
        assert not [shape for shape in moving if len(weights["embeddings"]["word"]["embedding"]) in shape]
        assert list(state.server.frozen) == [owner]
        own = state.server.frozen[owner]["embeddings"]
        chex.assert_trees_all_equal_shapes_and_dtypes(own, jax.tree.map(jnp.asarray, weights["embeddings"]))


def test_a_comparison_of_text_has_a_row_per_method_and_a_column_per_corpus(folder, tmp_path):
    config = experiment(folder, "tagging", "psytar+ade_corpus_v2+bc5cdr", length=4)
    methods = {
        "teacher FedAvg": MethodConfig(algorithm="fedavg"),
        "FedKD 1 layer": MethodConfig(codec="svd", depth=1),
    }
    config = dataclasses.replace(config, methods=methods, seeds=(0, 1), eval_every=2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    out = compare.main([str(tmp_path / "config.yaml"), "--devices", "1", "--out", str(tmp_path / "out")])
    with (out / "table.csv").open() as file:
        rows = {(row["method"], row["model"]): row for row in csv.DictReader(file)}
    assert list(rows) == [("teacher FedAvg", "model"), ("FedKD 1 layer", "student"), ("FedKD 1 layer", "teacher")]
    for row in rows.values():
        for column in ("precision %", "recall %", "f1 %"):
            assert " ± " in row[column]
    assert rows["teacher FedAvg", "model"]["less"] == "1.0x"
    assert float(rows["FedKD 1 layer", "student"]["less floats"][:-1]) > 1
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"], r["round"]) for r in results] == [(m, s, 2) for m in methods for s in (0, 1)]
    assert all(r["not_finite"] == 0 and r["uplink_bytes_per_client"] > 0 for r in results)
    head, _, *each = (out / "clients.md").read_text().splitlines()
    assert head == "| method | model | psytar | ade_corpus_v2 | bc5cdr |"
    assert len(each) == len(rows)
    assert "4 tokens" in (out / "remarks.txt").read_text()
    assert (out / "f1.png").stat().st_size > 10_000


def test_more_states_than_memory_are_told_before_they_are_made(folder, monkeypatch):
    config = experiment(folder, "recommendation", "posts", partition="natural", natural="user")
    clients = build_data(config)
    algorithms = {"FedKD": build_algorithm(config, MethodConfig(), clients)}
    chosen = lambda store: placement.choose_stores(config, common.Options(store=store), algorithms, clients)  # noqa: E731
    assert chosen("auto") == chosen("device") == {"FedKD": "device"}
    assert (chosen("host"), chosen("disk")) == ({"FedKD": "host"}, {"FedKD": "disk"})
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"methods\.FedKD keeps states of 3 clients, .* allowed: .* memory, 10\.00 kB"):
        chosen("device")
    assert chosen("auto") == {"FedKD": "host"}
    monkeypatch.setattr(hardware, "host_memory_bytes", lambda: 10_000)
    assert chosen("auto") == {"FedKD": "disk"}


def test_abstracts_are_read_after_titles(folder):
    config = experiment(folder, "recommendation", "posts", partition="iid")
    for part in ("train", "test"):
        path = folder / "posts" / part / "news.tsv"
        path.write_text("".join(f"{line}\train today\n" for line in path.read_text().splitlines()))
    tables = []
    for abstracts in (False, True):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, abstracts=abstracts))
        model = build_models(config, build_data(config))["teacher"]
        tables.append(model.init(KEY)["news"])
    end = tables[0] == WORDS.index("[SEP]")
    assert (np.argmax(tables[1] == WORDS.index("[SEP]"), 1)[1:] == np.argmax(end, 1)[1:] + 2).all()
    words = [WORDS.index("rain"), WORDS.index("today")]
    for row, at in zip(np.asarray(tables[1])[1:], np.argmax(end, 1)[1:], strict=True):
        assert row[at : at + 2].tolist() == words


def test_a_corpus_is_a_client_with_tags_of_its_own(folder):
    clients = build_data(experiment(folder, "tagging", "psytar+ade_corpus_v2+bc5cdr"))
    assert clients.names == ("psytar", "ade_corpus_v2", "bc5cdr")
    assert clients.classes[0] == "O"
    assert len(set(clients.classes)) == len(clients.classes)
    for data in (clients.train, clients.test):
        for i, kinds in enumerate([{"ADR"}, {"Drug", "Effect"}, {"Chemical", "Disease"}]):
            rows = slice(data.start[i], data.start[i] + data.count[i])
            used, labels = data.inputs["classes"][rows], data.labels[rows]
            assert {clients.classes[t][2:] for t in np.unique(labels[labels > 0])} == kinds
            assert np.take_along_axis(used, np.maximum(labels, 0), axis=1).all()
            others = [j for j, name in enumerate(clients.classes) if name[2:] not in kinds and name != "O"]
            known = set(TaggedWords.TYPES["psytar"]) if i == 0 else kinds
            assert not used[:, [j for j in others if clients.classes[j][2:] not in known]].any()


def test_what_belongs_together_is_dealt_and_split_as_one(folder):
    config = experiment(folder, "classification", "ade_corpus_v2", partition="iid", natural="document", clients=2)
    validate(config)
    clients = build_data(config)
    many = dataclasses.replace(config, data=dataclasses.replace(config.data, clients=7))
    assert (build_data(many).test.count == 0).any()  # a document or none
    whole, _ = load("ade_corpus_v2", data_dir=folder, test_split=None, natural="document")
    assert np.sort(np.concatenate(clients.parts)).tolist() == list(range(len(whole)))
    owners = [set(whole.natural[part]) for part in clients.parts]
    assert not owners[0] & owners[1]
    text = {
        tuple(row): whole.natural[i]
        for i, row in enumerate(encode_texts(whole.inputs, load_tokenizer(config), 12).tolist())
    }
    sides = [{text[tuple(row)] for row in data.inputs.tolist()} for data in (clients.train, clients.test)]
    assert not sides[0] & sides[1]


def test_test_sentences_have_a_length_of_their_own_and_lost_words_are_told(folder):
    config = experiment(folder, "tagging", "psytar+bc5cdr", length=4)
    short = build_data(config)
    assert short.remarks
    assert all("4 tokens" in remark for remark in short.remarks)
    longer = build_data(dataclasses.replace(config, data=dataclasses.replace(config.data, test_length=40)))
    assert longer.test.labels.shape[1] == 40
    assert longer.train.labels.shape[1] == 4
    assert not longer.remarks
    lost = (longer.test.labels >= 0).sum() - (short.test.labels >= 0).sum()
    assert lost == sum(int(remark.split(": ")[1].split(" ")[0]) for remark in short.remarks)


@pytest.mark.parametrize("secret", ["test", "both"])
def test_evaluated_is_the_split_that_has_labels(folder, secret):
    config = experiment(folder, "recommendation", "posts", partition="iid")
    news = load_news("posts", data_dir=folder)
    hide = lambda shown: dataclasses.replace(shown, clicked=np.full_like(shown.clicked, -1))  # noqa: E731
    test = news.splits["test"]
    splits = {"train": news.splits["train"], "dev": hide(test) if secret == "both" else test, "test": hide(test)}
    everything = lambda users, readers: ([np.arange(len(users))], [np.arange(len(readers))])  # noqa: E731

    def make(splits):
        return recommendation(dataclasses.replace(news, splits=splits), everything, load_tokenizer(config), 8)

    if secret == "test":
        chex.assert_trees_all_equal(make(splits).test, make(news.splits).test)
    else:
        with pytest.raises(ValueError, match=r"splits train, dev, test; allowed: a test or a dev whose .* labels"):
            make(splits)
    with pytest.raises(ValueError, match=r"splits test; allowed: train"):
        make({"test": test})


def test_a_reader_of_the_training_rows_is_a_client_with_his_test_rows(folder):
    task, name, options, *_ = TASKS["readers"]
    clients = build_data(experiment(folder, task, name, **options))
    splits = load_news(name, data_dir=folder).splits
    users = np.unique(splits["train"].user)
    assert set(splits["test"].user) > set(users)  # who is not trained on is not evaluated
    train, _, who = training_rows(splits["train"], history=3, seed=0)
    test, _, readers, _ = evaluation_rows(splits["test"], history=3)
    for data, rows, owner in ((clients.train, train, who), (clients.test, test, readers)):
        assert len(set(data.count.tolist())) > 1
        for i, user in enumerate(users):
            own = slice(data.start[i], data.start[i] + data.count[i])
            of_user = jax.tree.map(lambda x, kept=owner == user: x[kept], rows)
            chex.assert_trees_all_equal(jax.tree.map(lambda x, own=own: x[own], data.inputs), of_user)


def test_cut_impressions_are_told_and_long_rows_are_evaluated_a_few_at_a_time(folder):
    whole = build_data(experiment(folder, "recommendation", "posts", partition="iid"))
    assert whole.test.labels.shape[1] == 2
    cut = build_data(experiment(folder, "recommendation", "posts", partition="iid", candidates=1))
    assert cut.test.labels.shape[1] == 1
    assert "9 of 9 impressions were cut to 1 candidates" in cut.remarks
    assert not [remark for remark in whole.remarks if "candidates" in remark]
    assert whole.eval_batch == 256
    long = build_data(experiment(folder, "recommendation", "posts", partition="iid", history=4000))
    assert 1 <= long.eval_batch < 5
    assert long.eval_batch * 4002 <= SCORED_NEWS


def test_clients_without_any_test_example_are_told_so(folder):
    config = experiment(folder, "classification", "ade_corpus_v2", partition="iid", clients=9, examples=9)
    with pytest.raises(ValueError, match="the test part of 9 clients has no example; allowed: one at least"):
        build_data(config)


def test_what_a_reader_of_the_results_has_to_know_is_told(folder):
    detection = experiment(folder, "classification", "ade_corpus_v2", partition="iid", length=8)
    assert build_data(detection).remarks == ("12 of 24 texts are cut to 8 tokens",)  # all that are positive
    task, name, options, *_ = TASKS["readers"]
    readers = build_data(experiment(folder, task, name, **options)).remarks
    splits = load_news(name, data_dir=folder).splits
    learned = {}
    for i, user in enumerate(splits["train"].user):
        learned.setdefault(user, set()).update(splits["train"].history[2 * i : 2 * i + 2].tolist())
    clicked = splits["test"].candidates[::2].tolist()
    known = sum(news in learned.get(user, ()) for user, news in zip(splits["test"].user, clicked, strict=True))
    assert 0 < known < 9
    assert readers == (
        f"{known} of 8 held-out impressions have a click that the same reader's training histories hold",
        "1 of 9 impressions are of readers without training rows and are not evaluated",
    )
    behaviors = folder / "posts" / "test" / "behaviors.tsv"
    behaviors.write_text(behaviors.read_text().replace("N0", "N99"))
    missing = build_data(experiment(folder, task, "posts", partition="iid")).remarks
    assert missing[0].endswith("of 36 news read or shown in held-out impressions are in no news.tsv: without text")
    assert int(missing[0].split(" ")[0]) == behaviors.read_text().count("N99")


def test_models_that_compare_attention_have_equal_heads(folder):
    config = experiment(folder, "classification", "ade_corpus_v2", partition="iid")
    pretrained = dataclasses.replace(config, teacher=dataclasses.replace(SMALL, pretrained=True, heads=2))
    other = dataclasses.replace(pretrained, student=dataclasses.replace(config.student, heads=8))
    clients = build_data(config)
    with pytest.raises(ConfigError, match=r"student\.heads is 8; allowed: the teacher's 4"):
        build_algorithm(other, MethodConfig(), clients)
    for method in (MethodConfig(hidden=False), MethodConfig(attention=False)):
        build_algorithm(dataclasses.replace(other, methods={"a": method}), method, clients)


def test_a_round_of_fedkd_trains_sends_and_is_evaluated(folder):
    """Of tagging the comparison above says so."""
    task, name, options, size, scores = TASKS["recommendation"]
    config = experiment(folder, task, name, **options)
    clients: Clients = build_data(config)
    algorithm = build_algorithm(config, MethodConfig(codec="svd"), clients)
    state, history = simulate(algorithm, size, clients.train, KEY, rounds=2, test=clients.test, metrics=clients.metrics)
    assert history.rounds.finite.all()
    assert (history.rounds.uplink_bytes > 0).all()
    tables = [x for x in jax.tree.leaves(state.server.frozen) if x.dtype == jnp.int32]
    assert len(tables) == 1  # the news, once for everybody
    pooled = history.evaluations[-1]["pooled"]
    for model in ("teacher", "student"):
        assert 0 <= pooled[model][scores[-1]] <= 1
        assert history.evaluations[-1][model][scores[-1]].shape == (size,)


def test_texts_need_a_transformer_and_a_transformer_texts(folder):
    text = experiment(folder, "classification", "ade_corpus_v2", partition="iid")
    with pytest.raises(ConfigError, match=r"data\.name is 'ade_corpus_v2'; allowed: images or numbers"):
        build_data(dataclasses.replace(text, teacher=ModelConfig(), student=ModelConfig()))
    with pytest.raises(ConfigError, match=r"data\.name is 'digits'; allowed: a set of texts"):
        build_data(dataclasses.replace(text, data=dataclasses.replace(text.data, name="digits")))
    deep = dataclasses.replace(text, teacher=dataclasses.replace(SMALL, pretrained=True, depth=4))
    with pytest.raises(ConfigError, match=r"teacher\.depth is 4; allowed: 1 to the checkpoint's 3 layers"):
        build_algorithm(deep, MethodConfig(), build_data(text))


@settings(max_examples=10)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(2, 9))
def test_a_speaker_is_a_client_where_he_says_enough(pieces, least):
    speeches = [(f"who {i}", "a" * (count + 1)) for i, count in enumerate(pieces)]  # `count` pieces of two characters
    said = {f"who {i}": count for i, count in enumerate(pieces) if count >= least}
    if not said:
        with pytest.raises(ValueError, match=rf"min_examples is {least}; allowed: 2 to {max(pieces)}"):
            next_character(speeches, 0.5, 0, 1, min_examples=least)
        return
    clients = next_character(speeches, 0.5, 0, 1, min_examples=least)
    assert dict(zip(clients.names, map(len, clients.parts), strict=True)) == said
    assert (np.array(clients.train.count) + clients.test.count).tolist() == list(said.values())


@given(st.integers(0, 50), st.integers(1, 60), strategies.seeds)
def test_a_subset_is_drawn_once_without_replacement(n, examples, seed):
    rows = subset(n, examples, seed)
    assert len(rows) == len(set(rows.tolist())) == min(n, examples)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, subset(n, examples, seed))


# ---- the recommender ---------------------------------------------------------------------------------------------------


@functools.cache
def scored():
    rng = np.random.default_rng(0)
    news = np.array([[0] * 6, *([*rng.integers(1, 30, k), *[0] * (6 - k)] for k in rng.integers(1, 7, 11))], np.int32)
    model = recommender(TransformerConfig(**{**vars(CONFIG), "layers": 1}), news)
    params = model.init(KEY)
    query = jax.random.normal(KEY, params["user_pooling"]["query"].shape)
    params["user_pooling"]["query"] = params["pooling"]["query"] = query  # else pooling is a plain mean
    return model, jax.jit(model.apply), params


@settings(max_examples=15)
@given(strategies.seeds, st.integers(1, 4))
def test_scores_depend_on_what_was_read_not_on_order_padding_or_other_candidates(seed, length):
    _, apply, params = scored()
    rng = np.random.default_rng(seed)
    history = np.zeros((2, 4), np.int32)
    history[:, :length] = rng.integers(1, 12, (2, length))
    candidates = rng.integers(1, 12, (2, 3)).astype(np.int32)
    out = apply(params, {"history": history, "candidates": candidates})
    shuffled = history[:, rng.permutation(4)]
    again = apply(params, {"history": shuffled, "candidates": candidates[:, ::-1]})
    np.testing.assert_allclose(out.logits, again.logits[:, ::-1], rtol=1e-4, atol=1e-5)
    fewer = apply(
        params, {"history": history, "candidates": np.where([True, False, True], candidates, -1).astype(np.int32)}
    )
    np.testing.assert_allclose(out.logits[:, ::2], fewer.logits[:, ::2], rtol=1e-4, atol=1e-5)
    assert not fewer.mask[:, 5].any()
    assert (fewer.logits[:, 1] == HIDDEN).all()
    assert not out.mask[:, length:4].any()
    # a reader of one news: the score is the inner product of the two news
    if length == 1:
        mirrored = apply(
            params, {"history": np.pad(candidates[:, :1], ((0, 0), (0, 3))), "candidates": np.tile(history[:, :1], 3)}
        )
        np.testing.assert_allclose(out.logits[:, 0], mirrored.logits[:, 0], rtol=1e-4, atol=1e-5)


@functools.cache
def scored_at_once():
    """Rows of some inputs, and those of two clients under `vmap`; news are encoded four at a time."""
    model, _, params = scored()

    @mock.patch("fedkd_jax.models.recommender.ENCODED_TOKENS", 4 * 6)
    def both(rows, part):
        two = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), rows)
        return model.scorer(params, rows)(part), jax.vmap(lambda rows: model.scorer(params, rows)(rows))(two)

    return jax.jit(both)


@settings(max_examples=15)
@given(strategies.seeds, st.sampled_from([1, 3, 12]))
def test_news_encoded_once_give_the_scores_of_news_encoded_row_by_row(seed, catalogue):
    _, apply, params = scored()
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(0, catalogue, shape).astype(np.int32)  # noqa: E731
    rows = {"history": draw(5, 4), "candidates": draw(5, 3) - (draw(5, 3) == 0)}
    of_part, of_two = scored_at_once()(rows, jax.tree.map(lambda x: x[1:3], rows))
    expected = apply(params, rows).logits
    np.testing.assert_allclose(of_part, expected[1:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_two, jnp.stack([expected, expected[::-1]]), rtol=1e-4, atol=1e-5)


@mock.patch("fedkd_jax.models.recommender.ENCODED_TOKENS", 6)  # one news at a time
def test_for_evaluation_each_news_is_encoded_once_whatever_the_impressions(monkeypatch):
    model, _, params = scored()
    encoded = []
    whole = Recommender.encode

    def encode(self, tokens):
        jax.debug.callback(lambda x: encoded.extend(map(tuple, x.tolist())), tokens)
        return whole(self, tokens)

    monkeypatch.setattr(Recommender, "encode", encode)
    rows = {"history": np.full((40, 4), 7, np.int32), "candidates": np.tile(np.array([7, 3, -1], np.int32), (40, 1))}
    score = model.scorer(params, rows)
    assert np.isfinite(score(rows)).all()
    jax.effects_barrier()
    assert len(encoded) == len(set(encoded)) == 3  # 7, 3, and the one that nobody knows
    elsewhere = {"history": np.full((1, 4), 7, np.int32), "candidates": np.array([[3, 5]], np.int32)}
    assert np.isnan(score(elsewhere)).tolist() == [[False, True]]


def test_evaluation_of_clients_is_that_of_a_model_without_a_scorer(folder):
    config = experiment(folder, "recommendation", "posts", partition="natural", natural="user")
    clients = build_data(config)
    algorithm = build_algorithm(config, MethodConfig(algorithm="local_only"), clients, Layout(chunk=2))
    state = init_state(algorithm, len(clients.parts), KEY)
    plain = {
        name: dataclasses.replace(own, model=own.model._replace(scorer=None)) for name, own in algorithm.predict.items()
    }
    results = [
        evaluate(algorithm._replace(predict=predict), state, clients.test, metrics=clients.metrics, batch=2)
        for predict in (algorithm.predict, plain)
    ]
    assert all(own.model.scorer is not None for own in algorithm.predict.values())
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_a_federated_reader_is_a_row_of_its_tables():
    """Rows are indices: data for a hundred impressions of a catalogue do not hold a hundred texts."""
    rows = {"history": np.zeros((100, 50), np.int32), "candidates": np.zeros((100, 5), np.int32)}
    data = federate(rows, np.zeros(100, np.int32), [np.arange(100)])
    assert sum(x.nbytes for x in jax.tree.leaves(data.inputs)) == 100 * 55 * 4
