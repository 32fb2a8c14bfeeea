"""The OpenAPI document: whether it is one, whether it is true, and what strangers who have read it can do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from starlette.routing import Route

import zoo
from modelcache import MemoryStore, ModelRegistry
from modelcache.serving.open_inference_app import open_inference
from modelcache.serving.openapi import describe
from modelcache.serving.sagemaker_app import sagemaker
from serving.command import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from schemathesis import Case

    from serving.command import Served

EXAMPLES = 5
"""Requests for each operation: enough to see that nothing breaks, few enough for every run of the tests."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("models")
    (folder / "Chicago_IL.ubj").write_bytes(zoo.model().ubj)
    with serving(folder, "--max-body", "64 KiB") as served:
        yield served


def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method, path) for path, found in document["paths"].items() for method in found}


@pytest.mark.parametrize("management", [True, False])
def test_it_lists_the_routes_that_there_are(management: bool) -> None:
    """Each route of the apps is described, and nothing that there is no route for."""
    registry = ModelRegistry(MemoryStore())
    options: dict[str, Any] = {"management": management, "max_body_bytes": 1}
    routed = set()
    for app in (sagemaker(registry, **options), open_inference(registry, **options)):
        for route in app.routes:
            assert isinstance(route, Route)
            path = route.path.replace(":path", "").replace("{name}", "{model}")
            routed |= {(method.lower(), path) for method in route.methods or {"GET"} if method != "HEAD"}
    described = operations(describe(management=management, metrics=False))
    of_models = {(method, path) for method, path in described if path.startswith("/v2/models/")}
    assert described - of_models == {(method, path) for method, path in routed if not path.startswith("/v2/models/")}
    assert {method for method, _ in of_models} == {"get", "post"}


def test_metrics_are_there_if_they_are_served() -> None:
    """Without prometheus_client there is no such route."""
    with_metrics, without = (operations(describe(management=True, metrics=metrics)) for metrics in (True, False))
    assert with_metrics - without == {("get", "/metrics")}


def test_names_of_operations_differ() -> None:
    """Generators of clients make a function of each."""
    paths = describe(management=True, metrics=True)["paths"]
    names = [operation["operationId"] for found in paths.values() for operation in found.values()]
    assert len(names) == len(set(names))


def test_its_examples_are_answered(server: Served) -> None:
    """What the document shows as a body is one."""
    content = server.ask("GET", "/openapi.json").json["paths"]["/models/{model_name}/invoke"]["post"]["requestBody"]
    for kind, shown in content["content"].items():
        if "example" in shown:
            body = shown["example"] if isinstance(shown["example"], str) else json.dumps(shown["example"])
            assert server.ask("POST", "/models/Chicago_IL/invoke", body, content_type=kind).status == 200


def test_nobody_who_has_read_it_can_break_the_server(server: Served) -> None:
    """Requests made from the document, right and wrong ones, are answered, and none with a fault of the server's."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked = 0
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # a broken document is an error here

        @hypothesis.seed(5)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Case[Any]) -> None:
            nonlocal asked
            asked += 1
            case.call_and_validate(checks=[not_a_server_error], timeout=20)

        ask()
    assert asked >= len(operations(describe(management=True, metrics=True)))
    assert server.ask("POST", "/models/Chicago_IL/invoke", "1,2,3,4,5,6").status == 200
