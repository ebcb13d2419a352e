"""Downloads by name against a real HTTP server: once, resumed, checked, and refused with a way out."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from permafrost.data.cache import cache_folder
from permafrost.model import BackboneConfig, BackboneError, WeightsError, load_backbone
from permafrost.model.spec import SWINV2_SIZES
from permafrost.model.weights import download
from permafrost.model.weights.download import fetch, weights_folder
from permafrost.model.weights.known import PUBLIC_WEIGHTS, PublicWeights, find_public
from permafrost.model.weights.read import locate, read_weights

CONTENT = bytes(range(256)) * 20_000


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path, with ranges, as badly as it is told to.

    Attributes:
        cuts: Bytes after which the next responses break off; when it is empty they are whole.
        statuses: Status codes of the next responses; then 200.
        requests: What was asked: the Range header of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.ranges = True
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.requests: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/files/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        status = server.statuses.pop(0) if server.statuses else 200
        if status != 200:
            self.send_error(status)
            return
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder of the test's own; no waiting, no proxy."""
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name in download.OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    return tmp_path / "cache" / "weights"


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"weights.pth.lock"}


def test_downloaded_once(server, cache, capsys) -> None:
    path = fetch(server.url, file="weights.pth", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path == cache / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert f"downloading {server.url} to {cache}" in capsys.readouterr().err
    assert fetch(server.url, file="weights.pth") == path
    assert server.requests == [None]
    assert leftovers(cache) == {"weights.pth"}
    assert not capsys.readouterr().err


def test_broken_connection_is_continued(server, cache) -> None:
    server.cuts = [2_000_000, 1_500_000]
    path = fetch(server.url, file="weights.pth", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=2000000-", "bytes=3500000-"]
    assert leftovers(cache) == {"weights.pth"}


def test_broken_download_is_continued_by_the_next_command(server, cache, monkeypatch) -> None:
    monkeypatch.setattr(download, "NUM_ATTEMPTS", 1)
    server.cuts = [3_000_000]
    with pytest.raises(
        WeightsError, match=r"broke off after 3,000,000 bytes .*the same command continues there"
    ) as caught:
        fetch(server.url, file="weights.pth")
    assert f"Or fetch {server.url} elsewhere and put it at {cache / 'weights.pth'}" in str(caught.value)
    assert not (cache / "weights.pth").exists()
    assert fetch(server.url, file="weights.pth").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=3000000-"]


@pytest.mark.parametrize("change", ["etag", "no ranges", "no etag", "weak etag"])
def test_what_cannot_be_continued_starts_anew(server, cache, change: str) -> None:
    if change == "no etag":
        server.etag = None
    if change == "weak etag":
        server.etag = 'W/"one"'
    server.cuts = [3_000_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "NUM_ATTEMPTS", 1)
        with pytest.raises(WeightsError, match="broke off"):
            fetch(server.url, file="weights.pth")
    if change == "etag":
        server.content, server.etag = CONTENT[::-1], '"two"'
    server.ranges = change != "no ranges"
    assert fetch(server.url, file="weights.pth").read_bytes() == server.content
    assert leftovers(cache) == {"weights.pth"}


def test_a_range_that_does_not_exist_starts_anew(server, cache) -> None:
    cache.mkdir(parents=True)
    (cache / "weights.pth.partial").write_bytes(CONTENT + b"more")
    (cache / "weights.pth.etag").write_text('"one"')
    server.statuses = [416]
    assert fetch(server.url, file="weights.pth").read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT) + 4}-", None]


def test_what_a_link_points_to_is_not_written_over(server, cache, tmp_path) -> None:
    (tmp_path / "thesis").write_text("four years")
    cache.mkdir(parents=True)
    (cache / "weights.pth.partial").symlink_to(tmp_path / "thesis")
    with pytest.raises(WeightsError, match=r"symbolic links"):
        fetch(server.url, file="weights.pth")
    assert (tmp_path / "thesis").read_text() == "four years"


