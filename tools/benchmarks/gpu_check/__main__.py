"""`python -m tools.benchmarks.gpu_check`."""

import sys

from tools.benchmarks.gpu_check.check import main

sys.exit(main())
