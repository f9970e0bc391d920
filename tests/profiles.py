"""Hypothesis profiles. Failing examples are kept in .hypothesis/ and tried first the next time, by every profile."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

_COMMON = settings(
    deadline=None,  # the first example compiles or warms up
    print_blob=True,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def load_default() -> None:
    settings.register_profile("ci", _COMMON, max_examples=300)
    settings.register_profile("dev", _COMMON, max_examples=100)
    settings.register_profile("gpu", _COMMON, max_examples=int(os.environ.get("KDA_CUTE_GPU_EXAMPLES", "2000")))
    # A round of `python -m tests.fuzz`. Without explain: it reruns a failure hundreds of times for a comment.
    settings.register_profile(
        "fuzz", _COMMON, max_examples=200, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    )
    settings.load_profile("ci" if os.environ.get("CI") else "dev")
