"""open_store: URLs to stores, those of other packages among them."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from modelcache import LocalStore, MemoryStore, ModelRegistry, StoreError, open_store
from modelcache.stores import opening

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Install = Callable[..., None]

CODE = """
    from modelcache import MemoryStore, StoreAccessDeniedError

    class Registered(MemoryStore):
        def __init__(self, url, *, shard=0):
            super().__init__()
            self.url, self.shard = url, shard

    def anything(url, **options):
        return Registered(url, **options)

    def picky(url):
        raise StoreAccessDeniedError("no ticket")

    def broken(url):
        raise ZeroDivisionError("division by zero")

    def no_store(url):
        return [url]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution whose entry points register schemes, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str = "acme-stores", module: str = "acme_stores", **schemes: str) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(CODE))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{scheme} = {module}:{value}\n" for scheme, value in schemes.items())
        (info / "entry_points.txt").write_text(f"[{opening.GROUP}]\n{lines}")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_a_registered_scheme_opens_the_package_s_store(install: Install) -> None:
    """The factory, a class or a function, gets the whole URL and the options; a registry takes such a URL too."""
    install(acme="Registered", **{"acme+tls": "anything"})
    for url in ("acme://host/models?x=1", "acme+tls://host"):
        store = open_store(url, shard=3)
        assert isinstance(store, MemoryStore)
        assert (vars(store)["url"], vars(store)["shard"]) == (url, 3)
    assert "memory (0 artifacts)" in repr(ModelRegistry("acme://host"))


def test_shipped_schemes_cannot_be_hijacked(install: Install, tmp_path: Path) -> None:
    """Whatever other packages register: a file URL is a folder, and an adapter's prefix is the adapter's."""
    install(file="no_store", fsspec="no_store", **{"fsspec+file": "no_store"})
    assert isinstance(open_store(tmp_path.as_uri()), LocalStore)
    assert type(open_store("fsspec+" + tmp_path.as_uri())).__name__ == "FsspecStore"


def test_an_unknown_scheme_is_told_what_there_is(install: Install) -> None:
    """The error lists the known schemes, the adapters that know this one, and how to register one."""
    install(acme="Registered")
    known = r"there is one for .*acme://, .*file://"
    with pytest.raises(StoreError, match=rf"no store for nobody:// URLs; {known}.*entry-point group \"modelcache"):
        open_store("nobody://host")
    both = r"Write fsspec\+gs:// \(pip install 'modelcache\[fsspec\]'\) or obstore\+gs:// \(pip install 'modelc"
    with pytest.raises(StoreError, match=both):
        open_store("gs://bucket")
    with pytest.raises(StoreError, match=r"Write fsspec\+sftp:// \(pip install 'modelcache\[fsspec\]'\)\. Otherwise"):
        open_store("sftp://host")


def test_a_file_url_of_another_host_is_refused() -> None:
    """Two slashes too few name a host, which a folder does not have."""
    with pytest.raises(StoreError, match="There is no store for file://host/folder: a file URL has three slashes"):
        open_store("file://host/folder")


def test_without_fsspec_the_common_schemes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has neither adapter is told of both."""
    monkeypatch.setitem(sys.modules, "fsspec.registry", None)
    with pytest.raises(StoreError, match=r"Write fsspec\+gs:// .* or obstore\+gs://"):
        open_store("gs://bucket")
    with pytest.raises(StoreError, match=r"path\. Otherwise"):
        open_store("sftp://host")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("missing", r"acme_stores:missing of acme-stores 1\.2, registered for acme:// URLs, failed: AttributeError: "),
        ("broken", r"acme_stores:broken of acme-stores 1\.2.* failed: ZeroDivisionError: division by zero\."),
        ("no_store", r"acme_stores:no_store .* made \['acme://x'\], which is no store: it has to have fetch and close"),
        ("picky", r"^no ticket$"),
    ],
)
def test_a_plug_in_that_is_at_fault_is_named(install: Install, value: str, words: str) -> None:
    """The error names the object and its package; its own typed errors come through as they are."""
    install(acme=value)
    with pytest.raises(StoreError, match=words):
        open_store("acme://x")


def test_a_plug_in_that_cannot_be_imported_is_named(install: Install, tmp_path: Path) -> None:
    """A package with a bug, or without one that it needs, is told by name."""
    install(acme="Registered")
    (tmp_path / "acme_stores.py").write_text("import no_such_package\n")
    with pytest.raises(StoreError, match=r"of acme-stores 1\.2.* ModuleNotFoundError: No module named 'no_such_pack"):
        open_store("acme://x")


def test_two_packages_for_one_scheme_are_refused(install: Install) -> None:
    """Which of them is meant is not guessed."""
    install(acme="Registered")
    install("other-stores", "other_stores", acme="anything")
    both = r"acme_stores:Registered of acme-stores 1\.2 and other_stores:anything of other-stores 1\.2: uninstall"
    with pytest.raises(StoreError, match=both):
        open_store("acme://x")


def test_options_that_a_store_does_not_take_are_named(install: Install, tmp_path: Path) -> None:
    """The error names them and those that it takes; one that it takes goes through."""
    install(acme="Registered", plain="picky")
    for url, words in (
        (str(tmp_path), r"for a folder does not take colour; its options are: manifest\."),
        (tmp_path.as_uri(), r"for file:// URLs does not take colour; its options are: manifest\."),
        ("acme://x", r"for acme:// URLs \(.* 1\.2\) does not take colour; its options are: shard\."),
        ("plain://x", r"does not take colour; its options are: none\."),
    ):
        with pytest.raises(StoreError, match=words):
            open_store(url, colour="red")
    assert isinstance(open_store(tmp_path, manifest=None), LocalStore)
