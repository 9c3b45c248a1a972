"""Stable sets of weights, certificates of stability, and projections into the sets. The mathematics is in README.md."""

from .certificate import Certificate, LayerCertificate, certificate, certificate_from_state_dict
from .projection import project_
from .sets import Cascade, Certified, ForgetCap, Stability, check_stability
from .together import project_all_

__all__ = [
    "Cascade",
    "Certificate",
    "Certified",
    "ForgetCap",
    "LayerCertificate",
    "Stability",
    "certificate",
    "certificate_from_state_dict",
    "check_stability",
    "project_",
    "project_all_",
]
