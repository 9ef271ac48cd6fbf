"""``python -m vhost_user`` is ``vhost-user``."""

import sys

from .cli import main

sys.exit(main())
