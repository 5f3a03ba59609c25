#!/bin/bash
# One task of a study on Slurm. Copy it, edit the lines marked SITE, then
#
#   slmjax study run --on=slurm --script=job.sh --study=... --out=/shared/OUT
#
# slmjax gives sbatch the array, the job's name, its log file and --requeue; everything else is here. Try it first with
# --dry_run. /shared/OUT must be the same folder on every node.

#SBATCH --time=04:00:00            # SITE: a run that needs longer is saved, put back in the queue, and goes on
#SBATCH --nodes=1                  # more than one: every run is spread over all of them
#SBATCH --ntasks-per-node=1        # one process a node, which uses all the devices it is given
#SBATCH --cpus-per-task=8          # SITE
#SBATCH --gpus-per-node=8          # SITE: or take the line out, to train on CPU
##SBATCH --partition=gpu           # SITE
##SBATCH --account=me              # SITE
#SBATCH --signal=TERM@120          # two minutes before --time is over the run saves; a large model may need longer

set -u
source "${SLMJAX_VENV:-.venv}/bin/activate"   # SITE: launch/setup.sh makes it; sbatch starts in the folder of submission

# srun does not take this over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# With several processes JAX finds its coordinator, rank and size from Slurm's own variables, where none are left from a
# launch by hand in the shell that sbatch was called from.
unset JAX_NUM_PROCESSES JAX_PROCESS_ID
distributed=
if [ "${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}}" -gt 1 ]; then distributed=--distributed; fi

# Slurm ends this shell, too, when it cancels or requeues the job itself; before a time limit it signals the steps alone.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM

srun slmjax pack "$1" --task="$SLURM_ARRAY_TASK_ID" $distributed
code=$?

# 3: stopped with everything saved. Nobody but the time limit asked for it, so the run wants another turn.
if [ "$code" -eq 3 ] && [ -z "$ended_by_slurm" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
