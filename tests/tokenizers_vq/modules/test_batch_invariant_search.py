"""Codes do not depend on the batch. `codes_in_any_batch.py` tests 100,000 of each model."""

import runpy
from pathlib import Path

import pytest

TORTURE = runpy.run_path(str(Path(__file__).parents[2] / "robustness" / "codes_in_any_batch.py"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", TORTURE["MODELS"])
def test_codes_do_not_depend_on_batch_order_threads_or_process(kind):
    (flips,) = TORTURE["main"](200, kinds=[kind]).values()
    assert len(flips) == 7 and set(flips.values()) == {0}
