"""``modelcache serve`` as people, load balancers and strangers meet it."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import sys
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING

import boto3  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest

import zoo
from modelcache.cli import main
from modelcache.serving.listening import is_loopback
from serving.command import ROOT, Served, place, serving, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Refused = Callable[..., str]

ROW = "1,2,3,4,5,6\n"
CSV = "text/csv"
MODELS = ("Chicago_IL", "tenant_a/m", "tenant_b/m")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.ubj").write_bytes(zoo.model().ubj)
    return folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Served]:
    """One without tokens, with deadlines that a test can wait for."""
    with serving(store, "--request-timeout", 0.2, "--max-body", "64 KiB", "--max-rows", 9, "--access-log") as served:
        yield served


@pytest.fixture(scope="module")
def guarded(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One with a token for all, and one for what is below tenant_a."""
    file = tmp_path_factory.mktemp("secrets") / "tokens"
    file.write_text("admin\nteam-a tenant_a/*\n")
    file.chmod(0o600)
    with serving(store, "--token-file", file) as served:
        yield served


def expected() -> float:
    return float(zoo.model().expected(np.arange(1, 7, dtype=np.float32))[0])


# Both protocols, and what is between them


def test_logs_can_be_read_by_programs(store: Path) -> None:
    """Each line is JSON: events and requests, with model and version."""
    options = ("--log-format", "json", "--log-level", "info", "--access-log")
    with serving(store, *options) as server:
        assert server.ask("POST", "/models/tenant_a%2Fm/invoke", ROW, content_type=CSV).status == 200
        _, errors = server.end()
    lines = [json.loads(line) for line in errors.splitlines()]
    assert all(line["time"] and line["level"] and line["logger"] and line["message"] for line in lines)
    (loaded,) = [line for line in lines if line.get("event") == "loaded"]
    (request,) = [line for line in lines if line.get("event") == "request"]
    assert (request["model"], request["version"]) == (loaded["model"], loaded["version"])
    assert request["status"] == 200


def test_one_line_says_where_and_what(server: Served, store: Path) -> None:
    """The store, the URL, the budget and the workers, as soon as requests are taken."""
    pattern = r"Serving (\S+) on http://127\.0\.0\.1:\d+ \(64\.0 MiB for models, 1 worker\)\n"
    found = re.fullmatch(pattern, server.line)
    assert found is not None and found[1] == str(store)


def test_both_protocols_are_served(server: Served) -> None:
    """A model is asked in either, and figures, health and the description are there."""
    called = server.ask("POST", "/models/tenant_a/m/invoke", ROW, content_type=CSV)
    assert (called.status, called.json) == (200, [pytest.approx(expected())])
    tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}
    inferred = server.ask("POST", "/v2/models/tenant_a/m/infer", json.dumps({"inputs": [tensor]}))
    assert inferred.json["outputs"][0]["data"] == [pytest.approx(expected())]
    assert [server.ask("GET", path).status for path in ("/ping", "/v2/health/ready", "/openapi.json")] == [200] * 3
    assert b"modelcache_" in server.ask("GET", "/metrics").body
    assert server.ask("GET", "/nowhere").status == 404


def test_the_second_engine_can_be_had(store: Path) -> None:
    """A model that is asked often enough is answered by ONNX Runtime, which its worker loads for that."""
    with serving(store, "--engine", "auto") as server:
        (worker,) = psutil.Process(server.process.pid).children()
        while not any("onnxruntime" in mapped.path for mapped in worker.memory_maps()):
            called = server.ask("POST", "/models/tenant_a/m/invoke", ROW, content_type=CSV)
        called = server.ask("POST", "/models/tenant_a/m/invoke", ROW, content_type=CSV)
        assert (called.status, called.json) == (200, [pytest.approx(expected())])


def test_request_ids_are_echoed_by_both(server: Served) -> None:
    """Whatever the route, also one that does not exist."""
    for path in ("/ping", "/v2", "/metrics", "/nowhere"):
        assert server.ask("GET", path, x_request_id="a-1").headers["x-request-id"] == "a-1"


