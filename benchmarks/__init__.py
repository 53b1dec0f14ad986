"""One module or package for each question, run as `python -m benchmarks.NAME --out FILE.json`.

The protocol is in README.md beside this file.
"""

import os

# torch's profiler writes two lines of its own to stderr at every use, between our lines of progress. Read when torch
# loads, so it is set here, before any benchmark imports it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
