"""Have the engine hash files and remember it, as its first run over them does.

python -m benchmarks.hashed FILE [FILE ...]
"""

import sys

from safemerge_recipes.sources.checkpoint import FileIdentity
from safemerge_recipes.storage.digests import file_digest

for path in sys.argv[1:]:
    file_digest(FileIdentity.of(path))
