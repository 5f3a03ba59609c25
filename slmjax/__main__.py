"""`python -m slmjax VERB ...`, the same as the console command."""

import sys

from slmjax.cli import main

sys.exit(main())
