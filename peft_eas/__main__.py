"""`python -m peft_eas`: the command line."""

import sys

from .cli import main

sys.exit(main())