def test_bodies_have_a_limit(server: Served) -> None:
    """Too many bytes, or rows, are 413 in both protocols, the connection lives on, and nobody else notices."""
    for count, status in ((9, 200), (10, 413)):
        tensor = {"name": "x", "shape": [count, 6], "datatype": "FP32", "data": [1] * 6 * count}
        asked = server.ask("POST", "/v2/models/Chicago_IL/infer", json.dumps({"inputs": [tensor]}))
        invoked = server.ask("POST", "/models/Chicago_IL/invoke", ROW * count, content_type=CSV)
        assert (asked.status, invoked.status) == (status, status)
    for path in ("/models/Chicago_IL/invoke", "/v2/models/Chicago_IL/infer", "/models"):
        assert server.ask("POST", path, b"1" * (65 << 10), content_type=CSV).status == 413
    assert server.ask("POST", "/models/Chicago_IL/invoke", ROW, content_type=CSV).status == 200


@pytest.mark.parametrize("part", ["POST /models", "POST /models/m/invoke HTTP/1.1\r\nContent-Length: 10\r\n\r\n1,2"])
def test_half_a_request_is_ended(server: Served, part: str) -> None:
    """Who does not finish a request in time is told so and let go, by the clock of the server itself."""
    with closing(socket.create_connection(place(server.url), timeout=50)) as client:
        client.sendall(part.encode())
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_requests_sent_ahead_are_answered_in_order(server: Served) -> None:
    """Pipelined calls of several models get their own answers."""
    call = "POST /models/{}/invoke HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\nContent-Length: {}\r\n{}\r\n{}"
    calls = [call.format(MODELS[number % 3], len(ROW), f"X-Request-Id: {number}\r\n", ROW) for number in range(9)]
    calls[-1] = calls[-1].replace("Host: x", "Host: x\r\nConnection: close")
    with closing(socket.create_connection(place(server.url), timeout=50)) as client:
        client.sendall("".join(calls).encode())
        answers = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert re.findall(rb"x-request-id: (\d)", answers) == [b"%d" % number for number in range(9)]
    assert answers.count(b"HTTP/1.1 200 ") == 9


def test_two_thousand_connections(store: Path) -> None:
    """Two thousand clients are connected; some ask, the others wait, and all who ask are answered."""
    needed = 2200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"this system allows {hard} open files for a process")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft), hard))  # the server raises its own
    with ExitStack() as stack:
        served = stack.enter_context(serving(store))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        clients = [
            stack.enter_context(closing(socket.create_connection(place(served.url), timeout=50))) for _ in range(2000)
        ]
        request = f"POST /models/m/invoke HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n\r\n{ROW}"
        for client in clients[::10]:
            client.sendall(request.replace("models/m", "models/tenant_a/m").encode())
        assert all(client.recv(1 << 16).startswith(b"HTTP/1.1 200 ") for client in clients[::10])
        assert served.ask("GET", "/ping").status == 200


# Tokens


def test_boto3_sends_the_token_with_its_credentials(guarded: Served) -> None:
    """The session token of its credentials opens what it opens, with nothing else changed."""

    def invoke(token: str, model: str) -> bytes:
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_session_token": token}
        client = boto3.client("sagemaker-runtime", region_name="us-east-1", endpoint_url=guarded.url, **keys)
        with closing(client):
            done = client.invoke_endpoint(EndpointName="e", TargetModel=model, ContentType=CSV, Body=ROW)
            return bytes(done["Body"].read())

    assert json.loads(invoke("team-a", "tenant_a/m")) == [pytest.approx(expected())]
    with pytest.raises(Exception, match="An error occurred"):
        invoke("nobody", "tenant_a/m")
    with pytest.raises(Exception, match="does not reach"):
        invoke("team-a", "tenant_b/m")


THEIRS = [
    "tenant_b/m",
    "tenant_b/m.ubj",
    "tenant_b/m.tar.gz",
    "tenant_b%2Fm",
    "tenant%5Fb/m",
    "%74enant_b/m",
    "tenant_b%252Fm",
    "tenant_b//m",
    "tenant_b/./m",
    "tenant_a/../tenant_b/m",
    "tenant_a%2F..%2Ftenant_b/m",
    "tenant_a/%2e%2e/tenant_b/m",
    "tenant_a%2F%2E%2E%2Ftenant_b%2Fm",
    "./tenant_b/m",
    "/tenant_b/m",
    "Chicago_IL",
    "TENANT_B/m",
    "tenant_b/m%00",
    "tenant_a/m%00/../../tenant_b/m",
    "tenant_b/m%0a",
    "tenant_b\\m",
]


