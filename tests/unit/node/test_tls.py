"""Guards node.tls, and clients and probes that speak HTTPS to a server with a certificate of its own."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import closing
from pathlib import Path

import pytest

from baton.launch import serve
from baton.node.api_settings import ApiSettings
from baton.node.errors import SettingsError
from baton.node.http_client import HttpClient, HttpFailed, Origin
from baton.node.tls import check_certificate
from baton.tests.certificate import make_certificate


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_good_files_pass(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Guards against refusing a key that is in the certificate's file."""
    check_certificate(*files)
    both = tmp_path / "both.pem"
    both.write_bytes(files[0].read_bytes() + files[1].read_bytes())
    check_certificate(both, None)


def test_bad_files_are_errors_of_settings(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Guards against a traceback, or a prompt for a password, when the weights are loaded already."""
    certificate, key = files
    _, other = make_certificate(tmp_path, "other")
    (tmp_path / "no.pem").write_text("no certificate")
    for pair, said in (
        ((tmp_path / "missing", key), "missing: cannot be read"),
        ((certificate, tmp_path / "gone"), "gone: cannot be read"),
        ((tmp_path / "no.pem", key), "PEM"),
        ((certificate, other), "not that of the certificate"),
        ((certificate, None), "PEM"),
    ):
        with pytest.raises(SettingsError, match=said):
            check_certificate(*pair)
    with pytest.raises(SettingsError, match="--tls-cert"):
        ApiSettings(tls_key=key)


async def test_clients_and_the_probe_speak_https(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `LLM(base_url="https://...")` and the load generator, a start that never gets ready, and a client that
    takes any certificate."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server, asyncio.timeout(60):
        port = server.sockets[0].getsockname()[1]
        origin = Origin.parse(f"https://127.0.0.1:{port}/v1")
        http = HttpClient(origin, {}, time.monotonic)
        with closing(http), pytest.raises(HttpFailed, match="SSL_CERT_FILE"):
            await http.get("/x")
        monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
        with closing(HttpClient(origin, {}, time.monotonic)) as http:
            assert await http.get("/x") == (200, b"ok")
        assert await serve.token_probe("127.0.0.1", port, "", tls=True)() == ""
        assert "does not answer" in await serve.token_probe("127.0.0.1", port, "")()
