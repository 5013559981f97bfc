"""The program's logger."""

import logging

log = logging.getLogger("adabet")
