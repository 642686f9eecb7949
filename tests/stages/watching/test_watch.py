"""The page of a run: what it says of runs in all states, over real HTTP, and during a training."""

from __future__ import annotations

import html
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from rich.console import Console

from gdro_cli.cli.app import main
from gdro_cli.config.recipe import Recipe
from gdro_cli.errors import UserError
from gdro_cli.runtime.checkpoint import save_checkpoint
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.metrics import MetricsRow
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.reporting.html import TEMPLATES
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from gdro_cli.stages.watching import server
from gdro_cli.stages.watching.page import draw_page, seconds_left
from gdro_cli.stages.watching.watch import run_to_watch, watched
from tests.support.rows import point, step

pytestmark = pytest.mark.slow

Finished = tuple[Path, train.TrainResult, evaluate.EvalResult]
NAME = "<b>small</b>"
POINTS = [
    point(0, 0.5, u=3.25, corrected=0.4),
    point(3, 0.625, u=3.0, corrected=0.5, verdict="suspicious", seconds=3.0),
]
STEPS = [
    step(number, loss_method=1.0, loss_floor=0.5, loss=1.0, implicit_accuracy=0.75, seconds=2.0) for number in (1, 2)
]
LAST = step(3, loss=1.0, top1_error_gap=0.125, gpu_peak_gb=12.5, tflops=150.0, seconds=2.0)


def make(path: Path, *rows: MetricsRow, recipe: Any = None) -> RunFolder:
    recipe = recipe or {"name": NAME, "method": {"name": "gdro"}, "train": {"steps": 10}}
    run = RunFolder.create_or_open(path, recipe=recipe, inputs={}, environment={})
    for row in rows:
        run.append_metrics(row)
    return run


def words(page: bytes) -> str:
    """The text of the page below its style."""
    body = page.decode().partition("<main>")[2]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


def draw_sheet(run: Path, number: int) -> bytes:
    path = run / f"validation/step-{number:06d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 20), (number, 0, 0)).save(path)
    return path.read_bytes()


