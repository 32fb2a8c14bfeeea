"""A real web server over a folder, which writes nothing outside that folder."""

from __future__ import annotations

import datetime as dt
import os
import socket
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from servers.required import find_program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER, PASSWORD = "reader", "s3cret/@"

_LOCATIONS = r"""
    location /private/  { alias ROOT/; auth_basic models; auth_basic_user_file users; }
    location /moved/    { rewrite ^/moved/(.*)$ /$1 redirect; }
    location ~ ^/away/(?<port>\d+)/(?<rest>.*)$ { return 302 http://127.0.0.1:$port/$rest; }
    location /plainly/  { rewrite ^/plainly/(.*)$ http://$http_host/$1 redirect; }
    location /circle/   { rewrite ^ /circle/ redirect; }
    location /gzip/     { alias ROOT/; gzip on; gzip_types *; gzip_min_length 1; }
    location /packed/   { alias ROOT/; gzip_static always; }
    location /dated/    { alias ROOT/; etag off; }
    location /undated/  { alias ROOT/; etag off; add_header Last-Modified ""; if_modified_since off; }
    location /rangeless/ { alias ROOT/; max_ranges 0; }
"""
"""The same folder, served in other ways. /gzip/ compresses for those who accept it, /packed/ sends NAME.gz to all."""

_CONFIG = r"""
daemon off; pid nginx.pid; error_log error.log; worker_processes 1; USER
events { worker_connections 512; }
http {
    access_log off; absolute_redirect off; sendfile on; default_type application/octet-stream;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server {
        listen HTTP_ADDRESS;
        listen HTTPS_ADDRESS ssl;
        ssl_certificate server.pem; ssl_certificate_key server.pem;
        root ROOT;
        LOCATIONS
    }
}
"""


@dataclass(frozen=True)
class Nginx:
    """A running server."""

    root: Path
    """What it serves."""
    url: str
    tls_url: str
    certificate: Path
    """What a client has to trust in order to use ``tls_url``."""


@contextmanager
def serving(folder: Path) -> Iterator[Nginx]:
    """Serve ``folder / "root"``; everything else that nginx writes is in ``folder`` too."""
    program = find_program("nginx", "install the package nginx-light of Debian or Ubuntu.")
    root = folder / "root"
    root.mkdir()
    (folder / "users").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    (folder / "server.pem").write_bytes(_certificate())
    # It inherits sockets that already listen, as when it is upgraded in place: nobody else can take the ports in
    # between, and a client that comes before it is ready waits.
    with socket.create_server(("127.0.0.1", 0)) as plain, socket.create_server(("127.0.0.1", 0)) as tls:
        http, https = (f"127.0.0.1:{listener.getsockname()[1]}" for listener in (plain, tls))
        (folder / "nginx.conf").write_text(_configure(root, http, https))
        listeners = (plain.fileno(), tls.fileno())
        process = subprocess.Popen(
            [program, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"],
            env={**os.environ, "NGINX": "".join(f"{listener};" for listener in listeners)},
            pass_fds=listeners, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield Nginx(root, f"http://{http}", f"https://{https}", folder / "server.pem")
        assert process.poll() is None, f"nginx has ended: {(folder / 'error.log').read_text()}"
    finally:
        process.terminate()
        process.wait()


def _configure(root: Path, http: str, https: str) -> str:
    # As root it would serve as "nobody", who may not read the folders of a test.
    words = {"LOCATIONS": _LOCATIONS, "ROOT": str(root), "USER": "" if os.geteuid() else "user root root;"}
    config = _CONFIG
    for word, text in {**words, "HTTP_ADDRESS": http, "HTTPS_ADDRESS": https}.items():
        config = config.replace(word, text)
    return config


def _certificate() -> bytes:
    """Return a key and a certificate for it that nobody has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)
