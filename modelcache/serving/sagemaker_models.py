"""The names that the platform has given to models, and the list of what is loaded.

The platform, or an operator, loads a model by ``{"model_name", "url"}``, and from then on calls it by the name, which
need not be that of the artifact (the platform takes a hash). Multi Model Server reads a folder that the platform has
filled; here the registry fetches from its store, so the url has to name an artifact of that store: by its name, or
below ``store_url``. Three things follow from the registry's own cache:

* A name stays given until it is deleted. If the model is evicted meanwhile it is not listed, and it is loaded again by
  the next call, or by another POST.
* A model that nobody has loaded by a POST goes by the name of its artifact, and is loaded by its first call.
* Two names of one artifact share one resident model; when one of them is deleted, the other loads it again.

A name that is another artifact's own is refused, as far as the store can tell: the forms of a call that do not know
given names would ask the other model by it. Where the store could not tell, a given name goes before an artifact's.

With a registry that is guarded a caller may use a given name only if that, and the artifact's name, are his to use.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from heapq import merge, nsmallest
from itertools import islice
from typing import TYPE_CHECKING

from modelcache.names import check_name, is_name, spellings
from modelcache.serving.access import AccessDeniedError, allowed
from modelcache.serving.errors import RequestError
from modelcache.serving.offering import lists
from modelcache.serving.sagemaker_errors import AlreadyLoadedError, NotLoadedError, TooManyNamesError
from modelcache.serving.sagemaker_names import Given, GivenNames

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelcache.registry import ModelRegistry

PAGE = 1000
"""Models in one answer to GET /models."""
_MOST_NAMES = 10_000
"""Names that are kept: each was asked for by a request, and a registry of as many models needs none."""
_LONGEST_NAME = 256
"""Characters of a name that is given; the platform's hashes have 32."""


