"""The routes of both apps as an OpenAPI document: what ``/openapi.json`` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcache import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    Json = dict[str, Any]

_JSON = "application/json"
_ROWS = (
    "text/csv",
    "text/libsvm",
    "application/x-recordio-protobuf",
    _JSON,
    "application/x-npy",
    "application/vnd.apache.arrow.stream",
)
_PREDICTIONS = ("text/csv", _JSON, "application/jsonlines", "application/x-npy", "application/vnd.apache.arrow.stream")
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_NUMBER = {"type": "number"}

_EXAMPLES: dict[str, Any] = {"text/csv": "1990,3047,5,1.0,1.11,2\n", _JSON: [[1990, 3047, 5, 1.0, 1.11, 2]]}

_CLIENT_ERRORS = {
    400: "The request, the name or the rows are not understood.",
    404: "There is no such model.",
    406: "No type that the client accepts is written.",
    413: "The body, its rows or the answer are more than the server takes.",
    415: "The body is of a type, or compressed in a way, that is not read.",
    422: "The artifact is no model.",
}
_SERVER_ERRORS = {
    500: "A worker process died twice under this call.",
    502: "The store failed.",
    503: "Too many calls wait, or the server is about to end; Retry-After says when to come back.",
    504: "The time ran out; a load goes on.",
    507: "The model does not fit into memory beside those that are in use.",
}
_OF_ALL = {
    401: "A token is needed, or it is not known.",
    403: "The token does not reach this model, or the store lets nobody read it.",
    408: "The request was not all here in time.",
    431: "There are too many headers, or they are too large.",
}

_INFER: Json = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _TEXT,
        "parameters": _OBJECT,
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": _TEXT,
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"type": "string", "enum": ["FP32", "FP64", "INT32", "INT64", "BOOL"]},
                    "parameters": _OBJECT,
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {"type": "object", "required": ["name"], "properties": {"name": _TEXT, "parameters": _OBJECT}},
        },
    },
}
_LOAD: Json = {
    "type": "object",
    "required": ["model_name", "url"],
    "properties": {
        "model_name": _TEXT,
        "url": {"type": "string", "description": "The artifact's name in the store, or its URL below the store's."},
    },
}


def describe(*, management: bool, metrics: bool) -> Json:
    """Return the document; without the routes that load and unload, or that of metrics, where these are not served."""
    paths = _sagemaker() | _open_inference()
    if management:
        for path, operations in (_sagemaker_management() | _open_inference_management()).items():
            paths.setdefault(path, {}).update(operations)
    if metrics:
        paths["/metrics"] = {"get": _operation("metrics", "Figures for Prometheus.", answers={"text/plain": _TEXT})}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modelcache",
            "version": __version__,
            "description": "Very many small models behind the protocols of SageMaker and of Open Inference, version 2. "
            "A model that is not in memory is loaded by its first call. Names may have slashes.",
        },
        "security": [{"bearer": []}, {}],
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
        "paths": paths,
    }


def _sagemaker() -> Json:
    name, target = _in_path("model_name"), _header("X-Amzn-SageMaker-Target-Model", "The model to ask.")
    endpoint = _in_path("EndpointName", "Any will do.")
    say_hello = _operation("ping", "Say whether the server takes requests.", failures={503: _SERVER_ERRORS[503]})
    page = {"name": "next_page_token", "in": "query", "schema": _TEXT, "description": "As the last page had it."}
    return {
        "/ping": {"get": say_hello},
        "/endpoints/{EndpointName}/invocations": {"post": _invocation("invokeEndpoint", endpoint, target)},
        "/invocations": {"post": _invocation("invoke", target)},
        "/models/{model_name}/invoke": {"post": _invocation("invokeModel", name)},
        "/models": {"get": _operation("listModels", "List what is loaded.", page, answers=_json_object())},
        "/models/{model_name}": {
            "get": _operation("describeModel", "Say that a model is loaded.", name, answers=_json_object())
        },
        "/execution-parameters": {
            "get": _operation("executionParameters", "Say what batch transform may send.", answers=_json_object())
        },
    }


def _sagemaker_management() -> Json:
    name = _in_path("model_name")
    taken = {409: "A model of that name is loaded already.", **_SERVER_ERRORS}
    load = _operation("loadModel", "Load a model.", body={_JSON: _LOAD}, answers=_json_object(), failures=taken)
    unload = _operation("unloadModel", "Unload a model; answers when its bytes are free.", name, answers=_json_object())
    return {"/models": {"post": load}, "/models/{model_name}": {"delete": unload}}


def _open_inference() -> Json:
    name, version = _in_path("model"), _in_path("version")
    paths: Json = {
        "/v2": {"get": _operation("server", "Name the server and what it offers.", answers=_json_object())},
        "/v2/health/live": {"get": _operation("live", "Say that the server lives.", answers=_json_object())},
        "/v2/health/ready": {
            "get": _operation(
                "ready", "Say whether it takes requests.", answers=_json_object(), failures=_SERVER_ERRORS
            )
        },
        "/v2/models/stats": {"get": _operation("allStats", "Statistics of what is loaded.", answers=_json_object())},
        "/v2/repository/index": {
            "post": _operation(
                "index",
                "List what there is, and the state of each model.",
                body={_JSON: {"type": "object", "properties": {"ready": {"type": "boolean"}}}},
                answers={_JSON: {"type": "array", "items": _OBJECT}},
                failures=_SERVER_ERRORS,
            )
        },
    }
    for place, parameters, of in (
        ("/v2/models/{model}", (name,), "Model"),
        ("/v2/models/{model}/versions/{version}", (name, version), "Version"),
    ):
        paths[place] = {"get": _about(f"metadata{of}", "Describe inputs and outputs.", *parameters)}
        paths[f"{place}/ready"] = {"get": _about(f"ready{of}", "Say whether a call would be answered.", *parameters)}
        paths[f"{place}/config"] = {"get": _about(f"config{of}", "The configuration, as Triton has it.", *parameters)}
        paths[f"{place}/stats"] = {"get": _about(f"stats{of}", "Statistics of a loaded model.", *parameters)}
        paths[f"{place}/infer"] = {
            "post": _operation(
                f"infer{of}",
                "Predict.",
                *parameters,
                body={_JSON: _INFER},
                answers=_json_object(),
                failures=_SERVER_ERRORS,
            )
        }
    return paths


def _open_inference_management() -> Json:
    name = _in_path("model")
    body: Json = {_JSON: {"type": "object", "properties": {"parameters": _OBJECT}}}
    return {
        f"/v2/repository/models/{{model}}/{verb}": {
            "post": _operation(verb, does, name, body=body, answers=_json_object(), failures=_SERVER_ERRORS)
        }
        for verb, does in (("load", "Load a model, or the store's newer version of it."), ("unload", "Unload a model."))
    }


def _invocation(identity: str, *parameters: Json) -> Json:
    accept = {"name": "Accept", "in": "header", "schema": _TEXT, "description": f"One of {', '.join(_PREDICTIONS)}."}
    operation = _operation(
        identity,
        "Predict the rows in the body, of which there is at least one.",
        *parameters,
        accept,
        body={kind: {} for kind in _ROWS},
        answers={_JSON: {"type": "array", "items": _NUMBER}, "text/csv": _TEXT},
        failures={424: "The model could not answer; OriginalStatusCode says why.", 429: "It loads: come back."}
        | _SERVER_ERRORS,
    )
    for kind, example in _EXAMPLES.items():
        operation["requestBody"]["content"][kind] = {"schema": {}, "example": example}
    operation["responses"]["204"] = {"description": "The body was empty."}
    return operation


def _about(identity: str, summary: str, *parameters: Json) -> Json:
    return _operation(identity, summary, *parameters, answers=_json_object(), failures=_SERVER_ERRORS)


def _operation(
    identity: str,
    summary: str,
    *parameters: Json,
    body: Mapping[str, Json] | None = None,
    answers: Mapping[str, Json] | None = None,
    failures: Mapping[int, str] | None = None,
) -> Json:
    failed = _CLIENT_ERRORS | _OF_ALL | dict(failures or {})
    operation: Json = {
        "operationId": identity,
        "summary": summary,
        "parameters": list(parameters),
        "responses": {"200": {"description": "Done."}}
        | {str(status): {"description": reason} for status, reason in sorted(failed.items())},
    }
    if answers:
        operation["responses"]["200"]["content"] = _content(answers)
    if body:
        operation["requestBody"] = {"content": _content(body)}
    return operation


def _content(types: Mapping[str, Json]) -> Json:
    return {kind: {"schema": schema} for kind, schema in types.items()}


def _json_object() -> Json:
    return {_JSON: _OBJECT}


def _in_path(name: str, description: str = "") -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": description}


def _header(name: str, description: str) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}
