"""`python -m ovq ...` is `ovq ...`: it works from any folder, and after the environment has been moved."""

import sys

from ovq.cli import main

sys.exit(main())
