"""Have the engine hash files and remember it, as its first run over them does.

python -m benchmarks.hashed FILE [FILE ...]
"""

import sys

from safemerge_recipes.checkpoint import FileIdentity
from safemerge_recipes.provenance import file_digest

for path in sys.argv[1:]:
    file_digest(FileIdentity.of(path))
