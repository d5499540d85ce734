"""The platforms: each is a module with the five verbs.

`create` allocates machines, `run` starts the job, `logs` follows its output,
`resume` replaces lost machines and runs the job again, `delete` ends the job
and releases what `create` allocated. No verb deletes a work directory. All but
`local` also have `probes`: what `launch.doctor` asks before a job is paid for.
"""

from launch.platforms import gke
from launch.platforms import local
from launch.platforms import skypilot
from launch.platforms import slurm
from launch.platforms import tpu_vm
from launch.platforms import xpk

PLATFORMS = {
  'gke': gke,
  'local': local,
  'skypilot': skypilot,
  'slurm': slurm,
  'tpu_vm': tpu_vm,
  'xpk': xpk,
}
