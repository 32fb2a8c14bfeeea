"""README and docs/stores.md are executed: their Python in a folder with models, their commands as commands."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import zoo
from modelcache import ModelRegistry
from serving.command import serving

if TYPE_CHECKING:
    from sybil.typing import Evaluator

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
STORES = ROOT / "docs" / "stores.md"
HOUSE = [1990, 3047, 5, 1.0, 1.11, 2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the models and rows that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "models").mkdir(parents=True)
    for city in ("Chicago_IL", "Dallas_TX", "Houston_TX"):
        (tmp_path / "demo" / "models" / f"{city}.tar.gz").write_bytes(zoo.model().targz)
    (tmp_path / "demo" / "houses.csv").write_text(",".join(map(str, HOUSE)) + "\n")
    return tmp_path


def blocks(language: str, document: Path = README) -> list[str]:
    """Return the code blocks of one language in a document."""
    nothing: Evaluator = lambda example: None  # noqa: E731 - sybil wants a callable
    parsed = Sybil([CodeBlockParser(language, nothing)]).parse(document)
    return [str(example.parsed) for example in parsed.examples()]


def test_the_first_screen_runs(folder: Path) -> None:
    """What a reader sees first works when it is pasted into a file."""
    script = folder / "first_screen.py"
    script.write_text(blocks("python")[0])
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[-?\d+\.?\d*(e[+-]\d+)?\]", done.stdout.strip())
    assert done.stderr == ""


async def test_the_blocks_about_stores_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of docs/stores.md does what its text says, one after the other as in a notebook."""
    (folder / "demo" / "models").rename(folder / "models")
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (folder / "models").iterdir()}
    (folder / "models" / "MANIFEST.json").write_text(json.dumps({"sha256": digests}))
    namespace: dict[str, Any] = {"artifact": zoo.model().ubj}
    for block in blocks("python", STORES):
        running = eval(compile(block, STORES, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
        if running is not None:
            await running
    printed = capsys.readouterr().out
    for line in ("['Chicago_IL']", "v1", digests["Chicago_IL.tar.gz"]):
        assert line in printed.splitlines()


def test_the_policy_in_the_document_grants_reading_alone() -> None:
    """The JSON blocks are JSON, and the rights of the first are the least that a store needs."""
    policy, manifest = map(json.loads, blocks("json", STORES))
    actions = [statement["Action"] for statement in policy["Statement"]]
    assert actions == [["s3:GetObject", "s3:GetObjectVersion"], "s3:ListBucket"]
    assert list(manifest) == ["sha256"]


async def test_the_tour_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call that the README shows does what its comment says."""
    namespace: dict[str, Any] = {"ModelRegistry": ModelRegistry}
    bucket, tour, _ = blocks("python")[1:]
    exec(bucket, namespace)
    assert repr(namespace["registry"]).startswith("<ModelRegistry s3://my-bucket/models 0 ready")
    exec(tour, namespace)
    async with ModelRegistry("demo/models", memory_budget="2 GiB") as registry:
        await namespace["tour"](registry, [HOUSE])
    printed = capsys.readouterr().out
    assert "2 loaded, {} failed" in printed
    assert "Phoenix_AZ is cold: it has never been asked for." in printed
    assert re.search(r"<ModelRegistry demo/models 3 ready, 0 loading, \d+\.\d/2048\.0 MiB, \d+ workers>", printed)


def test_its_commands_exist(folder: Path) -> None:
    """Each command that the documents show is a target of the Makefile, or runs."""
    (folder / "models").symlink_to(folder / "demo" / "models")
    shown = [*blocks("console"), *blocks("console", STORES)]
    commands = [line[2:] for block in shown for line in block.splitlines() if line.startswith("$ ")]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert arguments[0] in targets
            continue
        if arguments[0] == "serve":  # has a test of its own
            continue
        done = subprocess.run(
            [sys.executable, "-m", program, *arguments], check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_its_server_answers_boto3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the README shows serves the call that it shows, and ends by SIGTERM."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    (command,) = [line for block in blocks("console") for line in block.splitlines() if "modelcache serve" in line]
    namespace: dict[str, Any] = {}
    _, _, _, store, *options = shlex.split(command)
    with serving(Path(store), *options) as server:
        exec(blocks("python")[3].replace(":8080", f":{server.port}"), namespace)
        answer = namespace["before_and_after"](",".join(map(str, HOUSE)))
    assert np.float32(json.loads(answer)) == zoo.model().expected([HOUSE])


def test_its_figures_are_the_measured_ones() -> None:
    """The table in the README is the one that the benchmarks wrote."""
    shown = re.search(r"<!-- results -->\n(.*)<!-- /results -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == (ROOT / "benchmarks" / "results" / "readme.md").read_text()


def test_its_links_lead_somewhere() -> None:
    """Relative links in the documents are files of the repository."""
    for document in (README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
