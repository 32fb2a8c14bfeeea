"""F11, P5: registries that outlive the event loop they were started on."""

from __future__ import annotations

import json
import subprocess

import pytest

from apps import ENVIRONMENT, PATIENCE, command

BODY = """
    async def use(registry):
        answer = (await registry.predict("odd", [0, 21])).tolist()
        tell(answer=answer, workers=len(psutil.Process().children()))

    async def refused(registry):
        try:
            await registry.predict("odd", [0, 21])
        except RegistryClosedError as error:
            tell(refused=str(error))

    def by_run(main):
        asyncio.run(main)

    def by_hand(main):  # nothing is cancelled, and nothing awaited
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main)
        loop.close()

    asyncio.run(asyncio.sleep(0))  # what asyncio opens once
    descriptors = len(os.listdir("/dev/fd"))
    registry = make(workers=2)
    {"run": by_run, "hand": by_hand}[sys.argv[1]](use(registry))
    for _ in range(2):
        asyncio.run(registry.close())
    asyncio.run(refused(registry))
    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=10)
    del registry
    gc.collect()
    tell(alive=len(alive), more=len(os.listdir("/dev/fd")) - descriptors)
"""


@pytest.mark.parametrize("loop", ["run", "hand"])
def test_close_after_the_loop_has_ended(loop: str) -> None:
    """F11: on another loop, and twice, it is harmless: the workers end, and no descriptor is left."""
    done = subprocess.run(
        command(BODY, arguments=(loop,)),
        check=True, env=ENVIRONMENT, timeout=PATIENCE, capture_output=True, text=True,
    )  # fmt: skip
    assert list(map(json.loads, done.stdout.splitlines())) == [
        {"answer": [42], "workers": 2},
        {"refused": "The registry is closed: make a new one."},
        {"alive": 0, "more": 0},
    ]
    assert "unclosed registry" not in done.stderr
    if loop == "run":
        assert done.stderr == ""
