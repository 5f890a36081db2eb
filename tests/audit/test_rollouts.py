"""audit/rollouts.py: the state of a run's audits. The audits themselves: tests/integration/audit/test_rollouts.py."""

from __future__ import annotations

import pytest

from respec_trainer.audit.rollouts import StepAudit
from respec_trainer.errors import ConfigError
from tests.support.configs import smallest_config


def test_sums_of_another_version_are_refused_with_the_remedy(tmp_path):
    audit = StepAudit(smallest_config(tmp_path, "rollout.audit_every=1"), actor=None)
    audit.load_state_dict(audit.state_dict())
    assert audit.total is None, "nothing was audited yet"
    counts = {"observed": [3.0, 1.0], "expected": [2.5, 1.5], "draws": 4.0}  # of classes alone
    with pytest.raises(ConfigError, match=r"sums of audits.*another version.*checkpoint.resume=never"):
        audit.load_state_dict({"total": counts})
