"""Pages of runs: nothing missing, nothing from elsewhere, safe and the same each time; a real browser opens them."""

import html
import html.parser
import json
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_jax.config import Experiment, from_dict
from fedkd_jax.figures import bars_plot
from fedkd_jax.page import Section, Table, Text, render
from fedkd_jax.report import table_rows
from sims import common, report, spectrum

BROWSER_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
CONFIG = {
    "name": "a <b> & $\\bad{$",
    "rounds": 2,
    "eval_every": 1,
    "steps": 1,
    "seeds": [0, 1],
    "data": {"name": "digits", "clients": 4, "alpha": 1.0},
    "teacher": {"hidden": [8]},
    "student": {"hidden": [8]},
    "methods": {
        "FedAvg": {"algorithm": "fedavg"},
        "<script>alert(1)</script>": {"algorithm": "fedkd", "codec": "svd"},
        "another T": {"algorithm": "fedkd", "codec": "svd", "t_start": 0.8, "t_end": 0.8},
        f"_{'long ' * 20}$_{{$": {"algorithm": "fedkd", "codec": "svd", "t_start": 0.8, "t_end": 0.98},
        "alone": {"algorithm": "local_only"},
    },
}


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(page: str) -> _Reader:
    (reader := _Reader()).feed(page)
    assert reader.open == []
    return reader


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 5))
def test_the_best_of_a_column_is_marked_and_the_next(numbers, aside):
    rows = [{"method": str(i), "f1 %": f"{n}.50 ± 0.1"} for i, n in enumerate(numbers)] + [{"method": "x", "f1 %": "-"}]
    body = Table("t", rows, ranked=["f1 %"], unranked=[str(aside)]).body
    order = sorted({n for i, n in enumerate(numbers) if i != aside}, reverse=True)
    for i, n in enumerate(numbers):
        expected = "" if i == aside or n not in order[:2] else ("best", "second")[order.index(n)]
        assert body[i][1].style == expected
    assert body[-1][1].style == ""


@settings(max_examples=30)
@given(st.text(max_size=20))
def test_whatever_the_names_a_page_is_well_formed_and_runs_nothing(name):
    section = Section(name, [name], [Table(name, [{"method": name}])], texts=[Text(name, name)])
    reader = read(render(name, [section, section]))
    assert "script" not in reader.tags
    assert all(source.startswith(("data:", "#")) for source in reader.sources)


def test_a_page_is_the_same_each_time():
    draw = lambda: render("t", [Section("s", figures={"bars": (bars_plot({"a": {"b": [1.0, 2.0]}}), "bars")})])  # noqa: E731
    assert draw() == draw()


METHODS = list(CONFIG["methods"])[:4]


def record(method: str, seed: int, round: int) -> dict:
    rng = np.random.default_rng([seed, round, len(method)])
    models = ("model",) if method == "FedAvg" else ("student", "teacher")
    scores = {f"{model}/accuracy{of}": float(rng.uniform()) for model in models for of in ("", "_per_client")}
    each = {f"{model}/accuracy_of_client": rng.uniform(size=4).tolist() for model in models}
    sent = {
        name: 1e5 * round * len(method) for name in ("uplink_bytes_per_client", "bytes_per_client", "floats_per_client")
    }
    return {"method": method, "seed": seed, "round": round, "seconds": 1.0, "jax": "0", **scores, **each, **sent}


def write(folder: pathlib.Path, name: str, methods: list[str], seeds: tuple[int, ...]) -> pathlib.Path:
    """A run folder as `sims.compare` and `sims.run` leave it."""
    folder.mkdir()
    common.write_config(folder, from_dict(Experiment, CONFIG))
    runs = {m: [[record(m, seed, r) for r in (1, 2)] for seed in seeds] for m in methods}
    for one in (one for of_seeds in runs.values() for run in of_seeds for one in run):
        common.append_jsonl(folder / name, one)
    common.write_table(folder, "table", table_rows(runs, "FedAvg" if "FedAvg" in methods else None))
    return folder


