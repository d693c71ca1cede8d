"""A process with everything heavy loaded, which forks one child a request: a fresh run in a tenth of a second.

Reads requests as JSON lines: arguments, Python to run first, environment, files for the two outputs. Answers
each with the child's wait status. The parent itself never starts a thread, so its children are whole.
"""

import json
import os
import sys
import traceback

import torch  # noqa: F401

from safemerge_recipes import verify  # noqa: F401
from safemerge_recipes.cli import app as cli

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number, path in ((1, request["out"]), (2, request["err"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            os.environ.update(request["env"])
            exec(request["before"], {})
            cli.main(request["arguments"])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    sys.stdout.write(f"{status}\n")
    sys.stdout.flush()
