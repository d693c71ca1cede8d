# shellcheck shell=bash disable=SC2034 # for whoever sources this
# Sourced: `found`, the recipes that RECIPES names, and `options`, a word for each line of OPTIONS.
shopt -s globstar nullglob
found=()
options=()
while IFS= read -r pattern; do
  [[ -n "${pattern}" ]] || continue
  matched=()
  while IFS= read -r file; do matched+=("${file}"); done < <(compgen -G "${pattern}" | sort)
  if [[ ${#matched[@]} -eq 0 ]]; then
    echo "::error::${pattern} names no recipe"
    exit 2
  fi
  found+=("${matched[@]}")
done <<< "${RECIPES}"
while IFS= read -r option; do
  [[ -z "${option}" ]] || options+=("${option}")
done <<< "${OPTIONS:-}"
