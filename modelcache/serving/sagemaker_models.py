"""The names that the platform has given to models, and the list of what is loaded.

The platform, or an operator, loads a model by ``{"model_name", "url"}``, and from then on calls it by the name, which
need not be that of the artifact (the platform takes a hash). Multi Model Server reads a folder that the platform has
filled; here the registry fetches from its store, so the url has to name an artifact of that store: by its name, or
below ``store_url``. Three things follow from the registry's own cache:

* A name stays given until it is deleted. If the model is evicted meanwhile it is not listed, and it is loaded again by
  the next call, or by another POST.
* A model that nobody has loaded by a POST goes by the name of its artifact, and is loaded by its first call.
* Two names of one artifact share one resident model; when one of them is deleted, the other loads it again.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TYPE_CHECKING, NamedTuple

from modelcache.errors import ModelCacheError
from modelcache.names import check_name, is_name
from modelcache.serving.errors import RequestError
from modelcache.serving.sagemaker_errors import AlreadyLoadedError, NotLoadedError, TooManyNamesError

if TYPE_CHECKING:
    from modelcache.registry import ModelRegistry

PAGE = 1000
"""Models in one answer to GET /models."""
_MOST_NAMES = 100_000
"""Names that are kept, at about 300 bytes each."""


class _Given(NamedTuple):
    """What a name was given to."""

    artifact: str
    url: str


class Models:
    """The models of ``registry`` by the names that clients of the container use."""

    def __init__(self, registry: ModelRegistry, store_url: str) -> None:
        self._registry = registry
        self._below = f"{store_url.rstrip('/')}/" if store_url else ""
        self._given: dict[str, _Given] = {}
        self._loading: set[str] = set()

    def artifact(self, name: str) -> str:
        """Return what the registry calls the model that a client calls ``name``."""
        given = self._given.get(name)
        return given.artifact if given is not None else name

    async def load(self, name: str, url: str) -> None:
        """Give ``name`` to the artifact at ``url``, and load it.

        Raises AlreadyLoadedError, TooManyNamesError, RequestError for a url outside the store, and what a load raises.
        """
        given = _Given(self._artifact_at(url), url)
        if check_name(name) in self._loading or self._registry.peek(self.artifact(name)) is not None:
            raise AlreadyLoadedError(f"{name} is loaded already: DELETE it first to load another artifact.")
        if len(self._given) >= _MOST_NAMES and name not in self._given:
            raise TooManyNamesError(f"{_MOST_NAMES:,} names are in use: DELETE models that are not needed.")
        before = self._given.get(name)
        self._given[name] = given
        self._loading.add(name)
        try:
            await self._registry.load(given.artifact)
        except BaseException:
            if self._given.get(name) is given:
                self._give_back(name, before)
            raise
        finally:
            self._loading.discard(name)

    def _give_back(self, name: str, before: _Given | None) -> None:
        if before is None:
            del self._given[name]
        else:
            self._given[name] = before

    async def unload(self, name: str) -> None:
        """Take ``name`` and its model away, and return when the bytes are free; NotLoadedError if there is none."""
        given = self._given.get(name)
        unloaded = await self._registry.unload(self.artifact(name))
        if given is not None and self._given.get(name) is given:
            del self._given[name]
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
        urls = self._urls()
        names = sorted(name for name in urls if name > after)
        shown = names[:PAGE]
        page: dict[str, object] = {"models": [_described(name, urls[name]) for name in shown]}
        if len(names) > PAGE:
            page["nextPageToken"] = urlsafe_b64encode(shown[-1].encode()).decode()
        return page

    def _urls(self) -> dict[str, str]:
        """Return the url of each loaded model, by the name it was given, or else by that of its artifact."""
        resident = {info.name for info in self._registry.loaded()}
        urls: dict[str, str] = {}
        named: set[str] = set()
        for name, (artifact, url) in self._given.items():
            key = artifact if artifact in resident else self._key(artifact)
            if key is not None:
                urls[name] = url
                named.add(key)
        for name in resident - named:
            urls.setdefault(name, name)
        return urls

    def _key(self, artifact: str) -> str | None:
        try:
            info = self._registry.peek(artifact)  # it may be resident without its suffix
        except ModelCacheError:
            return None  # a registry that is guarded shows each caller only the models that are his to use
        return info.name if info is not None else None

    def _artifact_at(self, url: str) -> str:
        name = url.removeprefix(self._below)
        if not is_name(name):
            below = f", or its URL below {self._below}" if self._below else ""
            raise RequestError(
                f"The url {url[:1024]!r} names no artifact of this store. "
                f"Send its name, as 'tenant_a/Chicago_IL.tar.gz'{below}."
            )
        return name


def _described(name: str, url: str) -> dict[str, str]:
    return {"modelName": name, "modelUrl": url}


def _read_token(token: str) -> str:
    try:
        return urlsafe_b64decode(token).decode()
    except ValueError:
        raise RequestError("next_page_token is none that this server has sent: begin without one.") from None
