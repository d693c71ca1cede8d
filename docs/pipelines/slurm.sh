#!/bin/bash
# A merge as a Slurm array: eight workers, then one short job that ends it.
#
#   workers=$(sbatch --parsable docs/pipelines/slurm.sh recipe.yaml)
#   sbatch --dependency=afterok:$workers --array=0 docs/pipelines/slurm.sh recipe.yaml
#
# A task that failed or was preempted is simply started again: sbatch --array=3 … does part 3.
#SBATCH --job-name=safemerge
#SBATCH --array=1-8
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=02:00:00
#SBATCH --requeue
set -euo pipefail

recipe=${1:?expected a recipe, on a file system that all nodes mount}
parts=${PARTS:-8}

if [ "$SLURM_ARRAY_TASK_ID" -eq 0 ]; then
  exec safemerge finalize "$recipe"
fi
exec safemerge run "$recipe" --part "$SLURM_ARRAY_TASK_ID/$parts" --workers "${SLURM_CPUS_PER_TASK:-1}" --max-memory 6GB
