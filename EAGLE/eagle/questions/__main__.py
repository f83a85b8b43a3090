"""``python -m eagle.questions fetch SUITE``: see `eagle.questions.fetch`."""

from __future__ import annotations

import sys

from eagle.questions.fetch import main

if __name__ == "__main__":
    sys.exit(main())
