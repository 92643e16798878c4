"""`python -m bench.gpu`; see command.py."""

import sys

from bench.gpu.command import main

sys.exit(main())
