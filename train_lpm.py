"""The users' script by its old name: `python3 train_lpm.py --steps 10000 --noisy-tv` is `dreamer-wb lpm steps=10000 noisy_tv=true`."""
import argparse
import sys

from dreamer_wb.cli import main


def overrides(argv=None):
    "Flags as `key=value`; what is `key=value` already is handed on."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--steps', type=int, help='environment steps (200,000)')
    p.add_argument('--noisy-tv', action='store_true', help='put a television into the environment')
    p.add_argument('--seed', type=int, help='seed')
    p.add_argument('--env-name', help='environment (Pendulum-v1)')
    p.add_argument('--wandb', action='store_true', help='log to Weights & Biases')
    p.add_argument('--wandb-project', help='its project')
    known, rest = p.parse_known_args(argv)
    if bad := [x for x in rest if '=' not in x or x.startswith('-')]: p.error(f'unknown: {" ".join(bad)}')
    given = {k: v for k, v in vars(known).items() if v not in (None, False)}
    return [f'{k}={str(v).lower() if v is True else v}' for k, v in given.items()] + rest


if __name__ == '__main__': sys.exit(main(['lpm', *overrides()]))
