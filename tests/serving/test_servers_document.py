"""docs/servers.md is executed: its Python against ``modelcache serve``, and what it lists is what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import zoo
from modelcache.commands.app import serve
from modelcache.serving.codecs import CONTENT_TYPES, MEDIA_TYPES
from serving.command import serving

DOCUMENT = Path(__file__).parents[2] / "docs" / "servers.md"
HOUSE = [[1990, 3047, 5, 1.0, 1.11, 2]]


def blocks() -> list[str]:
    parsed = Sybil([CodeBlockParser("python", lambda _: None)]).parse(DOCUMENT)
    return [str(example.parsed) for example in parsed.examples()]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the models that the document speaks of."""
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    folder = tmp_path / "demo" / "models"
    folder.mkdir(parents=True)
    for city in ("Chicago_IL", "Houston_TX"):
        (folder / f"{city}.tar.gz").write_bytes(zoo.model().targz)
    return folder


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # tritonclient leaves sockets to be collected
def test_its_blocks_run(models: Path) -> None:
    """The clients get the model's own answers, and so do threads."""
    expected = zoo.model().expected(HOUSE)
    sagemaker, triton, _, threads, _ = blocks()
    with serving(models) as server:
        here = sagemaker.replace(":8080", f":{server.port}")
        assert run(here)["price"] == expected[0]
        assert run(triton.replace(":8080", f":{server.port}"))["prices"].tolist() == expected.tolist()
    assert run(threads)["prices"].tolist() == expected.tolist()


@pytest.fixture
def names(models: Path) -> dict[str, Any]:
    """What the app of the document is made of; made without a loop, as a server does."""
    _, _, mounted, _, metrics = blocks()
    return run(mounted + metrics)


async def test_its_app_answers(names: dict[str, Any]) -> None:
    """Both protocols and the metrics, put together as the document says."""
    async with (
        names["registry"],
        httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://app") as client,
    ):
        headers = {"content-type": "text/csv", "x-amzn-sagemaker-target-model": "Chicago_IL"}
        answer = await client.post("/sagemaker/invocations", headers=headers, content="1990,3047,5,1.0,1.11,2")
        assert float(answer.text) == zoo.model().expected(HOUSE)[0]
        assert (await client.get("/v2/models/Chicago_IL/ready")).status_code == 200
        assert "modelcache_memory_budget_bytes" in (await client.get("/metrics")).text


def run(block: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(block, DOCUMENT, "exec"), namespace)
    return namespace


def test_it_lists_each_option_of_the_command() -> None:
    """No more, and no fewer."""
    text = DOCUMENT.read_text()
    table = text[text.index("| option") : text.index("**Other hosts.**")]
    options = {"--" + name.replace("_", "-") for name in inspect.signature(serve).parameters if name != "store"}
    written = set(re.findall(r"`(--[a-z-]+)", table))
    assert written == options - {"--management"} | {"--no-management"}


def test_it_lists_each_type_of_bodies() -> None:
    """In both directions."""
    text = DOCUMENT.read_text()
    requests = text[text.index("### Requests") : text.index("### Answers")]
    answers = text[text.index("### Answers") : text.index("### Failures")]
    assert all(f"`{one}`" in requests for one in CONTENT_TYPES)
    assert all(f"`{one}`" in answers for one in MEDIA_TYPES)


def test_its_links_lead_somewhere() -> None:
    """Files and headings."""
    text = DOCUMENT.read_text()
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in lines}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (DOCUMENT.parent / link.partition("#")[0]).exists(), link