def test_busy_servers_are_asked_again(server) -> None:
    server.statuses = [503, 429, 500]
    assert fetch(server.url, file="weights.pth").read_bytes() == CONTENT
    server.statuses = [503] * 9
    with pytest.raises(WeightsError, match=r"the server answered 503 Service Unavailable\); the same command"):
        fetch(server.url, file="other.pth")
    assert len(server.requests) == 4 + download.NUM_ATTEMPTS


def test_wrong_checksum_leaves_nothing(server, cache) -> None:
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(WeightsError, match=rf"5,120,000 bytes with SHA-256 {found}, expected {'0' * 64}"):
        fetch(server.url, file="weights.pth", sha256="0" * 64)
    assert leftovers(cache) == set()


def test_missing_and_html_answers(server, cache) -> None:
    server.statuses = [404]
    with pytest.raises(WeightsError, match=r"weights\.pth: the server answered 404 Not Found\. Or fetch .* put it at"):
        fetch(server.url, file="weights.pth")
    server.content = b"\n<!DOCTYPE html><html>Sign in</html>"
    with pytest.raises(WeightsError, match="was answered with a web page instead of the file"):
        fetch(server.url, file="weights.pth")
    assert not (cache / "weights.pth").exists()
    server.content, server.etag = CONTENT, '"two"'
    assert fetch(server.url, file="weights.pth").read_bytes() == CONTENT


def test_no_server_at_all(server, cache) -> None:
    server.server_close()
    with pytest.raises(WeightsError, match=r"broke off after 0 bytes \(.*refused.*put it at"):
        fetch(server.url, file="weights.pth")


def test_a_host_that_has_no_address_is_not_asked_again(cache) -> None:
    # RFC 2606 keeps .invalid free of hosts.
    with pytest.raises(WeightsError, match=r"nowhere\.invalid/weights\.pth cannot be reached .*is there a network"):
        fetch("http://nowhere.invalid/weights.pth", file="weights.pth")


def test_full_disk_and_unwritable_folder(server, cache, tmp_path, monkeypatch) -> None:
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WeightsError, match=r"has 5,120,000 bytes, more than is free in .*set PERMAFROST_CACHE"):
        fetch(server.url, file="weights.pth")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"cannot be written .*set PERMAFROST_CACHE"):
        fetch(server.url, file="weights.pth")


