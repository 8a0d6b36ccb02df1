"""References, bounds, cases, sweeps and reports: everything that measures the library, which never imports this."""

from cce_precision.analysis.capture import Capture, capture, load_capture, load_shipped

__all__ = ["Capture", "capture", "load_capture", "load_shipped"]
