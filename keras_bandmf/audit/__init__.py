"""Attacks on private runs, which bound their epsilon from below."""

from keras_bandmf.audit.one_run import audit_run
from keras_bandmf.audit.report import AuditReport
from keras_bandmf.audit.step_audit import audit_steps

__all__ = ["AuditReport", "audit_run", "audit_steps"]


def __dir__() -> list[str]:
    return __all__
