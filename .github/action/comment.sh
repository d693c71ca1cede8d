#!/usr/bin/env bash
# Puts COMMENT_FILE on the pull request: the comment of an earlier run is replaced. GitHub takes 65536 characters.
set -euo pipefail
[[ -s "${COMMENT_FILE}" ]] || exit 0
head -c 60000 "${COMMENT_FILE}" > "${COMMENT_FILE}.short"
gh pr comment "${PULL_REQUEST}" --body-file "${COMMENT_FILE}.short" --edit-last --create-if-none
