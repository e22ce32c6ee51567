"""train.py with the advantages of RLOO or GRPO whitened, as those of VinePPO and PPO are.

    python experiments/whitened.py --dataset arithmetic --algorithm rloo ..      # train.py's options

A control of compare.py: what does the whitening alone do?
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from baselines.groups import Group


def main():
    Group.whiten = True
    train.main()


if __name__ == "__main__":
    main()