class Models:
    """The models of ``registry`` by the names that clients of the container use."""

    def __init__(self, registry: ModelRegistry, store_url: str) -> None:
        self._registry = registry
        self._below = f"{store_url.rstrip('/')}/" if store_url else ""
        self._given = GivenNames()
        self._loading: set[str] = set()

    def artifact(self, name: str) -> str:
        """Return what the registry calls the model that a client calls ``name``.

        Raises AccessDeniedError for a given name that is not the caller's; of others the registry takes care.
        """
        given = self._given.get(name)
        if given is None:
            return name
        if not self._is_caller_s(name, given):
            raise AccessDeniedError(name)
        return given.artifact

    def _is_caller_s(self, name: str, given: Given) -> bool:
        return allowed(self._registry, name) and allowed(self._registry, given.artifact)

    async def load(self, name: str, url: str) -> None:
        """Give ``name`` to the artifact at ``url``, and load it.

        Raises AlreadyLoadedError, TooManyNamesError, RequestError for a url outside the store and for a name that is
        too long or another artifact's, AccessDeniedError, and what a load raises.
        """
        given = Given(self._artifact_at(url), url)
        if name == url == given.artifact:
            await self._load_own(name)
            return
        _check_given(name)
        for used in (name, given.artifact):
            if not allowed(self._registry, used):
                raise AccessDeniedError(used)
        await self._check_no_other_s(name, given.artifact)
        if name in self._loading or self._registry.peek(self.artifact(name)) is not None:
            raise AlreadyLoadedError(f"{name} is loaded already: DELETE it first to load another artifact.")
        before = self._given.get(name)
        if len(self._given) >= _MOST_NAMES and before is None:
            raise TooManyNamesError(f"{_MOST_NAMES:,} names are in use: DELETE models that are not needed.")
        self._given.put(name, given)
        self._loading.add(name)
        try:
            await self._registry.load(given.artifact)
        except BaseException:
            if self._given.get(name) is given:
                self._given.put(name, before)
            raise
        finally:
            self._loading.discard(name)

    async def _load_own(self, name: str) -> None:
        """Load an artifact under its own name, which is not given: it takes no room among those that are."""
        if self._given.get(name) is not None or self._registry.peek(name) is not None:
            raise AlreadyLoadedError(f"{name} is loaded already: DELETE it first to load another artifact.")
        await self._registry.load(name)

    async def _check_no_other_s(self, name: str, artifact: str) -> None:
        """Raise RequestError if ``name`` is the own name of another artifact."""
        if name not in spellings(artifact) and (
            self._registry.peek(name) is not None or await lists(self._registry, name)
        ):
            raise RequestError(
                f"{name} is an artifact of its own, and not {artifact}: send another model_name, or the url {name}."
            )

    async def unload(self, name: str) -> None:
        """Take ``name`` and its model away, and return when the bytes are free; NotLoadedError if there is none."""
        given = self._given.get(name)
        unloaded = await self._registry.unload(self.artifact(name))
        if given is not None and self._given.get(name) is given:
            self._given.put(name, None)
        elif not unloaded:
            raise NotLoadedError(f"No model {name!r} is loaded.")

    def describe(self, name: str) -> dict[str, str]:
        """Return name and url of a model that is loaded; raises NotLoadedError."""
        if self._registry.peek(self.artifact(name)) is None:
            raise NotLoadedError(f"No model {name!r} is loaded.")
        given = self._given.get(name)
        return _described(name, given.url if given is not None else name)

    def page(self, token: str | None) -> dict[str, object]:
        """Return the loaded models that come after ``token``, ordered by name, and the next token if there are more.

        A token says after which name to go on: what is loaded or unloaded between two pages moves no other model from
        one page to another.
        """
        after = "" if token is None else _read_token(token)
        own = (info.name for info in self._registry.loaded() if info.name > after)
        unnamed = nsmallest(PAGE + 1, (name for name in own if not self._goes_by_another(name)))
        models = list(islice(merge(self._named(after), ((name, name) for name in unnamed)), PAGE + 1))
        page: dict[str, object] = {"models": [_described(*model) for model in models[:PAGE]]}
        if len(models) > PAGE:
            page["nextPageToken"] = urlsafe_b64encode(models[PAGE - 1][0].encode()).decode()
        return page

    def _named(self, after: str) -> Iterator[tuple[str, str]]:
        """Yield the given names of loaded models, and their urls, sorted."""
        for name, given in self._given.after(after):
            if self._is_caller_s(name, given) and self._registry.peek(given.artifact) is not None:
                yield name, given.url

    def _goes_by_another(self, artifact: str) -> bool:
        """Say whether a resident model is listed by a name that it was given, or that name by another model."""
        given = self._given.get(artifact)
        return (given is not None and self._is_caller_s(artifact, given)) or any(
            self._names_resident(spelling, artifact)
            for spelling in spellings(artifact)
            if any(allowed(self._registry, name) for name in self._given.of(spelling))
        )

    def _names_resident(self, spelling: str, artifact: str) -> bool:
        info = self._registry.peek(spelling)  # "m.json" may be another model than "m", which was "m.ubj"
        return info is not None and info.name == artifact

    def _artifact_at(self, url: str) -> str:
        name = url.removeprefix(self._below)
        if not is_name(name):
            below = f", or its URL below {self._below}" if self._below else ""
            raise RequestError(
                f"The url {url[:1024]!r} names no artifact of this store. "
                f"Send its name, as 'tenant_a/Chicago_IL.tar.gz'{below}."
            )
        return name


def _check_given(name: str) -> None:
    if len(check_name(name)) > _LONGEST_NAME:
        raise RequestError(f"The model_name has {len(name)} characters, the limit is {_LONGEST_NAME}. Send a shorter.")


def _described(name: str, url: str) -> dict[str, str]:
    return {"modelName": name, "modelUrl": url}


def _read_token(token: str) -> str:
    try:
        return urlsafe_b64decode(token).decode()
    except ValueError:
        raise RequestError("next_page_token is none that this server has sent: begin without one.") from None
