"""Have the engine hash files and remember it, as its first run over them does.

python -m benchmarks.timing.hashed FILE [FILE ...]
"""

import sys

from safemerge_recipes.storage.digests import file_digest
from safemerge_recipes.storage.identity import FileIdentity

for path in sys.argv[1:]:
    file_digest(FileIdentity.of(path))
