"""The report's page, on results made by hand: three prompts, two images each of both models."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.core.geneval import TAGS
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.runtime.metrics import MetricsRow
from gdro_cli.stages.reporting.evaluation_report import measure_names, write_report
from gdro_cli.stages.runs.results import MODELS
from tests.support.rows import interval, point, read, results, step

pytestmark = pytest.mark.slow

HOSTILE = '<script>alert("x")</script> a sign that says "TOM & CO"'
READ = "<img src=x onerror=alert(1)>"
PROMPTS = [
    {"id": f"{number:012x}", "prompt": prompt, "target": target, "metadata": {}}
    for number, (prompt, target) in enumerate([(HOSTILE, "TOM & CO"), ("second", "B"), ("third", "C")])
]
REWARDS = {"base": [0.5, 1.0, 0.25, 0.0, 0.75, 0.5], "trained": [1.0, 1.0, 0.75, 0.5, None, 0.125]}
QUALITY = {"base": [3.0, 4.0, 5.0, 3.5, 3.0, 3.0], "trained": [2.0, 4.5, 4.0, None, 3.0, 3.0]}
CHANNEL = {"base": 0, "trained": 2}
RECIPE = {
    "name": "ocr",
    "method": {"name": "gdro", "k": 6, "tau": None},
    "train": {"lora": {"init": None}},
    "eval": {"grid_prompts": 2},
}
ENVIRONMENT = {"python": "3.11.7", "packages": {"torch": "2.9.1", "paddleocr": None}, "devices": ["cpu"]}


def measure(number: int, *, images: int = 6) -> dict[str, Any]:
    """Intervals that no other measure has, so that each can be found in the page."""
    step = number / 100
    sides = ((0.3 + step, 0.2, 0.4), (0.5 + step, 0.45, 0.65), (0.201 + step, 0.101, 0.399))
    intervals = (interval(*ends, prompts=3, images=images) for ends in sides)
    return dict(zip(("base", "trained", "difference"), intervals, strict=True))


def row(model: str, place: int) -> dict[str, Any]:
    value, u = REWARDS[model][place], QUALITY[model][place]
    corrected = None if value is None or u is None else value * (u - 3) + 0.2
    details = {"exact": value == 1, "text": READ if place == 0 else f"{model}{place}", "lines": ["not", "shown"]}
    details |= {"style": u, "u": u, "corrected": corrected, "dark_share": place / 8}
    return {
        "prompt_id": PROMPTS[place // 2]["id"],
        "index": place % 2,
        "value": value,
        "reason": None if value is not None else "the engine stopped",
        "details": details | ({"unjudged": "no answer"} if u is None else {}),
        "file": f"images/{model}-{place}.png",
    }


def make_results(**changes: Any) -> dict[str, Any]:
    names = ("corrected", "exact match", "reward", "style", "u", "corrected of the means")
    protocol = {"prompts": "df0ee8531091", "seed": 1000, "reward": {"rule": "substring"}}
    own = {
        "recipe": "ocr",
        "method": RECIPE["method"],
        "run": "ocr-0123456789ab",
        "protocol": protocol | {"judge": {"judge": "embedded"}},
        "weights": {"kind": "ema", "checkpoint": "best", "step": 20, "chosen_by": None},
        "measures": {name: measure(number) for number, name in enumerate(names)},
        "signals": {"dark_share": measure(8), "diversity": measure(9, images=3)},
        "verdict": {"level": "suspicious", "reasons": ["The reward rose while quality u fell.", "Look <here>."]},
        "failed": 1,
        "unjudged": 1,
        "bootstrap": 2000,
        "prompts": PROMPTS,
    }
    rows = {model: [row(model, place) for place in range(6)] for model in MODELS}
    return results(**rows, **{**own, **changes})


def make_metrics() -> list[MetricsRow]:
    points = [(0, "old", 0.1), (0, "new", 0.4), (10, "new", 0.6), (20, "new", 0.7)]
    rows: list[MetricsRow] = [
        point(number, reward, protocol=protocol, u=3.5, style=3.5, corrected=reward / 2, prompts=4, images=8)
        for number, protocol, reward in points
    ]
    return rows + [
        step(
            number,
            loss=2.0,
            implicit_accuracy=0.5 + number / 100,
            top1_error_gap=-number / 1000,
            images_per_second=number,
        )
        for number in range(1, 21)
    ]


class Page(HTMLParser):
    """What a browser would load, and the texts of all table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append(" ".join(self._cell.split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"
        if self._cell is not None:
            self._cell += f" {data}"

    def row(self, name: str, *, columns: int) -> list[str]:
        """The row of a table of so many columns that begins with ``name``."""
        (found,) = (row for row in self.rows if len(row) == columns and row[0].startswith(name))
        return found


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Images of one colour each: red for base, blue for trained, brighter from place to place."""
    (tmp_path / "images").mkdir()
    for model, channel in CHANNEL.items():
        for place in range(6):
            colour = [0, 0, 0]
            colour[channel] = 100 + place
            Image.new("RGB", (16, 16), tuple(colour)).save(tmp_path / "images" / f"{model}-{place}.png")
    return tmp_path


@pytest.fixture
def written(workspace: Path) -> Callable[..., str]:
    """Writes a report and returns its text."""

    def write(made: Mapping[str, Any] | None = None, metrics: list[MetricsRow] | None = None) -> str:
        path = write_report(
            workspace / "run" / "report.html",
            read(made or make_results()),
            make_metrics() if metrics is None else metrics,
            workspace=workspace,
            recipe=RECIPE,
            environment=ENVIRONMENT,
        )
        return path.read_text(encoding="utf-8")

    return write


def colour_of(source: str) -> tuple[int, ...]:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return image.convert("RGB").getpixel((3, 3))  # type: ignore[return-value]


# -- one file, nothing from outside -----------------------------------------------------------------------------------


def test_the_page_loads_nothing(written: Callable[..., str]) -> None:
    page = Page(written())
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "srcset", "data", "action"):
            assert tag == "img" and str(value).startswith("data:image/png;base64,")
        if name in ("href", "xlink:href"):
            assert str(value).startswith("#"), value
        assert not name.startswith("on")
    assert "default-src 'none'" in str(dict((name, value) for tag, name, value in page.attributes if tag == "meta"))
    assert not re.search(r"@import|url\((?!#)", written())


def test_links_inside_the_page_have_their_targets(written: Callable[..., str]) -> None:
    page = Page(written())
    there = {value for _, name, value in page.attributes if name == "id"}
    assert {str(value)[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"} <= there


def test_prompts_recognised_text_and_reasons_are_text(written: Callable[..., str]) -> None:
    page = Page(written())
    assert HOSTILE in page.text and READ in page.text and "Look <here>." in page.text
    assert "here" not in page.tags
    assert any(name == "alt" and HOSTILE in str(value) for _, name, value in page.attributes)


def test_same_input_same_bytes(written: Callable[..., str]) -> None:
    assert written() == written()


def test_nothing_is_left_of_the_writing(written: Callable[..., str], workspace: Path) -> None:
    written()
    assert [path.name for path in (workspace / "run").iterdir()] == ["report.html"]


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_the_verdict_its_reasons_and_the_headline_come_first(written: Callable[..., str]) -> None:
    text = " ".join(Page(written()).text.split())
    banner = text[: text.index("Held-out prompts")]
    assert "Suspicious: look at the images before you trust the reward." in banner
    assert "The reward rose while quality u fell." in banner
    assert "Reward: base 0.320 [0.200, 0.400], trained 0.520 [0.450, 0.650]" in banner
    assert "difference +0.221 [+0.101, +0.399]. Prompts: 3. Images per model: 6." in banner
    assert "ema weights of the best checkpoint, step 20" in banner


def test_every_measure_stands_in_a_table(written: Callable[..., str]) -> None:
    """Numbers of ``measure``: exact match is the second, reward the third; style, u and both corrected are columns."""
    page = Page(written())
    rest = ["0.310 [0.200, 0.400]", "0.510 [0.450, 0.650]", "+0.211 [+0.101, +0.399]", "3", "6", "none"]
    assert page.row("exact match", columns=7) == ["exact match", *rest]
    assert page.row("reward", columns=7)[1:4] == [
        "0.320 [0.200, 0.400]",
        "0.520 [0.450, 0.650]",
        "+0.221 [+0.101, +0.399]",
    ]
    assert [row for row in page.rows if len(row) == 6 and row[0] == ""] == [
        ["", "reward", "style", "u", "corrected", "corrected of the means"]
    ]
    assert page.row("trained", columns=6)[1:] == [
        f"{mean} [0.450, 0.650]" for mean in ("0.520", "0.530", "0.540", "0.500", "0.550")
    ]
    assert "The verdict and the best checkpoint go by the first." in " ".join(page.text.split())
    signal = ["dark share share of dark pixels", "0.380 [0.200, 0.400]", "0.580 [0.450, 0.650]"]
    assert page.row("dark share", columns=8) == [*signal, "+0.281 [+0.101, +0.399]", "+74 %", "+0.15 / +0.3", "3", "6"]
    assert page.row("diversity", columns=8)[5:] == ["-25 % / -50 %", "3", "3"]


def test_geneval_leads_with_the_overall_score_and_counts_a_tags_own_images(written: Callable[..., str]) -> None:
    """Of three prompts one counts objects: 2 images per model, of which the trained model's one has no score."""
    prompts = [
        {**p, "metadata": {"tag": tag}} for p, tag in zip(PROMPTS, ("counting", "colors", "colors"), strict=True)
    ]
    counting = measure(1) | {"base": interval(0.5, 0, 1, prompts=1, images=2)}
    counting |= {key: interval(0.5, 0, 1, prompts=1, images=1) for key in ("trained", "difference")}
    made = make_results(task="geneval", prompts=prompts, measures={"counting": counting, "overall": measure(0)})
    page = Page(written(made))
    names = [row[0] for row in page.rows if len(row) == 7][1:]
    assert names == ["overall", "counting"]
    assert page.row("counting", columns=7)[4:] == ["1", "base 2 trained 1 pairs 1", "trained 1 of 2"]
    assert "Overall: base 0.300" in page.text


def test_measures_have_one_order_wherever_they_were_sorted() -> None:
    quality = ["alignment", "coherence", "style", "u", "corrected", "corrected of the means"]
    for reward, own in (
        (OcrReward, ["reward", "exact match", "similarity", "text area"]),
        (GenEvalReward, ["overall", *TAGS, "strict reward", "soft reward"]),
    ):
        assert measure_names(sorted(["x", *own, *quality]), reward) == [*own, *quality, "x"]


def test_missing_numbers_are_dashes_with_their_count(written: Callable[..., str]) -> None:
    made = make_results()
    made["measures"]["exact match"]["base"] |= {"images": 4}
    made["signals"]["dark_share"]["base"]["mean"] = 0.0
    page = Page(written(made))
    assert page.row("exact match", columns=7)[-1] == "base 2 of 6"
    assert page.row("dark share", columns=8)[4] == "-"  # no share of a base of 0
    text = " ".join(page.text.split())
    assert "Without a reward: 1 of 12 images (both models). Without u: 1 of 12." in text
    assert "reward 0.500 read trained3 u - corrected - not judged no answer" in text


def test_without_judge_metrics_or_images_the_page_says_so(written: Callable[..., str], workspace: Path) -> None:
    made = make_results(signals={}, unjudged=0)
    made["protocol"]["judge"] = None
    made["measures"] = {"reward": made["measures"]["reward"]}
    shutil.rmtree(workspace / "images")
    page = Page(written(made, []))
    text = " ".join(page.text.split())
    for said in (
        "Without u: - (no judge)",
        "Not judged: this recipe has no judge",
        "No signal could be measured.",
        "This run has no evaluation points.",
        "This run has no training metrics.",
        "Largest losses and gains of the reward",
        "image missing",
    ):
        assert said in text
    assert not {"img", "svg"} & set(page.tags)


def test_nothing_measured_at_all_is_said(written: Callable[..., str]) -> None:
    page = Page(written(make_results(measures={}, signals={})))
    assert "Nothing could be measured: 3 prompts, 12 images." in page.text


def test_provenance_is_complete(written: Callable[..., str]) -> None:
    page = Page(written())
    assert page.row("reward.rule", columns=2) == ["reward.rule", "substring"]
    assert page.row("judge.judge", columns=2) == ["judge.judge", "embedded"]
    assert page.row("method.k", columns=2) == ["method.k", "6"]
    assert page.row("packages.torch", columns=2) == ["packages.torch", "2.9.1"]
    assert page.row("devices", columns=2) == ["devices", '["cpu"]']
    assert page.tags.count("details") == 3


def test_first_and_last_training_steps_by_hand(written: Callable[..., str]) -> None:
    """20 steps: means over 5. Accuracy 0.5 + (1 .. 5) / 100 -> 0.530, (16 .. 20) -> 0.680; worst image: no values."""
    page = Page(written())
    assert page.row("implicit_accuracy", columns=5)[1:4] == ["0.530", "0.680", "5"]
    assert page.row("top1_error_gap", columns=5)[1:3] == ["-0.0030", "-0.018"]
    assert page.row("images_per_second", columns=5)[1:3] == ["3.000", "18.000"]
    assert not [row for row in page.rows if row and row[0] == "bottom1_error_gap"]


def test_points_of_another_protocol_are_not_drawn(written: Callable[..., str]) -> None:
    text = " ".join(Page(written()).text.split())
    assert (
        "4 prompts, 8 images at each of 3 points" in text
        and "weights. Points of another protocol, left out: 1." in text
    )


# -- images ---------------------------------------------------------------------------------------------------------


def test_images_stand_in_pairs_of_one_noise(written: Callable[..., str]) -> None:
    """Two prompts of two images: base 0, trained 0, base 1, trained 1, then the second prompt's."""
    text = written()
    shown = Page(text[text.index('id="images"') : text.index('id="cases"')])
    found = [colour_of(str(value)) for tag, name, value in shown.attributes if tag == "img" and name == "src"]
    assert found == [
        (100 + place, 0, 0) if model == 0 else (0, 0, 100 + place) for place in range(4) for model in (0, 1)
    ]


def test_worst_and_best_cases_by_hand(written: Callable[..., str]) -> None:
    """Corrected scores: base 0.2, 1.2, 0.7, 0.2, 0.2, 0.2; trained -0.8, 1.7, 0.95, -, -, 0.2.

    So place 0 lost 1.0, and place 1 gained 0.5, place 2 gained 0.25; places 3 and 4 have no pair, 5 did not change.
    """
    text = written()
    cases = text[text.index('id="cases"') : text.index('id="provenance"')]
    assert re.findall(r"corrected score ([+-][\d.]+)", cases) == ["-1.000", "+0.500", "+0.250"]
    losses = Page(cases[: cases.index("Gains")])
    found = [colour_of(str(value)) for tag, name, value in losses.attributes if tag == "img" and name == "src"]
    assert found == [(100, 0, 0), (0, 0, 100)]


def test_cases_without_a_judge_are_ranked_by_the_reward(written: Callable[..., str]) -> None:
    """Rewards trained - base: +0.5, 0, +0.5, +0.5, -, -0.375; equal gains in the order of the rows."""
    made = make_results()
    made["measures"] = {"reward": made["measures"]["reward"]}
    text = written(made)
    cases = text[text.index('id="cases"') : text.index('id="provenance"')]
    assert re.findall(r"reward ([+-][\d.]+)", cases) == ["-0.375", "+0.500", "+0.500", "+0.500"]


def test_large_images_are_shrunk(written: Callable[..., str], workspace: Path) -> None:
    Image.new("RGB", (1024, 512), (7, 8, 9)).save(workspace / "images" / "base-0.png")
    (source, *_) = (value for tag, name, value in Page(written()).attributes if tag == "img" and name == "src")
    with Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))) as image:
        assert image.size == (256, 128)


# -- a browser, where there is one ------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_only_tables_scroll_sideways(width: int, written: Callable[..., str], tmp_path: Path) -> None:
    """In a frame of the given width, because a browser's own window cannot be as narrow as a phone."""
    (tmp_path / "page.html").write_text(written(), encoding="utf-8")
    frame = f"""<body><iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe><script>
      f.onload = () => {{ const root = f.contentDocument.documentElement;
        document.body.textContent = `widths ${{root.clientWidth}} ${{root.scrollWidth}}`; }}</script></body>"""
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    address = (tmp_path / "frame.html").as_uri()
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    assert f"widths {width} {width}" in done.stdout
