"""What a run is: settings in groups, each with its default and its rule in one place, for flags and Python alike."""

from dpreg.config.config import Config, check_settings
from dpreg.config.rows import Columns

__all__ = ["Columns", "Config", "check_settings"]
