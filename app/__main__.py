"""`python -m app` is the `fluxchat` command."""

import sys

from app.cli import main

sys.exit(main())
