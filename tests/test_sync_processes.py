"""modelcache.sync in programs that end, and that fork: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

import zoo
from apps import ENVIRONMENT, PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

PREAMBLE = """
    import json, os, sys, threading, warnings
    from contextlib import ExitStack
    from modelcache import RegistryClosedError
    from modelcache.sync import ModelRegistry

    warnings.filterwarnings("ignore", message=".* is multi-threaded, use of fork", category=DeprecationWarning)

    def tell(fact):
        os.write(1, json.dumps(fact).encode() + b"\\n")

    def attempt(call, *arguments):
        try:
            call(*arguments)
        except RegistryClosedError as error:
            return str(error)

    def in_child(function):
        child = os.fork()
        if not child:
            try:
                function()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    ROW = [[0.0] * 6]
    registry = ModelRegistry(sys.argv[1], workers=1, memory_budget="64 MiB")
"""


@pytest.fixture
def run(tmp_path: Path, no_processes_left: None) -> Any:
    """Run a script, and give what it tells, and what it says on standard error."""
    (tmp_path / "m.ubj").write_bytes(zoo.model().ubj)

    def run_script(script: str) -> tuple[list[Any], str]:
        code = textwrap.dedent(PREAMBLE) + textwrap.dedent(script)
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", code, tmp_path],
            check=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return run_script


def test_a_script_that_never_closes_warns_and_ends(run: Any) -> None:
    """Its exit is not held up, and nothing breaks in it; the workers and a disk cache end with the registry."""
    _, complaints = run("""
        registry = ModelRegistry("file://" + sys.argv[1], workers=1, disk_cache=sys.argv[1] + "/copies")
        registry.predict("m", ROW)
    """)
    assert complaints.count("ResourceWarning: unclosed registry <sync.ModelRegistry") == 1
    assert "Traceback" not in complaints


def test_threads_go_on_after_the_main_thread(run: Any) -> None:
    """A program ends with its last thread: until then the registry answers."""
    told, complaints = run("""
        def serve():
            threading.main_thread().join()
            tell(registry.predict("m", ROW).shape)
            registry.close()

        threading.Thread(target=serve).start()
    """)
    assert (told, complaints) == ([[1]], "")


def test_a_script_that_closes_says_nothing(run: Any) -> None:
    """No warning, and nothing that the end of the interpreter complains about."""
    assert run("with registry: registry.predict('m', ROW)") == ([], "")


def test_a_script_that_ends_while_a_call_waits(run: Any) -> None:
    """The call is told, if there is time, and keeps nobody waiting."""
    _, complaints = run("""
        from modelcache.testing import GatedStore

        class Told(GatedStore):
            async def fetch(self, name, **options):
                asked.set()
                return await super().fetch(name, **options)

        asked = threading.Event()
        registry = ModelRegistry(Told({"m.ubj": b""}), workers=1)
        threading.Thread(target=attempt, args=(registry.predict, "m", ROW), daemon=True).start()
        asked.wait()
    """)
    assert "ResourceWarning: unclosed registry" in complaints
    assert "Traceback" not in complaints


def test_it_may_be_made_before_a_fork(run: Any) -> None:
    """As under a server that imports the app and forks: each process that makes a call has workers of its own."""
    told, complaints = run("""
        def serve():
            with registry:
                registry.predict("m", ROW)
                tell(registry.stats().workers[0].pid)

        in_child(serve)
        in_child(serve)
        serve()
    """)
    assert len(set(told)) == 3
    assert complaints == ""


def test_after_its_start_it_is_of_no_use_in_a_fork(run: Any) -> None:
    """The child is told what to do, and can close it; the parent's goes on."""
    told, complaints = run("""
        def serve():
            tell(attempt(registry.predict, "m", ROW))
            tell(attempt(registry.start))
            tell(len(registry.loaded()))
            registry.close()

        with registry:
            registry.predict("m", ROW)
            in_child(serve)
            tell(registry.predict("m", ROW).shape)
    """)
    assert "before the process forked" in told[0]
    assert "call it only after" in told[1]
    assert told[2:] == [1, [1]]
    assert complaints == ""


def test_a_fork_in_the_middle_of_calls_blocks_nobody(run: Any) -> None:
    """Whatever the parent's threads held as it forked, the child gets its error, and the parent its answers."""
    told, complaints = run("""
        def call():
            while not over.is_set():
                registry.predict("m", ROW)

        over = threading.Event()
        with registry:
            threads = [threading.Thread(target=call) for _ in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(10):
                in_child(lambda: tell(attempt(registry.predict, "m", ROW)))
            over.set()
            for thread in threads:
                thread.join()
    """)
    assert len(told) == 10
    assert all("before the process forked" in each for each in told)
    assert complaints == ""


def test_a_fork_inside_a_block(run: Any) -> None:
    """The child can leave it, and gets its error where it would wait for the parent's thread."""
    told, complaints = run("""
        from modelcache import MemoryStore

        def serve():
            with block:
                tell(attempt(lease.predict, ROW))
            tell(attempt(list, names))

        store = MemoryStore({f"m{number}.ubj": b"" for number in range(3000)})
        with registry, ModelRegistry(store, workers=1) as many:
            names = many.names()
            next(names)
            block = ExitStack()
            lease = block.enter_context(registry.acquire("m"))
            in_child(serve)
            tell(len(list(names)))
            with block:
                tell(lease.predict(ROW).shape)
    """)
    assert ["before the process forked" in each for each in told[:2]] == [True, True]
    assert told[2:] == [2999, [1]]
    assert complaints == ""
