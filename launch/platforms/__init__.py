"""Where jobs run: each platform is a module with the five verbs.

`create` gets machines, `run` starts the job, `logs` follows it, `resume` gets
back what was lost and runs again, `delete` ends the job and gives back what
`create` took. No verb deletes a work directory.
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
