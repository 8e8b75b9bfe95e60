"""Ray: worker groups, the loop that keeps them busy, and the phases of a run. The only room that knows it."""

import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Read when ray.data is imported: its progress lines would stand between ours, and it resets levels set later.
os.environ.setdefault("RAY_DATA_LOGGING_CONFIG", str(Path(__file__).with_name("ray_data_logging.yaml")))
