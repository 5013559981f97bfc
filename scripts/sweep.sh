#!/usr/bin/env bash
# Runs a whole comparison; see scripts/sweep.py, or --help, for the flags.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$here/sweep.py" "$@"