@pytest.mark.parametrize("name", THEIRS)
def test_no_spelling_reaches_the_model_of_another(guarded: Served, name: str) -> None:
    """However the name is written, and on whatever route: nothing is predicted, told, loaded or unloaded."""
    path = name.replace("\\", "%5C")
    ask = partial(guarded.ask, authorization="Bearer team-a")
    tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}
    infer = json.dumps({"inputs": [tensor]})
    assert guarded.ask("POST", "/v2/models/tenant_b/m/infer", infer, authorization="Bearer admin").status == 200
    tried = [
        ask("POST", f"/models/{path}/invoke", ROW, content_type=CSV),
        ask("GET", f"/models/{path}"),
        ask("DELETE", f"/models/{path}"),
        ask("POST", "/models", json.dumps({"model_name": "tenant_a/n", "url": name})),
        ask("POST", "/invocations", ROW, content_type=CSV, x_amzn_sagemaker_target_model=name),
        ask("POST", "/endpoints/e/invocations", ROW, content_type=CSV, x_amzn_sagemaker_target_model=name),
        ask("POST", f"/v2/models/{path}/infer", infer),
        ask("POST", f"/v2/models/{path}/versions/1/infer", infer),
        *(ask("GET", f"/v2/models/{path}{verb}") for verb in ("", "/config", "/ready")),
        *(ask("POST", f"/v2/repository/models/{path}/{verb}", "{}") for verb in ("load", "unload")),
    ]
    assert {answer.status for answer in tried} <= {400, 403, 404, 424}, [
        (place, answer.status, answer.body[:80]) for place, answer in enumerate(tried) if answer.status < 400
    ]
    assert b"inference_count" not in ask("GET", f"/v2/models/{path}/stats").body
    loaded = guarded.ask("GET", "/models/tenant_b/m", authorization="Bearer admin")
    assert loaded.status == 200, "it has been unloaded"


def test_a_name_of_another_is_not_to_be_taken(guarded: Served) -> None:
    """Nobody can put a model of theirs behind a name that others call."""
    taken = json.dumps({"model_name": "tenant_b/new", "url": "tenant_a/m"})
    assert guarded.ask("POST", "/models", taken, authorization="Bearer team-a").status == 403


def test_lists_show_ones_own_models_alone(guarded: Served) -> None:
    """Neither protocol's lists, nor the figures, tell a tenant what others there are."""
    for name in MODELS:
        assert guarded.ask("POST", f"/v2/repository/models/{name}/load", authorization="Bearer admin").status == 200
    given = json.dumps({"model_name": "named_b", "url": "tenant_b/m.ubj"})
    guarded.ask("POST", "/models", given, authorization="Bearer admin")
    lists = [("GET", "/models"), ("POST", "/v2/repository/index"), ("GET", "/v2/models/stats")]
    for method, path in lists:
        mine = guarded.ask(method, path, authorization="Bearer team-a")
        assert mine.status == 200
        assert b"tenant_a/m" in mine.body
        assert b"tenant_b" not in mine.body and b"named_b" not in mine.body and b"Chicago" not in mine.body
        assert b"tenant_b" in guarded.ask(method, path, authorization="Bearer admin").body
    assert guarded.ask("GET", "/metrics", authorization="Bearer team-a").status == 403
    assert guarded.ask("GET", "/metrics", authorization="Bearer admin").status == 200


