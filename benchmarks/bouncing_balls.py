"""Frames per CPU second of the generated sequences, on one core.

    python benchmarks/bouncing_balls.py            # about 10 s
    python benchmarks/bouncing_balls.py --frames 200000

The second column is the share of a core that generation takes beside a training step of 250 ms on 16 sequences of 16 frames.
"""
import argparse
import time

from dreamer_wb.vta.bouncing_balls import big_ball, bouncing_balls, color_patterns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=60_000, help='frames of each kind')
    frames = parser.parse_args().frames
    kinds = {'two balls, 32 pixels': lambda n: bouncing_balls(n, 30), 'two diamonds': lambda n: bouncing_balls(n, 30, shape='diamond'),
             'one big ball': lambda n: big_ball(n, 30), 'two balls, 64 pixels': lambda n: bouncing_balls(n, 30, size=64, radius=6),
             'simple colors': lambda n: color_patterns(n, 30)}
    print(f'{"":<24}{"frames per CPU second":>24}{"of a 250 ms step":>20}')
    for name, make in kinds.items():
        make(100)
        start = time.process_time()
        make(frames // 30)
        rate = frames/(time.process_time() - start)
        print(f'{name:<24}{rate:>24,.0f}{16*16/rate/.25:>20.2%}')

if __name__ == '__main__': main()
