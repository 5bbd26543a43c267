"""Search for a temperature, an alpha or any loss weight, and say how sure the outcome is."""

from kdfast.tuning.search import Interrupted, Objective, ObjectiveError, Report
from kdfast.tuning.space import Space, TuneError, format_settings, parse_settings, parse_space
from kdfast.tuning.tune import PAGE_NAME, RESULTS_NAME, tune

__all__ = [
    "PAGE_NAME",
    "RESULTS_NAME",
    "Interrupted",
    "Objective",
    "ObjectiveError",
    "Report",
    "Space",
    "TuneError",
    "format_settings",
    "parse_settings",
    "parse_space",
    "tune",
]
