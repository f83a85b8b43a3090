"""Tests of compiled decoding share what `test_whole_cycle` makes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
