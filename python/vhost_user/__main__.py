"""``python -m vhost_user`` is ``vhost-user``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
