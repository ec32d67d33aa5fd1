"""`python -m lolgen` is the command `lolgen`."""

import sys

from lolgen.cli import main

sys.exit(main())
