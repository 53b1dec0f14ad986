"""Started by a launcher: train every recipe of a list, one after the other, in one process group.

A launch costs 10-20 s, another run in the same processes about one: so many configurations share a launch.
"""

import json
import sys
from pathlib import Path

from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train

for job in json.loads(Path(sys.argv[1]).read_text()):
    train(parse_recipe(job["recipe"]), job.get("resume"))