def get(address: str, path: str = "/", **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SHARE", float("inf"))


# -- what the page says -----------------------------------------------------------------------------------------------


def test_the_page_follows_a_training_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "The training has not begun." in words(draw_page(run))
    folder = make(run)
    assert "The training has not begun." in words(draw_page(run))
    with folder_lock(run / "lock"):
        assert "Step 0 of 10 : training." in words(draw_page(run))
        folder.append_metrics(step(3, seconds=2.0))
        assert "Step 3 of 10 : training, about 0:14 left. Last row at " in words(draw_page(run))
        with folder.metrics_path.open("ab") as file:
            file.write(b'{"kind": "train", "st')
        assert "Step 3 of 10 : training, about 0:14 left." in words(draw_page(run))
    assert "stopped. The same gdro train command continues." in words(draw_page(run))
    (run / "adapter.json").touch()
    assert "the training is finished." in words(draw_page(run))


def test_the_time_left_has_evaluation_points_in_it() -> None:
    """7 steps of 2 s, and 3 s for a point every 3 steps; the point of step 0 happens once."""
    assert seconds_left([POINTS[0], *STEPS, LAST], 10) == 14
    assert seconds_left([POINTS[0], *STEPS, LAST, POINTS[1]], 10) == 21
    assert seconds_left([POINTS[0]], 10) is None


def test_the_page_has_verdict_curves_images_and_numbers_of_the_gpu(tmp_path: Path) -> None:
    run = make(tmp_path / "run", POINTS[0], *STEPS, LAST, POINTS[1]).path
    draw_sheet(run, 0)
    page = draw_page(run)
    assert 'src="/validation/step-000000.png"' in page.decode()  # the newest that there is
    draw_sheet(run, 3)
    page = draw_page(run)
    assert 'src="/validation/step-000003.png"' in page.decode()
    assert NAME in words(page) and NAME not in page.decode()
    text = words(page)
    assert "Step 3. Suspicious: look at the images" in text
    assert "step 0 0.500 3.250 0.400 2 - step 3 0.625 3.000 0.500 2 suspicious" in text
    assert "top1_error_gap +0.125" in text and "tflops 150.000" in text and "gpu_peak_gb 12.500" in text
    curves = re.findall(r'<svg role="img" aria-label="([^"]+)"', page.decode())
    assert [curve.removesuffix(" over steps") for curve in curves] == [
        "Validation reward and corrected score",
        "Quality axes and u",
        "Training loss",
        "Implicit order accuracy",
        "Error minus the reference&#x27;s error",
    ]


def test_a_collapse_and_damage_are_said(tmp_path: Path) -> None:
    run = make(tmp_path / "run", point(2, 0.5, verdict="collapsed"))
    save_checkpoint(run.path, 2, tensors={}, state={}, keep=1)
    run.write_json("stopped.json", {"step": 2, "reasons": ["u fell by 1.000"]})
    text = words(draw_page(run.path))
    assert "ended here, because the images had collapsed" in text and "Collapsed: the images" in text
    assert "u fell by 1.000" in text
    run.metrics_path.write_bytes(b"{}\n" + run.metrics_path.read_bytes())
    assert "metrics.jsonl line 1 is damaged" in words(draw_page(run.path))


# -- which run --------------------------------------------------------------------------------------------------------


def test_the_run_is_named_or_a_recipes_or_the_newest(
    finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    workspace, trained, _ = finished
    assert run_to_watch(trained.run.path.name, None, workspace) == trained.run.path
    assert run_to_watch(None, make_recipe(), workspace) == trained.run.path
    assert not run_to_watch(None, make_recipe(seed=7), workspace).exists()
    with pytest.raises(UserError, match=f"{workspace} is not a run"):
        run_to_watch(str(workspace), None, workspace)
    with pytest.raises(UserError, match="there is no run in .* yet"):
        run_to_watch(None, None, tmp_path)
    older, newer = (make(tmp_path / "runs" / name, *rows) for name, rows in (("b", POINTS), ("a", ())))
    os.utime(newer.path / "recipe.json", (0, 0))
    assert run_to_watch(None, None, tmp_path) == older.path
    newer.append_metrics(POINTS[0])
    os.utime(older.metrics_path, (0, 0))
    os.utime(older.path / "recipe.json", (0, 0))
    assert run_to_watch(None, None, tmp_path) == newer.path


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def served(tmp_path: Path, said: list[str]) -> Iterator[tuple[Path, str]]:
    """A run and the address of its page."""
    with server.serving(tmp_path / "run", port=0, say=said.append) as address:
        yield tmp_path / "run", address


def test_only_the_files_of_the_page_are_served(served: tuple[Path, str], tmp_path: Path) -> None:
    run, address = served
    make(run)
    sheet = draw_sheet(run, 3)
    assert get(address, "/validation/step-000003.png") == (200, sheet)
    assert get(address, "/watch.js") == (200, (TEMPLATES / "watch.js").read_bytes())
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "validation" / "step-000004.png").symlink_to(tmp_path / "secret.png")
    (run / "validation" / "base.json").write_text("{}")
    for path in (
        "/recipe.json",
        "/metrics.jsonl",
        "/validation/",
        "/validation/base.json",
        "/validation/step-000004.png",
        "/validation/step-000005.png",
        "/validation/../recipe.json",
        "/../secret.png",
        "//etc/passwd",
        "/watch.html.j2",
        "*",
    ):
        assert get(address, path)[0] == 404, path
    assert get(address, Host="localhost:1")[0] == 200
    assert get(address, Host="evil.example")[0] == 403  # a name of another site that leads here


def test_the_page_is_drawn_again_when_the_run_changes_but_not_all_the_time(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, address = served
    assert "has not begun" in words(get(address)[1])
    folder = make(run, step(2))
    assert "Step 2 of 10" in words(get(address)[1])
    monkeypatch.setattr(server, "_SHARE", 1e-9)
    folder.append_metrics(step(3))
    assert "Step 3 of 10" in words(get(address)[1])
    folder.append_metrics(step(4))
    assert "Step 3 of 10" in words(get(address)[1])


def test_a_failure_is_one_warning(served: tuple[Path, str], said: list[str]) -> None:
    run, address = served
    make(run, recipe={"train": "no section"})
    assert [get(address)[0] for _ in range(3)] == [500, 500, 500]
    (text,) = said
    assert text.startswith("the page of the run cannot be drawn (AttributeError: ")


def test_a_training_goes_on_without_an_address(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HOST", "192.0.2.1")  # of no machine
    with watched(tmp_path, said.append):
        pass
    (text,) = said
    assert text.startswith("--watch shows nothing: cannot listen on port 0")


# -- the commands -----------------------------------------------------------------------------------------------------


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_ctrl_c_ends_the_page_with_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "runs" / "mine", step(3)).path
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages = []

    def look() -> None:
        deadline = time.monotonic() + 60
        while not pages and time.monotonic() < deadline:
            try:
                pages.append(get(f"http://127.0.0.1:{port}"))
            except OSError:
                time.sleep(0.05)
        if pages:
            os.kill(os.getpid(), signal.SIGINT)

    looker = threading.Thread(target=look)
    looker.start()
    code = run_main("watch", "mine", "--out", str(tmp_path), "--port", str(port))
    looker.join()
    assert code == 0 and pages[0][0] == 200 and b"Step 3 of 10" in pages[0][1]
    assert f"{run.name} is shown at http://127.0.0.1:{port} (Ctrl-C" in capsys.readouterr().err


def test_wrong_options_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "runs" / "mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, text in (
            (["mine", "--recipe", "ocr"], "name a run or a recipe with --recipe, not both"),
            (["--set", "seed=1"], "--set changes a recipe: name it with --recipe"),
            (["min"], "did you mean `mine`?"),
            (["--port", port], f"cannot listen on port {port} of this machine (Address already in use)"),
        ):
            assert run_main("watch", *arguments, "--out", str(tmp_path)) == 2
            assert text in capsys.readouterr().err


class Numbers(GeneralTracker):  # type: ignore[misc]
    """A tracker that takes numbers, and calls a function when it gets some."""

    name = "numbers"
    requires_logging_directory = False

    def __init__(self, then: Callable[[int], object] = bool) -> None:
        super().__init__()
        self.then, self.images = then, list[tuple[str, int]]()

    @property
    def tracker(self) -> None: ...

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.then(step)


class Pictures(Numbers):
    """A tracker that takes images, as accelerate's for wandb does."""

    name = "wandb"

    def log_images(self, values: dict[str, list[Image.Image]], step: int) -> None:
        self.images += [(f"{name} {image.width}x{image.height}", step) for name, (image,) in values.items()]


def test_train_serves_its_page_and_sends_images_to_trackers(
    finished: Finished, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    workspace = shutil.copytree(finished[0], tmp_path / "out")
    said = io.StringIO()
    session = Session(make_recipe(train={"lr": 1e-3}), workspace, Reporter(Console(file=said, width=1000)))
    seen: dict[int, str] = {}

    def look(step: int) -> None:
        if step in (0, 4) and step not in seen:
            seen[step] = words(get(said.getvalue().split("watch the training at ")[1].split()[0])[1])

    numbers, pictures = Numbers(look), Pictures()
    session.engine = Engine(Accelerator(cpu=True, log_with=[numbers, pictures]), tracked=True)
    trained = train.run(session, watch=True)
    assert trained.run.path.name not in {path.name for path in (finished[0] / "runs").iterdir()}
    assert list(seen) == [0, 4]
    for number, text in seen.items():
        assert f"Step {number} of 4 : training" in text
    assert "Validation prompts, step 0." in seen[4]
    assert [step for _, step in pictures.images] == [0, 4]
    assert {text.split()[0] for text, _ in pictures.images} == {"validation/images"}
    with Image.open(trained.run.path / "validation/step-000004.png") as sheet:
        assert pictures.images[1][0].endswith(f" {sheet.width}x{sheet.height}")
    assert numbers.images == []
    with pytest.raises(ConnectionRefusedError):
        get(said.getvalue().split("watch the training at ")[1].split()[0])


# -- a browser, where there is one ------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_refreshes_itself_in_a_browser(tmp_path: Path) -> None:
    """It is opened before the run exists; the script brings in the curves and the image, which nothing blocks."""
    run = tmp_path / "run"

    class Server(server.RunServer):
        def answer(self, path: str, host: str) -> server.Answer:
            answer = super().answer(path, host)
            if path == "/" and not run.exists():
                make(run, *POINTS, *STEPS)
                draw_sheet(run, 3)
            return answer

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(server, "RunServer", Server)
        address = stack.enter_context(server.serving(run, port=0, say=print))
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = words(done.stdout.encode())
    assert "Step 2 of 10" in shown and "Suspicious" in shown and "has not begun" not in shown
    assert done.stdout.count("<svg") >= 3 and "step-000003.png" in done.stdout
