#!/usr/bin/env bash
# Merges, evaluates and verifies every recipe; the folders go to the step's output `folders`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folders=()
for recipe in "${found[@]}"; do
  name=$(basename "${recipe}")
  folder="${OUTPUT}/${name%.*}"
  safemerge-run "${recipe}" --output "${folder}" ${options[@]+"${options[@]}"}
  safemerge verify "${folder}"
  folders+=("${folder}")
  if [[ -n "${GITHUB_STEP_SUMMARY:-}" ]]; then
    sed '1{/^---$/!q};1,/^---$/d' "${folder}/README.md" >> "${GITHUB_STEP_SUMMARY}" # the card, without its metadata
  fi
done
{
  echo "folders<<SAFEMERGE"
  printf '%s\n' "${folders[@]}"
  echo "SAFEMERGE"
} >> "${GITHUB_OUTPUT:-/dev/stdout}"
