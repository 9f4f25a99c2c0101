"""pLDDT's loss counts structures of good resolution."""

from __future__ import annotations

import numpy as np
import pytest
from loss_cases import plddt
from loss_problems import synthetic_problem


@pytest.mark.parametrize("resolution", [0.0, 2.9, 3.1])
def test_plddt_counts_good_structures_only(resolution, framework):
    p = synthetic_problem()
    (loss,) = framework.call(plddt, p._replace(resolution=np.array(resolution)))
    assert (loss > 0) == (resolution == 2.9)
