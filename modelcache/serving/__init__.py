"""Servers for clients that exist: ASGI apps that speak the protocols of SageMaker and of Open Inference.

They are mounted in an app of yours, or run by ``modelcache serve``. The registry stays yours: an app neither starts
nor closes it. The way of a request is that of the modules: ``bodies`` reads it, ``codecs`` turns it into rows and the
predictions into an answer; ``errors`` lists what can be wrong with a request before a model is asked.
"""

from importlib.util import find_spec

from modelcache.errors import MissingDependencyError

for _package in ("starlette", "orjson", "google", "google.protobuf"):
    if not find_spec(_package):  # "google" is a folder of many packages
        raise MissingDependencyError(f"modelcache.serving needs {_package}: pip install 'modelcache[serve]'")

from modelcache.serving.open_inference_app import open_inference  # noqa: E402 - says what is missing first
from modelcache.serving.sagemaker_app import sagemaker  # noqa: E402

__all__ = ["open_inference", "sagemaker"]