def test_without_a_token_there_is_only_health(guarded: Served) -> None:
    """Whatever else is asked for is 401, by the guard or not at all."""
    assert guarded.ask("GET", "/ping").status == guarded.ask("GET", "/v2/health/ready").status == 200
    for method, path in (
        ("POST", "/models/tenant_a/m/invoke"),
        ("GET", "/models"),
        ("POST", "/models"),
        ("DELETE", "/models/tenant_a/m"),
        ("GET", "/v2"),
        ("POST", "/v2/repository/index"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ):
        answer = guarded.ask(method, path)
        assert (answer.status, answer.headers["www-authenticate"][:6]) == (401, "Bearer")


# Management


def manage(served: Served, port: int = 0) -> list[int]:
    """Return how loading and unloading is answered, in both protocols."""
    load = json.dumps({"model_name": "tenant_a/m", "url": "tenant_a/m.ubj"})
    return [
        served.ask("POST", "/models", load, port=port).status,
        served.ask("DELETE", "/models/tenant_a/m", port=port).status,
        served.ask("POST", "/v2/repository/models/tenant_a/m/load", "{}", port=port).status,
        served.ask("POST", "/v2/repository/models/tenant_a/m/unload", "{}", port=port).status,
    ]


def test_management_can_be_switched_off(store: Path) -> None:
    """No route loads or unloads, the description has none, and predictions go on."""
    with serving(store, "--no-management") as served:
        assert "no management" in served.line
        assert all(status in (404, 405) for status in manage(served))
        paths = served.ask("GET", "/openapi.json").json["paths"]
        assert "delete" not in paths["/models/{model_name}"]
        assert not any(path.startswith("/v2/repository/models") for path in paths)
        assert served.ask("POST", "/models/tenant_a/m/invoke", ROW, content_type=CSV).status == 200


def test_management_can_be_on_a_port_of_its_own(store: Path) -> None:
    """What loads and unloads is on that port alone; the other has all else, and knows the names given there."""
    with serving(store, "--management-port", 0) as served:
        (_, port), (_, managed) = place(served.urls[0]), place(served.urls[1])
        assert all(status in (404, 405) for status in manage(served, port))
        assert manage(served, managed) == [200] * 4
        load = json.dumps({"model_name": "hash", "url": "tenant_a/m"})
        assert served.ask("POST", "/models", load, port=managed).status == 200
        assert served.ask("POST", "/models/hash/invoke", ROW, content_type=CSV).status == 200
        assert served.ask("GET", "/ping", port=managed).status == 200
        assert served.end(signal.SIGINT) == (0, ""), "Ctrl-C is as good an end as SIGTERM"


# The end


def test_a_signal_ends_it_well(store: Path) -> None:
    """SIGTERM ends an idle server with 0 and without a word."""
    with serving(store, "--preload", "Chicago_IL") as served:
        assert served.ask("GET", "/models").json["models"][0]["modelName"] == "Chicago_IL"
        assert served.end(signal.SIGTERM) == (0, "")


def test_the_end_under_load_loses_no_request(store: Path) -> None:
    """In the middle of a load of kept and new connections, each request that was sent whole before the end is answered.

    A client may find no server (its connection is refused, or closed before it sent anything, or after an answer that
    said so); it may not have sent a request while the server listened and get nothing.
    """
    with serving(store, "--preload", "tenant_a/m") as served:
        load = Load(place(served.url))
        load.run(until=lambda: load.answered >= 400)
        served.process.send_signal(signal.SIGTERM)
        load.run(until=lambda: load.refused)
        load.finish()
        assert load.lost == []
        _, errors = served.process.communicate(timeout=50)
        assert (served.process.returncode, errors) == (0, "")


class Load:
    """Clients that each send a request, read its answer, and go on, half of them with a new connection each time."""

    def __init__(self, address: tuple[str, int], clients: int = 16) -> None:
        self.answered = 0
        self.refused = False
        self.lost: list[str] = []
        self._address = address
        self._polling = select.epoll()
        self._open: dict[int, tuple[socket.socket, bool, bytes]] = {}
        for number in range(clients):
            self._connect(keep=number % 2 == 0)

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self._step()

    def finish(self) -> None:
        """Wait for the answers to what is under way."""
        while self._open:
            self._step()
        self._polling.close()

    def _connect(self, *, keep: bool) -> None:
        if self.refused:
            return
        client = socket.socket()
        client.settimeout(5)
        try:
            client.connect(self._address)
        except ConnectionRefusedError:
            self.refused = True
            client.close()
            return
        self._open[client.fileno()] = (client, keep, b"")
        self._polling.register(client, select.EPOLLIN)
        self._send(client, keep=keep)

    def _send(self, client: socket.socket, *, keep: bool) -> None:
        close = "" if keep else "Connection: close\r\n"
        head = f"POST /models/tenant_a/m/invoke HTTP/1.1\r\nHost: x\r\n{close}Content-Length: {len(ROW)}\r\n\r\n"
        client.sendall((head + ROW).encode())

    def _step(self) -> None:
        for descriptor, _ in self._polling.poll(5):
            client, keep, before = self._open[descriptor]
            try:
                data = client.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            answer = before + data
            head, _, body = answer.partition(b"\r\n\r\n")
            if not data:
                self.lost.append(f"after {answer!r}, kept: {keep}")
            elif not body:
                self._open[descriptor] = (client, keep, answer)
                continue
            else:
                assert head.startswith(b"HTTP/1.1 200 "), answer
                self.answered += 1
                if keep and b"connection: close" not in head.lower() and not self.refused:
                    self._open[descriptor] = (client, keep, b"")
                    self._send(client, keep=keep)
                    continue
            del self._open[descriptor]
            client.close()
            self._connect(keep=keep)


def test_load_balancers_see_the_end_coming(store: Path) -> None:
    """From the signal on health says 503, while what was accepted is answered."""
    with serving(store) as served, closing(socket.create_connection(place(served.url), timeout=50)) as client:
        client.sendall(b"POST /models/tenant_a/m/invoke HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n1,2,")
        with closing(socket.create_connection(place(served.url), timeout=50)) as balancer:
            balancer.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in balancer.recv(1 << 16)
            served.process.send_signal(signal.SIGTERM)
            answers: list[bytes] = []
            while not answers or b" 200 " in answers[-1]:
                balancer.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
                answers.append(balancer.recv(1 << 16))
        assert b" 503 " in answers[-1] and b"retry-after" in answers[-1]
        client.sendall(b"3,4,5,6\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


# What cannot be served


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return the line that says why the command did not start."""

    def run(*arguments: object, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["modelcache", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (code, "")
        assert code == 2 or (said.err.startswith("modelcache: ") and said.err.count("\n") == 1)
        return said.err

    return run


def test_a_port_that_is_taken(refused: Refused, store: Path) -> None:
    """One line says which, and what to do."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        assert f"Port {port} of 127.0.0.1" in refused(store, "--port", port)
        assert "Port 0 of nowhere.invalid" in refused(store, "--host", "nowhere.invalid", "--port", 0, "--insecure")


def test_what_cannot_be_opened(refused: Refused, store: Path, tmp_path: Path) -> None:
    """A store that is not there, a token file that is not, a size that is none, options that exclude each other."""
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", "--port", 0)
    assert "token file" in refused(store, "--token-file", tmp_path / "none")
    assert "ftp" in refused("ftp://models", "--port", 0)
    assert "no size" in refused(store, "--memory-budget", "much", code=2)
    assert "exclude" in refused(store, "--no-management", "--management-port", 0, code=2)


def test_other_hosts_are_not_let_in_by_accident(refused: Refused, store: Path) -> None:
    """An address that others can reach needs tokens, or a word that says it does not."""
    with closing(socket.create_server(("0.0.0.0", 0))) as other:
        port = other.getsockname()[1]
        assert "--token-file" in refused(store, "--host", "0.0.0.0", "--port", port)
        assert "listens there already" in refused(store, "--host", "0.0.0.0", "--port", port, "--insecure")


def test_other_hosts_are_let_in_with_tokens(store: Path, tmp_path: Path) -> None:
    """The URL is one that this host can use; a token file that every user can read is warned of."""
    tokens = tmp_path / "tokens"
    tokens.write_text("admin\n")
    tokens.chmod(0o644)
    with serving(store, "--host", "0.0.0.0", "--token-file", tokens) as served:
        assert served.host == "127.0.0.1" and "1 token" in served.line
        assert served.ask("GET", "/ping").status == 200
        code, errors = served.end()
        assert code == 0 and "chmod" in errors


def test_loopback_is_told_apart() -> None:
    """Addresses and the one name that only this host reaches."""
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.com", ""]))


@pytest.mark.parametrize("missing", ["uvicorn", "httptools", "starlette"])
def test_without_its_extra_it_says_what_to_install(store: Path, tmp_path: Path, missing: str) -> None:
    """An installation without the extra answers with the command that adds it."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = start(store, PYTHONPATH=path)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 1
    assert missing in errors and "pip install 'modelcache[serve]'" in errors and "Traceback" not in errors
