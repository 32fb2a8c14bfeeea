"""Put the figures of the last run into the README, between its two comments."""

from __future__ import annotations

import re

from report import RESULTS

README = RESULTS.parent.parent / "README.md"


def main() -> None:
    """Replace what is there."""
    figures = (RESULTS / "readme.md").read_text()
    section = f"<!-- results -->\n{figures}<!-- /results -->"
    README.write_text(
        re.sub(r"<!-- results -->\n.*<!-- /results -->", lambda _: section, README.read_text(), flags=re.DOTALL)
    )


if __name__ == "__main__":
    main()
