"""``python -m modelcache`` is the ``modelcache`` command."""

from modelcache.cli import main

if __name__ == "__main__":
    main()
