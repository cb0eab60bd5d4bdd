"""The checker of the streaming contract: `verify_streaming` on one device, `verify_devices` over several."""

from seqlab.verify.devices import verify_devices
from seqlab.verify.report import Report
from seqlab.verify.streaming import verify_streaming

__all__ = ["Report", "verify_devices", "verify_streaming"]
