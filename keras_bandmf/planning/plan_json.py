"""The JSON of a plan: exact to the last bit, and read in every version that was ever written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_bandmf import strategies
from keras_bandmf.accounting.amplification.certificate import Certificate
from keras_bandmf.planning.documents import read_document, write_document
from keras_bandmf.planning.units import ROW

_FORMAT = "keras_bandmf.TrainingPlan"
_VERSION = 1
#: Of a plan with a certificate. Any other plan is written as it always was, so that its
#: fingerprint, by which checkpoints know it, stays the same.
_VERSION_WITH_CERTIFICATE = 2
#: Of a plan that counts units which are not rows; it may have a certificate.
_VERSION_WITH_UNIT = 3


def plan_document(plan: Any, names: Sequence[str], *, indent: int | None) -> str:
    """Returns the JSON of a plan.

    Args:
        plan: The plan.
        names: The names of its fields.
        indent: Spaces to indent by, or None for the canonical form.
    """
    fields = {name: getattr(plan, name) for name in names}
    fields["strategy"] = plan.strategy.get_config()
    certificate = plan.certificate
    fields["certificate"] = None if certificate is None else certificate.get_config()
    version = _VERSION_WITH_UNIT
    if plan.unit == ROW:
        del fields["unit"]
        version = _VERSION_WITH_CERTIFICATE
        if certificate is None:
            del fields["certificate"]
            version = _VERSION
    return write_document(_FORMAT, version, fields, indent=indent)


def plan_arguments(text: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of the plan that a JSON text describes.

    Args:
        text: What `plan_document` returned.
        names: The names of the fields of a plan.

    Raises:
        TypeError: `text` is not a string.
        ValueError: The format, the version or the strategy class is unknown, or fields are missing
            or unknown.
    """
    known = set(names)
    versions = {
        _VERSION: known - {"certificate", "unit"},
        _VERSION_WITH_CERTIFICATE: known - {"unit"},
        _VERSION_WITH_UNIT: known,
    }
    fields = read_document(text, _FORMAT, versions)
    fields["strategy"] = strategies.from_config(fields["strategy"])
    if fields.get("certificate") is not None:
        fields["certificate"] = Certificate.from_config(fields["certificate"])
    return fields
