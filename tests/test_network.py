"""Settings of the environment for requests, and a Hub that does not answer."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError
from gdro_cli.model_source import ModelSource
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.network import check_network
from gdro_cli.stages.exporting.hub import check_login
from tests.support.faulty import check, command, outcome

COMMIT = "0" * 40
SETTINGS = {
    "ALL_PROXY": ("socks5://127.0.0.1:9", "names a SOCKS proxy, for which the package socksio is not installed"),
    "HTTPS_PROXY": ("ftp://secret@127.0.0.1", "does not name a proxy"),
    "http_proxy": ("http://", "does not name a proxy"),
    "SSL_CERT_FILE": ("/nowhere/ca.pem", "names /nowhere/ca.pem, which cannot be read (No such file or directory)"),
    "SSL_CERT_DIR": ("/nowhere", "names /nowhere, which is not a folder"),
}
"""Variable -> a value that no request can use, and what the message says of it."""
MASK2FORMER = ("--set=reward.geneval.detector=mask2former", "--set=reward.geneval.detector_model=owner/name")
WORK = {
    "a model": ("sample", "--recipe=smoke", "--set=model.path=owner/name"),
    "a licensed model": ("sample", "--recipe=smoke", "--set=model.path=black-forest-labs/FLUX.1-dev"),
    "a detector": ("rewards", "check", "geneval", *MASK2FORMER),
    "a reward server": ("rewards", "check", "http", "--set=reward.http.url=http://127.0.0.1:9"),
}
"""Commands that send requests."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The address of a Hub that accepts no connection, with an empty cache."""
    from huggingface_hub import close_session, constants

    for name in (*SETTINGS, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with socket.socket() as taken:  # bound, but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        close_session()
        yield taken
    close_session()


@pytest.fixture
def cached(hub: socket.socket, tmp_path: Path) -> Path:
    """A snapshot of the embedded model in the cache, without a list of its files, as older clients leave it."""
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(tiny_model_path(), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


@pytest.mark.slow
@pytest.mark.usefixtures("cached")
def test_a_model_in_the_cache_costs_one_failed_request_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client repeats each failed request for 23 s, and a command opens a dozen components."""
    import httpx2

    asked, send = [], httpx2.HTTPTransport.handle_request

    def count(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.startswith("/api/models/"):  # the client also asks for things of its own
            asked.append(request.url)
        assert len(asked) < 2, asked
        return send(transport, request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", count)
    for _ in range(2):
        folder = PipelineFolder("owner/name")
        for name in ("scheduler", "tokenizer"):
            folder.load(name)
        assert folder.identity["commit"] == COMMIT
    assert len(asked) == 1


@pytest.mark.usefixtures("hub")
def test_a_model_that_is_nowhere_is_reported_with_the_cause() -> None:
    for _ in range(2):
        with pytest.raises(PrerequisiteError, match=r"could model_index\.json be read .* or fetched \(ConnectError\)"):
            PipelineFolder("owner/name")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("variable", SETTINGS)
def test_a_setting_that_no_request_can_use(
    variable: str, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, words = SETTINGS[variable]
    monkeypatch.setenv(variable, value)
    out = () if work in ("a detector", "a reward server") else (f"--out={tmp_path}",)
    done = command(*WORK[work], *out)
    check(done, 3, f"the environment variable {variable} {words}")
    assert "secret" not in done.message


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("variable", SETTINGS)
def test_a_judge_and_a_push(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdro_cli.rewards.endpoint import Endpoint

    monkeypatch.setenv(variable, SETTINGS[variable][0])
    with pytest.raises(PrerequisiteError, match=f"the environment variable {variable} "):
        check_login()
    with pytest.raises(PrerequisiteError, match=f"the environment variable {variable} "):
        Endpoint("http://127.0.0.1:9/v1", "judge", key=None, timeout=1.0, retries=0)


def test_settings_that_requests_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import certifi

    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    for proxy in ("http://user:word@127.0.0.1:3128", "https://proxy", "proxy:3128", " ", "http://[::1]:3128"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        check_network()


def test_a_file_without_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "empty.pem"))
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(PrerequisiteError, match=r"SSL_CERT_FILE names .*empty\.pem, .* \(no certificates\)"):
        check_network()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("address", ["huggingface.co", "ftp://huggingface.co", "", "http://"])
def test_an_address_of_the_hub_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    for done in (command(*WORK["a model"]), outcome(check_login)):
        check(done, 3, "the environment variable HF_ENDPOINT is ")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("place", ["HF_TOKEN", "file"])
def test_a_token_with_a_letter_outside_ascii(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "file":
        (tmp_path / "token").write_text("hf_sécret\n", encoding="utf-8")
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    for done in (command(*WORK["a model"]), outcome(check_login)):
        check(done, 3, "/token does not contain a token" if place == "file" else "variable HF_TOKEN does not contain")
        assert "cret" not in done.message


@pytest.mark.usefixtures("hub")
def test_a_cache_of_the_hub_of_a_user_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~nosuch/hub")
    check(command(*WORK["a model"]), 2, "HF_HOME names ~nosuch/hub, but there is no user nosuch")


def test_an_answer_that_is_not_the_hubs(hub: socket.socket, tmp_path: Path) -> None:
    """Any server may be at the address, such as the log-in page of a network."""
    import threading

    hub.listen()

    def answer() -> None:
        for _ in range(8):
            connection, _address = hub.accept()
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n<p>hi</p>")
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(PrerequisiteError, match=r"fetched \(JSONDecodeError\)"):
        ModelSource("owner/name", key="model.path").get("config.json")
