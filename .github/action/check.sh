#!/usr/bin/env bash
# Validates every recipe and makes its plan; COMMENT_FILE gets both, in Markdown. Ends with the worst exit code.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sources=()
for option in ${options[@]+"${options[@]}"}; do
  case "${option}" in --source=* | --set=*) sources+=("${option}") ;; esac
done

worst=0
: > "${COMMENT_FILE}"
for recipe in "${found[@]}"; do
  title="is sound"
  text=$(safemerge validate "${recipe}" ${sources[@]+"${sources[@]}"} 2>&1)
  code=$?
  if [[ ${code} -ne 0 ]]; then
    title="is wrong"
    echo "::error file=${recipe}::${text%%$'\n'*}"
  else
    text=$(safemerge plan "${recipe}" ${options[@]+"${options[@]}"} 2>&1)
    code=$?
    if [[ ${code} -ne 0 ]]; then
      title="is sound, and has no plan here"
      echo "::error file=${recipe}::${text%%$'\n'*}"
    fi
  fi
  echo "${text}"
  # The fence is longer than any in a recipe's own words. shellcheck takes its backticks for commands.
  # shellcheck disable=SC2016
  printf '### `%s` %s\n\n<details><summary>plan</summary>\n\n``````\n%s\n``````\n\n</details>\n\n' \
    "${recipe//\`/}" "${title}" "${text//\`\`\`\`\`\`/}" >> "${COMMENT_FILE}"
  if [[ ${code} -gt ${worst} ]]; then worst=${code}; fi
done
if [[ -n "${GITHUB_STEP_SUMMARY:-}" ]]; then cat "${COMMENT_FILE}" >> "${GITHUB_STEP_SUMMARY}"; fi
exit "${worst}"