@pytest.mark.parametrize("variable", download.OFFLINE_VARIABLES)
def test_offline_names_the_file_and_its_place(server, cache, monkeypatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(WeightsError, match=f"{variable} forbids to download it") as caught:
        fetch(server.url, file="weights.pth")
    assert server.url in str(caught.value)
    assert str(cache / "weights.pth") in str(caught.value)
    assert not server.requests
    assert not cache.exists()
    cache.mkdir(parents=True)
    (cache / "weights.pth").write_bytes(b"by hand")
    assert fetch(server.url, file="weights.pth").read_bytes() == b"by hand"
    monkeypatch.setenv(variable, "0")
    assert fetch(server.url, file="other.pth").read_bytes() == CONTENT


def test_several_processes_download_once(server, cache) -> None:
    code = (
        "import sys; from permafrost.model.weights.download import fetch; print(fetch(sys.argv[1], file='weights.pth'))"
    )
    code += "; assert 'torch' not in sys.modules"
    server.cuts = [1_000_000, 1_000_000]
    command = [sys.executable, "-c", code, server.url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert {out.strip() for out, _ in outputs} == {str(cache / "weights.pth")}
    assert (cache / "weights.pth").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-", "bytes=2000000-"]


# --- known names


def test_known_public_name_is_downloaded_and_loaded(server, cache, monkeypatch, official_file) -> None:
    path = official_file(windows=(12, 12, 12, 6))
    server.content = path.read_bytes()
    known = PublicWeights("swinv2_nano", server.url, 192, 12, (12, 12, 12, 6))
    monkeypatch.setitem(PUBLIC_WEIGHTS, "weights", known)
    expected = load_backbone("swinv2_nano", weights=path)
    for name in ("weights", "weights.pth"):
        backbone = load_backbone("swinv2_nano", weights=name)
        assert backbone.fingerprint == expected.fingerprint
        assert backbone.describe()["weights"] == str(cache / "weights.pth")
    assert len(server.requests) == 1
    with pytest.raises(BackboneError, match=r"weights of swinv2_nano, but backbone\.name is 'swinv2_tiny'"):
        load_backbone("swinv2_tiny", weights="weights")


def test_table_gives_the_windows_of_a_file_that_does_not_say(server, monkeypatch, official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_" in name or "attn_mask" in name]:
            del state[name]

    server.content = official_file(change=strip).read_bytes()
    monkeypatch.setitem(PUBLIC_WEIGHTS, "weights", PublicWeights("swinv2_nano", server.url, 256, 16, (12, 12, 12, 6)))
    windows = read_weights("weights").windows
    assert windows.window_size == (16, 16, 16, 8)
    assert windows.pretrained_window_size == (12, 12, 12, 6)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, official_file) -> None:
    monkeypatch.setenv("PERMAFROST_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    name = "swinv2_base_patch4_window12_192_22k.pth"
    official_file().rename(name)
    assert locate(name) == Path(name)
    with pytest.raises(WeightsError, match=r"v2\.0\.0/swinv2_base_patch4_window8_256\.pth where there is a network"):
        locate("swinv2_base_patch4_window8_256")
    with pytest.raises(WeightsError, match="Did you mean 'swinv2_large_patch4_window12_192_22k'"):
        locate("swinv2_large_patch4_windows12_192_22k")


def test_configuration_names_another_network_before_anything_is_downloaded() -> None:
    name = "swinv2_large_patch4_window12_192_22k"
    with pytest.raises(BackboneError, match=rf"{name}', which are weights of swinv2_large, but backbone\.name is"):
        BackboneConfig(name="swinv2_base", weights=name)
    assert BackboneConfig(name="swinv2_large", weights=f"{name}.pth").weights == f"{name}.pth"


def test_table_of_public_files() -> None:
    assert len(PUBLIC_WEIGHTS) == 16 + 12 + 2 * 3 * (4 + 5 + 5 + 4 + 3)
    release = "https://github.com/SwinTransformer/storage/releases/download/v2.0.0/"
    fine_tuned = find_public("swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth")
    assert fine_tuned.url == release + "swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth"
    assert fine_tuned.window_size == (24, 24, 24, 12)
    assert fine_tuned.pretrained_window_size == (12, 12, 12, 6)
    trained = find_public("swinv2_tiny_patch4_window16_256")
    assert trained.window_size == trained.pretrained_window_size == (16, 16, 16, 8)
    giant = find_public("finetune_swinv2_giant_22k_500k")
    assert giant.backbone == "swinv2_giant_1b"
    assert giant.url.endswith("/simmim_swinv2_finetune_models/finetune_swinv2_giant_22k_500k.pth")
    first = find_public("swin_base_patch4_window12_384_22kto1k")
    assert (first.backbone, first.window_size, first.pretrained_window_size) == ("swin_base", (12,) * 4, None)
    for name, known in PUBLIC_WEIGHTS.items():
        assert known.file == f"{name}.pth"
        assert known.backbone in SWINV2_SIZES or known.backbone.startswith("swin_")


def test_one_rule_for_the_cache_folder(monkeypatch) -> None:
    """model may import nothing of data, so the rule stands twice; the two must agree."""
    for value in ("/somewhere/else", "~/there", "", None):
        if value is None:
            monkeypatch.delenv("PERMAFROST_CACHE")
        else:
            monkeypatch.setenv("PERMAFROST_CACHE", value)
        assert weights_folder() == cache_folder() / "weights"
