from __future__ import annotations

import os

from hypothesis import settings

# A check that gates a change must give the same answer twice; elsewhere each run looks at new examples.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
