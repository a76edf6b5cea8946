"""The settings of a run. Each is defined once, with its default and its rule, for flags and for Python."""

from dpreg.config.config import Config, check_settings
from dpreg.config.rows import Columns

__all__ = ["Columns", "Config", "check_settings"]
