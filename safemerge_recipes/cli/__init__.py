"""Cli: the command line."""

import sys

if sys.platform == "win32":  # before anything that Windows does not have is imported
    sys.stderr.write("safemerge: found Windows; expected Linux or macOS, on Windows use WSL (`wsl --install`)\n")
    raise SystemExit(4)
