"""`python -m fastmask`: the command."""

import sys

from fastmask.cli import main

sys.exit(main())