@pytest.fixture
def folders(tmp_path) -> list[pathlib.Path]:
    return [
        write(tmp_path / "compare", "results.jsonl", METHODS, (0, 1)),
        write(tmp_path / "run", "metrics.jsonl", METHODS[1:2], (0,)),
    ]


def test_a_report_holds_every_number_and_how_to_make_it(folders, tmp_path):
    page = report.main([*map(str, folders), "--out", str(tmp_path / "page.html")]).read_text()
    for folder in folders:
        for row in report.read_csv(folder / "table.csv"):
            assert row["accuracy %"] in page and row["bytes/client"] in page
    commands = re.findall(r"python -m sims\.run config\.yaml --method (.*?) --seeds (\d)", page)
    assert [seed for _, seed in commands] == ["0", "1"] * 4 + ["0"]
    assert html.unescape(commands[2][0]) == shlex.quote(METHODS[1])
    assert page.count("rounds: 2\n") == 2  # the configs
    assert page.count("<img") == 5 + 4  # curves, bars, front, spread, and of the grid of T a map
    read(page)


def test_spectra_are_of_every_matrix_in_every_round(tmp_path):
    common.write_config(tmp_path, from_dict(Experiment, CONFIG))
    flags = ["--method", METHODS[1], "--devices", "1", "--out", str(tmp_path / "out")]
    folder = spectrum.main([str(tmp_path / "config.yaml"), *flags])
    rows = report.read_csv(folder / "spectrum.csv")
    assert [(row["round"], row["kind"], row["matrix"]) for row in rows] == [
        (str(r), kind, matrix) for r in (1, 2) for kind, matrix in (("dense_0", "64 x 8"), ("dense_1", "8 x 10"))
    ]
    for row in rows:
        assert 1 <= float(row["T = 0.95 needs"]) <= 8
        assert float(row["energy of 10 %"]) <= float(row["energy of 50 %"]) <= 100
    page = report.main([str(folder), "--out", str(tmp_path / "page.html")]).read_text()
    assert page.count("<img") == page.count("--seeds 0") == 1


def test_what_cannot_be_reported_is_told(folders, tmp_path):
    (mine := tmp_path / "mine.html").write_text("mine")
    common.write_config(tmp_path, from_dict(Experiment, CONFIG))
    for argv, said in (
        ([str(folders[0]), "--out", str(mine)], "out is"),
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "a.html")], "config.yaml"),
        ([str(tmp_path), "--out", str(tmp_path / "a.html")], "that is finished"),
    ):
        with pytest.raises(SystemExit, match=said):
            report.main(argv)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "a.html").exists()
    with pytest.raises(SystemExit, match="allowed: one that is fedkd"):
        spectrum.main([str(tmp_path / "config.yaml"), "--method", "alone"])


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium here")
def test_a_browser_shows_the_page(folders, tmp_path):
    """On a desk and on a phone: every picture is there, nothing is wider than the screen, nothing is complained about."""
    from selenium import webdriver

    page = report.main([*map(str, folders), "--out", str(tmp_path / "page.html")])
    options = webdriver.ChromeOptions()
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for width in (1200, 360):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(page.as_uri())
            widths = browser.execute_script("return [...document.images].map(x => x.complete ? x.naturalWidth : 0)")
            assert len(widths) == 9 and min(widths) > 0
            assert browser.execute_script("return document.documentElement.scrollWidth") == width
            texts = browser.find_element("tag name", "body").text
            assert "<script>alert(1)</script>" in texts
            weight = "return getComputedStyle(document.querySelector('.best')).fontWeight"
            assert browser.execute_script(weight) == "700"
            assert browser.get_log("browser") == []
        messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = {m["request"]["url"] for m in sent if m["documentURL"] == page.as_uri()}
        assert page.as_uri() in urls and all(url.startswith("data:") for url in urls - {page.as_uri()})
    finally:
        browser.quit()
