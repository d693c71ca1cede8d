#!/usr/bin/env bash
# Installs what the action runs: PACKAGE, or the version that the action itself is.
set -euo pipefail
extra=""
if [[ "${MODE}" == "merge" || ("${MODE}" == "auto" && "${EVENT}" == "release") ]]; then
  extra="[eval]"
fi
python -m pip install --disable-pip-version-check "${PACKAGE:-${GITHUB_ACTION_PATH}${extra}}"
safemerge --version
